"""Linear layers: from codes with fixed scales, or from float rows with scales of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mono_quant.core import LayerScheme
from mono_quant.graph.arithmetic import Activation, QParams, round_to_codes
from mono_quant.graph.layers.layer import Layer
from mono_quant.graph.layers.packed import PackedLayer
from mono_quant.modules import QuantizedLinear


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer on codes.

    Attributes:
        input: Scale and zero point of the input's codes.
        output: Those of the answer; ``None`` for a float32 answer.
        activation: See :class:`Activation`.
    """

    input: QParams
    output: QParams | None
    activation: Activation = field(default=Activation())

    def __post_init__(self) -> None:
        for name, kind in (("input", QParams), ("output", QParams), ("activation", Activation)):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else kind(*value))


def linear_reference(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, spec: LinearSpec) -> Tensor:
    """Specification of :class:`StaticLinear`, for any device.

    Args:
        x: uint8 codes ``[..., K]``.
        weight: int8 codes ``[N, K]``.
        weight_scale: float32 ``[N]``.
        bias: float32 ``[N]`` or ``None``.
        spec: The rest.

    Returns:
        uint8 codes, or float32 values where ``spec.output`` is ``None``; ``[..., N]``.
    """
    total = torch.matmul(x.double() - spec.input.zero_point, weight.double().t())
    values = total.float().mul_(weight_scale * spec.input.scale)
    if bias is not None:
        values += bias
    values = spec.activation(values)
    return values if spec.output is None else round_to_codes(values, spec.output)


class StaticLinear(PackedLayer):
    """Multiplies codes with int8 weights, activates and rounds once.

    Buffers: ``weight`` int8 ``[N, K]``, ``weight_scale`` float32 ``[N]``, ``bias`` float32 ``[N]``.
    """

    kind: ClassVar[str] = "linear"
    spec_type: ClassVar[type[LinearSpec]] = LinearSpec
    spec: LinearSpec
    bias: Tensor | None

    def __init__(self, spec: LinearSpec, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(spec, weight=weight, weight_scale=weight_scale, bias=bias)
        self._no_zero_points = torch.zeros(weight.shape[0], dtype=torch.int64)
        bounds = None if spec.output is None else spec.activation.code_bounds(spec.output)
        self._clamp = None if bounds in (None, (0, 255)) else bounds
        self._fused = bounds is not None or spec.activation.name == "none"

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed_weight(x)
        if packed is None or x.numel() == 0:
            return self.reference(x)
        out_scale, out_zero = self.spec.output if self._fused and self.spec.output is not None else (1.0, 0)
        in_codes = self._fused and self.spec.output is not None
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, *self.spec.input, packed, self.weight_scale, self._no_zero_points, self.bias, out_scale, out_zero,
            torch.uint8 if in_codes else torch.float32, "none", [], "",
        )  # fmt: skip
        if in_codes:
            return out if self._clamp is None else out.clamp_(*self._clamp)
        out = self.spec.activation(out)
        return out if self.spec.output is None else round_to_codes(out, self.spec.output)

    def reference(self, x: Tensor) -> Tensor:
        """Answer what :func:`linear_reference` specifies."""
        return linear_reference(x, self.codes, self.weight_scale, self.bias, self.spec)

    def _pack(self, weight: Tensor, shape: list[int]) -> Tensor:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, shape)
        return packed

    def _unpack(self, packed: Tensor) -> Tensor:
        return packed.to_dense().t().contiguous()


@dataclass(frozen=True)
class DynamicLinearSpec:
    """A linear layer on float rows.

    Attributes:
        in_features: Size of each input row.
        out_features: Size of each output row.
        bias: Whether there is a bias.
        activation: See :class:`Activation`.
    """

    in_features: int
    out_features: int
    bias: bool
    activation: Activation = field(default=Activation())

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", Activation(*self.activation))


class DynamicLinear(Layer):
    """A :class:`~mono_quant.modules.QuantizedLinear` inside a graph: each row gets a scale of its own."""

    kind: ClassVar[str] = "dynamic_linear"
    spec_type: ClassVar[type[DynamicLinearSpec]] = DynamicLinearSpec
    spec: DynamicLinearSpec

    def __init__(self, spec: DynamicLinearSpec, linear: QuantizedLinear) -> None:
        super().__init__(spec)
        self.linear = linear

    @classmethod
    def from_float(cls, linear: nn.Linear, activation: Activation) -> Self:
        """Answer the layer for a float one, which is not modified."""
        spec = DynamicLinearSpec(linear.in_features, linear.out_features, linear.bias is not None, activation)
        return cls(spec, QuantizedLinear.from_float(linear, LayerScheme()))

    @classmethod
    def from_description(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        made = DynamicLinearSpec(**spec)
        if [*tensors["linear.weight"].shape] != [made.out_features, made.in_features]:
            raise ValueError(f"a weight of shape {[*tensors['linear.weight'].shape]}")
        return cls(made, QuantizedLinear(made.in_features, made.out_features, made.bias, symmetric=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.spec.activation(self.linear(x))
