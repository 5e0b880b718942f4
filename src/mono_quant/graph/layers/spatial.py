"""Steps over the positions of an image: averages, maxima, padding, joining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant.graph.arithmetic import LARGEST_CODE, QParams, memory_format
from mono_quant.graph.layers.layer import Layer

_AVERAGES: Final[tuple[Callable[..., Tensor], ...]] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)

# As many codes as fit a sum of 32 bits, whatever they are.
_MOST_SUMMED: Final = torch.iinfo(torch.int32).max // LARGEST_CODE


@dataclass(frozen=True)
class GlobalAverageSpec:
    """A mean over all positions.

    Attributes:
        input: Scale and zero point of the codes.
        keepdim: Whether the positions stay as dimensions of size 1.
    """

    input: QParams
    keepdim: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", QParams(*self.input))


class GlobalAverage(Layer):
    """The mean over all positions, exact: codes ``[B, C, *spatial]`` to float32 ``[B, C, 1, ...]`` or ``[B, C]``."""

    kind: ClassVar[str] = "global_average"
    spec_type: ClassVar[type[GlobalAverageSpec]] = GlobalAverageSpec
    spec: GlobalAverageSpec

    def forward(self, x: Tensor) -> Tensor:
        positions = list(range(2, x.dim()))
        count = x.shape[2:].numel()
        # Sums of 64 bits take three times as long.
        dtype = torch.int32 if count <= _MOST_SUMMED else torch.int64
        total = x.sum(positions, keepdim=self.spec.keepdim, dtype=dtype)
        return total.float().div_(count).sub_(self.spec.input.zero_point).mul_(self.spec.input.scale)


@dataclass(frozen=True)
class AveragePoolSpec:
    """Geometry of an average pooling.

    Attributes:
        kernel_size, stride, padding: One entry for each spatial dimension; the padding is with real zeros.
        ceil_mode, count_include_pad, divisor_override: As in PyTorch.
        input: Scale and zero point of the codes; the answer has the same.
    """

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None
    input: QParams

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", QParams(*self.input))


class AveragePool(Layer):
    """Means over windows, rounded to the nearest code of the same scale: off by half a step at most."""

    kind: ClassVar[str] = "average_pool"
    spec_type: ClassVar[type[AveragePoolSpec]] = AveragePoolSpec
    spec: AveragePoolSpec

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        divisor = [spec.divisor_override] if x.dim() > 3 else []
        means = _AVERAGES[x.dim() - 3](
            x.float().sub_(spec.input.zero_point),
            spec.kernel_size, spec.stride, spec.padding, spec.ceil_mode, spec.count_include_pad, *divisor,
        )  # fmt: skip
        codes = means.round_().add_(spec.input.zero_point).clamp_(0, LARGEST_CODE)
        return codes.to(torch.uint8)


@dataclass(frozen=True)
class MaxPoolSpec:
    """Geometry of a max pooling: one entry for each spatial dimension; ``ceil_mode`` as in PyTorch."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool


class MaxPool(Layer):
    """Maxima over windows, exact: codes have the order of the values that they stand for.

    PyTorch's own max pooling takes 8-bit integers only for images of up to 127 pixels. Here the maximum is taken along
    one dimension at a time, over shifted views.

    Raises:
        ValueError: The windows are larger than the image; PyTorch refuses it as well.
    """

    kind: ClassVar[str] = "max_pool"
    spec_type: ClassVar[type[MaxPoolSpec]] = MaxPoolSpec
    spec: MaxPoolSpec

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        sizes = [self._output_size(x.shape[dim + 2], dim) for dim in range(x.dim() - 2)]
        sides: list[int] = []
        for dim in reversed(range(x.dim() - 2)):
            reach = (sizes[dim] - 1) * spec.stride[dim] + spec.dilation[dim] * (spec.kernel_size[dim] - 1) + 1
            sides += [spec.padding[dim], max(reach - spec.padding[dim] - x.shape[dim + 2], 0)]
        if any(sides):
            # No code is smaller than 0, so padding never wins against a value.
            x = F.pad(x, sides)
        for dim, size in enumerate(sizes):
            x = self._maximum(x, dim, size)
        return x.contiguous(memory_format=memory_format(x.dim()))

    def _maximum(self, x: Tensor, dim: int, size: int) -> Tensor:
        spec = self.spec
        step = spec.stride[dim]
        views = []
        for tap in range(spec.kernel_size[dim]):
            start = tap * spec.dilation[dim]
            view = x.narrow(dim + 2, start, (size - 1) * step + 1)
            views.append(view if step == 1 else _every(view, dim + 2, step))
        if len(views) == 1:
            return views[0].clone()  # every step answers memory of its own
        out = torch.maximum(views[0], views[1])
        for view in views[2:]:
            torch.maximum(out, view, out=out)
        return out

    def _output_size(self, size: int, dim: int) -> int:
        spec = self.spec
        step = spec.stride[dim]
        span = size + 2 * spec.padding[dim] - spec.dilation[dim] * (spec.kernel_size[dim] - 1) - 1
        count = (span + (step - 1 if spec.ceil_mode else 0)) // step + 1
        if spec.ceil_mode and (count - 1) * step >= size + spec.padding[dim]:
            count -= 1  # a window must start inside the image or its left padding
        if size == 0 or count < 1:
            raise ValueError(f"a side of {size} pixels is too small for windows of {spec.kernel_size}")
        return count


def _every(x: Tensor, dim: int, step: int) -> Tensor:
    index: list[slice] = [slice(None)] * x.dim()
    index[dim] = slice(None, None, step)
    return x[tuple(index)]


@dataclass(frozen=True)
class PadSpec:
    """Zero padding of codes.

    Attributes:
        pad: As :func:`torch.nn.functional.pad` takes it: last dimension first, both sides.
        input: Scale and zero point of the codes; the answer has the same.
    """

    pad: list[int]
    input: QParams

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", QParams(*self.input))


class Pad(Layer):
    """Pads with the code that stands for 0.0, exact."""

    kind: ClassVar[str] = "pad"
    spec_type: ClassVar[type[PadSpec]] = PadSpec
    spec: PadSpec

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, self.spec.pad, value=self.spec.input.zero_point)
        return padded.contiguous(memory_format=memory_format(x.dim()))


def spread(x: Tensor, stride: list[int], sides: list[int], value: float = 0.0) -> Tensor:
    """Put ``stride - 1`` values between the pixels of an image, and more around.

    Args:
        x: ``[B, C, *spatial]``, floats or codes.
        stride: For each spatial dimension.
        sides: How many values go before and behind, for each spatial dimension; negative numbers cut pixels off.
        value: What is put there.

    Returns:
        ``[B, C, *spatial']`` with ``spatial' = (spatial - 1) * stride + 1 + before + behind``.
    """
    sizes, taken, written = list(x.shape[:2]), [slice(None)] * 2, [slice(None)] * 2
    for size, step, before, behind in zip(x.shape[2:], stride, sides[::2], sides[1::2], strict=True):
        length = (size - 1) * step + 1 + before + behind
        skipped = -(before // step) if before < 0 else 0
        start = before + skipped * step
        # Of the pixels that follow, those whose place lies before the end.
        kept = min(size - skipped, (length - start + step - 1) // step) if before < 0 or behind < 0 else size
        sizes.append(length)
        taken.append(slice(skipped, skipped + kept))
        written.append(slice(start, start + (kept - 1) * step + 1, step))
    out = torch.full(sizes, value, dtype=x.dtype, device=x.device)
    out = out.contiguous(memory_format=memory_format(x.dim()))
    out[tuple(written)] = x[tuple(taken)]
    return out


@dataclass(frozen=True)
class SpreadSpec:
    """Zeros between and around the pixels of an image.

    Attributes:
        stride: From one pixel to the next, for each spatial dimension.
        pad: Before and behind, for each spatial dimension from the first to the last; negative numbers cut.
        input: Scale and zero point of the codes, which the answer has too; ``None`` for float values.
    """

    stride: list[int]
    pad: list[int]
    input: QParams | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", None if self.input is None else QParams(*self.input))


class Spread(Layer):
    """See :func:`spread`; what stands between codes is the code for 0.0, exact."""

    kind: ClassVar[str] = "spread"
    spec_type: ClassVar[type[SpreadSpec]] = SpreadSpec
    spec: SpreadSpec

    def forward(self, x: Tensor) -> Tensor:
        value = 0 if self.spec.input is None else self.spec.input.zero_point
        return spread(x, self.spec.stride, self.spec.pad, value)
