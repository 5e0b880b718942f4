"""Convolutions from codes to codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import lt
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant.core.packing import TILE_IN, TILE_OUT, pack_tiles, unpack_tiles
from mono_quant.errors import InputError
from mono_quant.graph.arithmetic import LARGEST_CODE, Activation, QParams, memory_format, round_to_codes
from mono_quant.graph.layers.packed import MAX_EXACT_TAPS, PackedLayer
from mono_quant.ops.codes import ALIGNMENT, LARGEST_KERNEL

_FLOAT_CONVS: Final[tuple[Callable[..., Tensor], ...]] = (F.conv1d, F.conv2d, F.conv3d)

# oneDNN's names of what it can apply to the sums of a two-dimensional convolution.
_POST_OPS: Final = {"hardswish": "hardswish", "silu": "swish"}


@dataclass(frozen=True)
class ConvSpec:
    """A convolution of one to three spatial dimensions, what it adds, and what it applies.

    Attributes:
        stride, padding, dilation: One entry for each spatial dimension; the padding is with real zeros.
        groups: Channel groups.
        input: Scale and zero point of the input's codes.
        output: Those of the answer; ``None`` for a float32 answer.
        other: Those of the tensor that is added before the activation; ``None`` if nothing is.
        activation: See :class:`Activation`.
        overwrite: Whether the tensor that is added may be written to.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    input: QParams
    output: QParams | None
    other: QParams | None = None
    activation: Activation = field(default=Activation())
    overwrite: bool = False

    def __post_init__(self) -> None:
        # A checkpoint answers lists for the named tuples.
        for name, kind in (("input", QParams), ("output", QParams), ("other", QParams), ("activation", Activation)):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else kind(*value))


def conv_reference(
    x: Tensor, other: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, spec: ConvSpec
) -> Tensor:
    """Specification of :class:`QuantizedConvolution`, for any device.

    Args:
        x: uint8 codes ``[B, C, *spatial]``.
        other: uint8 codes of the answer's shape, or ``None``.
        weight: int8 codes ``[O, C / groups, *kernel]``.
        weight_scale: float32 ``[O]``.
        bias: float32 ``[O]`` or ``None``.
        spec: The rest.

    Returns:
        uint8 codes, or float32 values where ``spec.output`` is ``None``; ``[B, O, *spatial']``.
    """
    convolve = _FLOAT_CONVS[x.dim() - 3]
    centred = x.double() - spec.input.zero_point
    # float64 holds every sum of 8-bit products exactly.
    total = convolve(centred, weight.double(), None, spec.stride, spec.padding, spec.dilation, spec.groups)
    channels = [1, -1] + [1] * (x.dim() - 2)
    values = total.float().mul_((weight_scale * spec.input.scale).reshape(channels))
    if bias is not None:
        values += bias.reshape(channels)
    if other is not None:
        assert spec.other is not None
        values += (other.float() - spec.other.zero_point) * spec.other.scale
    values = spec.activation(values)
    if spec.output is not None:
        values = round_to_codes(values, spec.output)
    return values.contiguous(memory_format=memory_format(x.dim()))


@dataclass(frozen=True)
class _Plan:
    """How oneDNN is called.

    Attributes:
        post_op, arguments: What it applies to the sums.
        clamp: Bounds of the codes, applied afterwards.
        in_float: Whether it answers float32, and activation and rounding follow.
    """

    post_op: str = "none"
    arguments: list[float] = field(default_factory=list)
    clamp: tuple[int, int] | None = None
    in_float: bool = False


def _plan(spec: ConvSpec) -> _Plan:
    if spec.output is None:
        return _Plan(in_float=True)
    activation = spec.activation
    # In one or three dimensions, or after an addition, oneDNN has few functions or none.
    has_post_ops = len(spec.stride) == 2 and spec.other is None
    bounds = activation.code_bounds(spec.output)
    if bounds is None:
        return _Plan(_POST_OPS[activation.name]) if has_post_ops else _Plan(in_float=True)
    if bounds == (0, LARGEST_CODE):
        return _Plan()  # the codes' own limits do it
    if activation.name == "relu" and len(spec.stride) == 2:
        return _Plan("relu")
    if has_post_ops:
        return _Plan("hardtanh", [activation.low, activation.high])
    # Clamping rounded codes gives the codes of the clamped values: both are monotonic.
    return _Plan(clamp=bounds)


class QuantizedConvolution(PackedLayer):
    """Convolves codes with int8 weights, adds, activates and rounds once.

    Buffers: ``weight`` int8 ``[O, C / groups, *kernel]``, ``weight_scale`` float32 ``[O]``, ``bias`` float32 ``[O]``.

    Raises:
        ValueError: The kernel is larger than the image with its padding.
    """

    kind: ClassVar[str] = "conv"
    spec_type: ClassVar[type[ConvSpec]] = ConvSpec
    spec: ConvSpec
    bias: Tensor | None

    def __init__(self, spec: ConvSpec, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(spec, weight=weight, weight_scale=weight_scale, bias=bias)
        self._shape = weight.shape
        self._no_zero_points = torch.zeros(weight.shape[0], dtype=torch.int64)
        self._plan = _plan(spec)
        sides = zip(weight.shape[2:], spec.padding, spec.dilation, strict=False)
        self._least_sides = tuple(max(1, dilation * (taps - 1) + 1 - 2 * pad) for taps, pad, dilation in sides)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        self._require_room(x)
        packed = self._packed_weight(x)
        plan, spec = self._plan, self.spec
        if packed is None or x.numel() == 0 or (other is not None and (plan.in_float or x.dim() != 4)):
            return self.reference(x, other)
        scale, zero_point, dtype = (1.0, 0, torch.float32)
        if spec.output is not None and not plan.in_float:
            scale, zero_point, dtype = (*spec.output, torch.uint8)
        out: Tensor
        if other is None:
            out = _QCONVS[x.dim() - 3](
                x, *spec.input, packed, self.weight_scale, self._no_zero_points, self.bias, spec.stride, spec.padding,
                spec.dilation, spec.groups, scale, zero_point, dtype, plan.post_op, plan.arguments, "",
            )  # fmt: skip
        else:
            assert spec.other is not None
            # oneDNN adds to what the answer's memory holds.
            target = other if spec.overwrite else other.clone(memory_format=torch.preserve_format)
            out = torch.ops.onednn.qconv2d_pointwise.binary(
                x, *spec.input, packed, self.weight_scale, self._no_zero_points, target, self.bias, spec.stride,
                spec.padding, spec.dilation, spec.groups, scale, zero_point, dtype, *spec.other, "sum", 1.0,
                plan.post_op, [], "",
            )  # fmt: skip
        if plan.clamp is not None:
            out.clamp_(*plan.clamp)
        if plan.in_float:
            out = spec.activation(out)
            return out if spec.output is None else round_to_codes(out, spec.output)
        return out

    def _require_room(self, x: Tensor) -> None:
        # oneDNN divides by the stride towards zero: it finds a window, and answers numbers, where there is none.
        if torch.compiler.is_compiling():
            return  # a comparison of sizes that may vary would narrow the compiled program
        if any(map(lt, x.shape[2:], self._least_sides)):
            raise ValueError(
                f"an image of {list(x.shape[2:])} is too small for a kernel of {list(self._shape[2:])}: it must have "
                f"{list(self._least_sides)} pixels"
            )

    def reference(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Answer what :func:`conv_reference` specifies."""
        return conv_reference(x, other, self.codes, self.weight_scale, self.bias, self.spec)

    def is_depthwise(self) -> bool:
        """Say whether each channel is convolved by itself, once."""
        return self._shape[1] == 1 and self.spec.groups == self._shape[0] > 1

    def has_tiles(self) -> bool:
        """Say whether the native kernels have a layout for the layer."""
        spec = self.spec
        plain = spec.groups == 1 or (self.is_depthwise() and math.prod(self._shape[2:]) <= LARGEST_KERNEL)
        answers = spec.output is not None or spec.activation.name == "none"
        bounded = spec.other is None or spec.activation.name in ("none", "relu", "clamp")
        return len(self._shape) == 4 and plain and answers and bounded and math.prod(self._shape[1:]) <= MAX_EXACT_TAPS

    def tiles_size(self) -> int:
        """Answer the bytes of :meth:`tiles`."""
        outputs, inputs = self._shape[0], math.prod(self._shape[1:])
        if self.is_depthwise():
            return inputs * (-(-outputs // ALIGNMENT) * ALIGNMENT)
        return -(-outputs // TILE_OUT) * TILE_OUT * -(-inputs // TILE_IN) * TILE_IN

    def tiles(self) -> Tensor:
        """Answer the weight as the native kernels want it; see :class:`mono_quant.ops.codes.ConvStep`."""
        weight = self.codes
        if self.is_depthwise():
            rows = weight.flatten(1).t()
            return F.pad(rows, (0, -rows.shape[1] % ALIGNMENT)).contiguous()
        return pack_tiles(weight.permute(0, 2, 3, 1).flatten(1).contiguous())

    def _untile(self, tiles: Tensor) -> Tensor:
        outputs, inputs, *kernel = self._shape
        if self.is_depthwise():
            return tiles[:, :outputs].t().reshape(self._shape).contiguous()
        plain = unpack_tiles(tiles, outputs, math.prod(self._shape[1:]))
        return plain.reshape(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()

    def _exported_weight(self) -> Tensor | None:
        packed = super()._exported_weight()
        if packed is not None and len(self._shape) != 4:
            # PyTorch cannot tell the shape of these operators' answers, and stand-ins cannot be unpacked.
            raise InputError(
                f"a convolution with a kernel of {list(self._shape[2:])} has run on oneDNN, where torch.export follows "
                "those of two dimensions only",
                suggestion="Export a copy, which has not run: copy.deepcopy(model).",
            )
        return packed

    def _pack(self, weight: Tensor, shape: list[int]) -> Tensor:
        spec = self.spec
        # The layout depends on whether the input has a zero point; with another one oneDNN would reorder at each call.
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            weight, self.weight_scale, *spec.input, spec.stride, spec.padding, spec.dilation, spec.groups, shape
        )
        return packed

    def _unpack(self, packed: Tensor) -> Tensor:
        return packed.to_dense().reshape(self._shape).contiguous()


_QCONVS: Final[tuple[Callable[..., Tensor], ...]] = (
    torch.ops.onednn.qconv1d_pointwise,
    torch.ops.onednn.qconv2d_pointwise,
    torch.ops.onednn.qconv3d_pointwise,
)
