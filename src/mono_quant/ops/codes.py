"""Steps on 8-bit codes: how a chain of them is written down, what each step means, what it answers.

A chain is text, so that it passes through ``torch.compile`` and ``torch.export`` as a constant. Values have numbers:
first the inputs, then what the steps answer, in order. Images are ``[B, C, H, W]``, channels-last in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant.core.packing import unpack_tiles
from mono_quant.errors import ConfigurationError, InputError

LARGEST_CODE: Final = 255

#: The most kernel positions of a depthwise convolution.
LARGEST_KERNEL: Final = 256

#: Constants start at multiples of this many bytes, and arrays by channel are padded to multiples of as many channels.
ALIGNMENT: Final = 64

#: Activations of :class:`ConvStep` by number. ``clamp`` only bounds; ``float`` answers float32 and applies nothing.
FINISHES: Final = ("clamp", "hardswish", "silu", "float")


class Step:
    """One step. Its parameters are its fields, integers and float32 numbers."""

    kind: ClassVar[int]

    def encode(self) -> list[int]:
        """Answer the parameters as integers; floats as the bits of a float32."""
        return [
            struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)
            for value in (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        ]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Self:
        """Undo :meth:`encode`."""
        values: list[Any] = [
            struct.unpack("<f", struct.pack("<i", number))[0] if f.type == "float" else number
            for f, number in zip(fields(cls), numbers, strict=True)  # type: ignore[arg-type]
        ]
        return cls(*values)


@dataclass(frozen=True)
class QuantizeStep(Step):
    """Float32 to codes: ``round(x * inverse) + zero``, within 0 and 255."""

    kind: ClassVar[int] = 0
    inverse: float
    zero: int


@dataclass(frozen=True)
class ConvStep(Step):
    """A convolution over all channels.

    ``v = float32(sum - offset[c]) * scale[c] + bias[c]``, where the sum is over codes and weights and padding is
    ``x_zero``; with a second input, ``v + (other - other_zero) * other_scale``. Then
    ``round(min(max(f(v) * inverse, low), high)) + zero``, half to even. With the finish ``clamp`` there is neither
    ``f`` nor ``inverse``: scales and bias are in units of output codes.

    Attributes:
        outputs: Output channels.
        weight, offset, scale, bias: Where they start in the constants, in bytes. ``weight`` is in tiles (see
            ``pack_weight``) of ``[outputs, kernel_h * kernel_w * channels]``; the others are int32, float32 and float32
            ``[outputs]``, padded to a multiple of 64.
        finish: Index into :data:`FINISHES`.
        low, high: Bounds of the codes less ``zero``.
        bounded: Whether they are tighter than 0 and 255, or sums may be huge.
        channels: Input channels.
        padding_h, padding_w, padding_bottom, padding_right: Above, left, below and right of the image.
    """

    kind: ClassVar[int] = 1
    outputs: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    x_zero: int
    weight: int
    offset: int
    scale: int
    bias: int
    finish: int
    inverse: float
    low: float
    high: float
    zero: int
    bounded: int
    other_scale: float
    other_zero: int
    channels: int
    padding_bottom: int
    padding_right: int

    def weight_of(self, constants: Tensor) -> Tensor:
        """Answer the weight as ``[outputs, channels / groups, kernel_h, kernel_w]``."""
        depth = self.kernel_h * self.kernel_w * self.channels
        shape = (-(-self.outputs // 16), -(-depth // 64), 16, 16, 4)
        tiles = _array(constants, self.weight, torch.int8, torch.Size(shape).numel()).reshape(shape)
        plain = unpack_tiles(tiles, self.outputs, depth)
        return plain.reshape(self.outputs, self.kernel_h, self.kernel_w, self.channels).permute(0, 3, 1, 2)

    @property
    def groups(self) -> int:
        return 1


@dataclass(frozen=True)
class DepthwiseStep(ConvStep):
    """A convolution of each channel by itself; ``weight`` is int8 ``[kernel_h * kernel_w, channels]``, padded too."""

    kind: ClassVar[int] = 2

    def weight_of(self, constants: Tensor) -> Tensor:
        taps, padded = self.kernel_h * self.kernel_w, _padded(self.channels)
        plain = _array(constants, self.weight, torch.int8, taps * padded).reshape(taps, padded)[:, : self.channels]
        return plain.t().reshape(self.channels, 1, self.kernel_h, self.kernel_w)

    @property
    def groups(self) -> int:
        return self.channels


@dataclass(frozen=True)
class AddStep(Step):
    """``round(min(max(a * a_scale + b * b_scale + shift, low), high)) + zero``."""

    kind: ClassVar[int] = 3
    a_scale: float
    b_scale: float
    shift: float
    low: float
    high: float
    zero: int


@dataclass(frozen=True)
class MultiplyStep(Step):
    """``round(min(max((a - a_zero) * (b - b_zero) * scale, low), high)) + zero``; one of
    the inputs may have a single pixel."""

    kind: ClassVar[int] = 4
    a_zero: int
    b_zero: int
    scale: float
    low: float
    high: float
    zero: int


@dataclass(frozen=True)
class MaxPoolStep(Step):
    """Maxima over windows; padding never wins."""

    kind: ClassVar[int] = 5
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    ceil_mode: int


@dataclass(frozen=True)
class GlobalAverageStep(Step):
    """``(sum / pixels - zero) * scale`` in float32, ``[B, C, 1, 1]`` or, without ``keepdim``, ``[B, C]``."""

    kind: ClassVar[int] = 6
    zero: int
    scale: float
    keepdim: int


@dataclass(frozen=True)
class TableStep(Step):
    """A code for each code: ``table`` is where 256 bytes start in the constants."""

    kind: ClassVar[int] = 7
    table: int


KINDS: Final[tuple[type[Step], ...]] = (
    QuantizeStep, ConvStep, DepthwiseStep, AddStep, MultiplyStep, MaxPoolStep, GlobalAverageStep, TableStep,
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A step and the numbers of the values that it reads (the second may be -1: none)."""

    step: Step
    first: int
    second: int = -1


def encode_program(inputs: int, outputs: Sequence[int], links: Sequence[Link]) -> str:
    """Write a chain of steps down for ``run_codes``.

    Args:
        inputs: How many tensors it takes; they have the numbers from 0.
        outputs: Numbers of the values that it answers; those of steps, which have the numbers after the inputs.
        links: The steps, in order.
    """
    numbers = [inputs, len(outputs), len(links), *outputs]
    for number, link in enumerate(links, inputs):
        parameters = link.step.encode()
        numbers += [link.step.kind, number, link.first, link.second, len(parameters), *parameters]
    return " ".join(map(str, numbers))


def decode_program(program: str) -> tuple[int, list[int], list[Link]]:
    """Undo :func:`encode_program`.

    Raises:
        ConfigurationError: The text is none of its answers.
    """
    try:
        numbers = [int(word) for word in program.split()]
        inputs, output_count, link_count = numbers[:3]
        outputs, at = numbers[3 : 3 + output_count], 3 + output_count
        links = []
        for _ in range(link_count):
            kind, _, first, second, count = numbers[at : at + 5]
            links.append(Link(KINDS[kind].decode(numbers[at + 5 : at + 5 + count]), first, second))
            at += 5 + count
    except (ValueError, IndexError) as error:
        raise ConfigurationError(f"the program of run_codes is damaged: {error}") from error
    return inputs, outputs, links


def run_codes(inputs: list[Tensor], constants: Tensor, program: str) -> list[Tensor]:
    """Run a chain of steps.

    Args:
        inputs: float32 or uint8 ``[B, C, H, W]``, the same ``B``.
        constants: uint8 ``[bytes]``, what the steps point into.
        program: See :func:`encode_program`.

    Returns:
        The outputs: uint8 codes or float32, channels-last where they are images.

    Raises:
        InputError: A float input holds NaN.
    """
    _, outputs, links = decode_program(program)
    values = list(inputs)
    for link in links:
        other = values[link.second] if link.second >= 0 else None
        values.append(_run(link.step, values[link.first], other, constants))
    return [_empty(values[number]).copy_(values[number]) for number in outputs]


def _run(step: Step, x: Tensor, other: Tensor | None, constants: Tensor) -> Tensor:
    match step:
        case QuantizeStep():
            if bool(x.isnan().any()):
                raise InputError("run_codes met NaN in its input; 8-bit codes have no NaN")
            return _codes(x * step.inverse, -float(step.zero), float(LARGEST_CODE - step.zero), step.zero)
        case ConvStep():
            return _convolve(step, x, other, constants)
        case AddStep():
            assert other is not None
            total = x.float() * step.a_scale + other.float() * step.b_scale + step.shift
            return _codes(total, step.low, step.high, step.zero)
        case MultiplyStep():
            assert other is not None
            product = (x.to(torch.int32) - step.a_zero) * (other.to(torch.int32) - step.b_zero)
            return _codes(product.float() * step.scale, step.low, step.high, step.zero)
        case MaxPoolStep():
            return _max_pool(step, x)
        case GlobalAverageStep():
            total = x.sum((2, 3), keepdim=bool(step.keepdim), dtype=torch.int32).float()
            return (total / x.shape[2:].numel() - step.zero) * step.scale
        case TableStep():
            return _array(constants, step.table, torch.uint8, LARGEST_CODE + 1)[x.to(torch.int32)]
    raise ConfigurationError(f"{type(step).__name__} is no step of run_codes")


def _codes(values: Tensor, low: float, high: float, zero: int) -> Tensor:
    return (values.clamp(low, high).round() + zero).to(torch.uint8)


def _convolve(step: ConvStep, x: Tensor, other: Tensor | None, constants: Tensor) -> Tensor:
    sides = [step.padding_w, step.padding_right, step.padding_h, step.padding_bottom]
    padded = F.pad(x, sides, value=step.x_zero).double()
    strides, dilations = (step.stride_h, step.stride_w), (step.dilation_h, step.dilation_w)
    # float64 holds every sum of 8-bit products exactly.
    total = F.conv2d(padded, step.weight_of(constants).double(), None, strides, 0, dilations, step.groups)
    offset, scale, bias = (
        _array(constants, at, dtype, step.outputs).reshape(1, -1, 1, 1)
        for at, dtype in ((step.offset, torch.int32), (step.scale, torch.float32), (step.bias, torch.float32))
    )
    value = (total - offset).float() * scale + bias
    if other is not None:
        value = value + (other.to(torch.int32) - step.other_zero).float() * step.other_scale
    finish = FINISHES[step.finish]
    if finish == "float":
        return value
    if finish == "hardswish":
        value = value * (value + 3).clamp(0, 6) * (1 / 6) * step.inverse
    elif finish == "silu":
        value = value / (torch.exp(-value) + 1) * step.inverse
    return _codes(value, step.low, step.high, step.zero)


def _max_pool(step: MaxPoolStep, x: Tensor) -> Tensor:
    # Float, since PyTorch's own maxima of bytes are for small images only; padding is minus infinity.
    pooled = F.max_pool2d(
        x.float(),
        (step.kernel_h, step.kernel_w),
        (step.stride_h, step.stride_w),
        (step.padding_h, step.padding_w),
        (step.dilation_h, step.dilation_w),
        bool(step.ceil_mode),
    )
    return pooled.to(torch.uint8)


def run_codes_shape(inputs: list[Tensor], constants: Tensor, program: str) -> list[Tensor]:
    """Answer the outputs of :func:`run_codes` without their values."""
    _, outputs, links = decode_program(program)
    values = list(inputs)
    for link in links:
        x, step = values[link.first], link.step
        batch, channels, height, width = x.shape
        dtype = torch.uint8
        if isinstance(step, ConvStep):
            channels, height = step.outputs, _windows(height, *_along_h(step))
            width = _windows(width, *_along_w(step))
            dtype = torch.float32 if FINISHES[step.finish] == "float" else dtype
        elif isinstance(step, MaxPoolStep):
            height = _windows(height, *_along_h(step), bool(step.ceil_mode))
            width = _windows(width, *_along_w(step), bool(step.ceil_mode))
        elif isinstance(step, GlobalAverageStep):
            shape = (batch, channels, 1, 1) if step.keepdim else (batch, channels)
            values.append(x.new_empty(shape, dtype=torch.float32))
            continue
        elif isinstance(step, MultiplyStep):
            # One of them may have one pixel a sample.
            other = values[link.second]
            height, width = max(height, other.shape[2]), max(width, other.shape[3])
        values.append(x.new_empty((batch, channels, height, width), dtype=dtype))
    return [_empty(values[number]) for number in outputs]


def _along_h(step: ConvStep | MaxPoolStep) -> tuple[int, int, int, int, int]:
    end = step.padding_bottom if isinstance(step, ConvStep) else step.padding_h
    return step.kernel_h, step.stride_h, step.padding_h, end, step.dilation_h


def _along_w(step: ConvStep | MaxPoolStep) -> tuple[int, int, int, int, int]:
    end = step.padding_right if isinstance(step, ConvStep) else step.padding_w
    return step.kernel_w, step.stride_w, step.padding_w, end, step.dilation_w


def _windows(
    size: Any, kernel: int, stride: int, padding: int, end: int, dilation: int, ceil_mode: bool = False
) -> Any:
    span = size + padding + end - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # a window starts inside the image or its left padding
    return count


def _empty(x: Tensor) -> Tensor:
    # Not contiguous(): images of one channel or one pixel already are, with other strides.
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _padded(channels: int) -> int:
    return -(-channels // ALIGNMENT) * ALIGNMENT


def _array(constants: Tensor, at: int, dtype: torch.dtype, count: int) -> Tensor:
    return constants[at : at + count * dtype.itemsize].view(dtype)
