"""Linear layers that compute in int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mono_quant.core.layer_scheme import BFLOAT16, LayerScheme
from mono_quant.core.mappers import QINT8
from mono_quant.modules.base import dequantize_codes, require_module, scheme_from_dtype
from mono_quant.modules.bfloat16 import linear_bfloat16
from mono_quant.modules.fused_pairs import activates_here, note_activated
from mono_quant.modules.gradients import Product, Stored, are_recorded, straight_through
from mono_quant.modules.inputs import FLOATS, forward_other
from mono_quant.modules.packed import PackedWeight


@dataclass(frozen=True)
class _PlainProduct(Product):
    """``linear_dynamic`` on codes, scales and zero points."""

    def compute(self, x: Tensor, bias: Tensor | None, stored: Stored, activation: str) -> Tensor:
        codes, scale, zero_point = stored
        out: Tensor = torch.ops.mono_quant.linear_dynamic.default(x, codes, scale, zero_point, bias, activation)
        return out

    def weight(self, stored: Stored) -> Tensor:
        return dequantize_codes(*stored)


@dataclass(frozen=True)
class _PackedProduct(Product):
    """``linear_dynamic_packed`` on tiles, column sums, scales and zero points."""

    out_features: int
    in_features: int

    def compute(self, x: Tensor, bias: Tensor | None, stored: Stored, activation: str) -> Tensor:
        tiles, column_sum, scale, zero_point = stored
        out: Tensor = torch.ops.mono_quant.linear_dynamic_packed.default(
            x, tiles, column_sum, scale, zero_point, bias, self.out_features, activation
        )
        return out

    def weight(self, stored: Stored) -> Tensor:
        tiles, _, scale, zero_point = stored
        codes = torch.ops.mono_quant.unpack_weight(tiles, self.out_features, self.in_features)
        return dequantize_codes(codes, scale, zero_point)


@dataclass(frozen=True)
class _FloatProduct(Product):
    """``linear_half`` or :func:`linear_bfloat16` on a weight of 16 bits."""

    kind: str

    def compute(self, x: Tensor, bias: Tensor | None, stored: Stored, activation: str) -> Tensor:
        (weight,) = stored
        assert weight is not None
        if self.kind == BFLOAT16:
            return linear_bfloat16(x, weight, bias, activation)
        out: Tensor = torch.ops.mono_quant.linear_half(x, weight, bias)
        return out

    def weight(self, stored: Stored) -> Tensor:
        (weight,) = stored
        assert weight is not None
        return weight.float()


class QuantizedLinear(PackedWeight):
    """Stands in for :class:`torch.nn.Linear` and multiplies in integers.

    Each row of the input is quantized on the fly (asymmetric, 8 bits), multiplied with the int8 weight, and scaled
    once at the end, so that a row's result never depends on the other rows. With ``dtype=torch.float16`` the weight
    is stored in half precision and the arithmetic is float32; a scheme of bfloat16 stores and multiplies bfloat16.

    Shapes: input ``[..., in_features]`` of float32, bfloat16 or float16; output ``[..., out_features]`` of the same
    dtype.

    Args:
        in_features: Size of each input row.
        out_features: Size of each output row.
        bias: Whether there is a bias.
        dtype: ``torch.qint8`` or ``torch.float16``.
        symmetric: Whether the weight has no zero points.

    A layer made this way has a weight of zeros; :meth:`from_linear` takes over the weight of a float layer.

    Attributes:
        activation: What the layer computes on top: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu`` (see
            :mod:`mono_quant.modules.fusion`).
        activates_inside: Where it does so only if its parent's ``forward`` calls it (see
            :mod:`mono_quant.modules.fused_pairs`): the names there of the layer and of the activation.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Linear

    activation: str = "none"
    activates_inside: tuple[str, str] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = QINT8,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.float_dtype = torch.get_default_dtype()
        float_bias = torch.zeros(out_features) if bias else None
        self._register_tensors((out_features, in_features), float_bias, scheme_from_dtype(dtype, symmetric))

    @classmethod
    def like(cls, module: nn.Module, scheme: LayerScheme) -> Self:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        out_features, in_features = cls.stored_weight(module).shape
        layer.in_features, layer.out_features = in_features, out_features
        weight: Tensor = module.weight  # type: ignore[assignment]
        layer.float_dtype = weight.dtype
        bias: Any = module.bias
        with torch.device("meta"):
            empty = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype)
            layer._register_tensors((out_features, in_features), empty, scheme)
        return layer

    @classmethod
    def from_linear(cls, module: nn.Linear, symmetric: bool = False, dtype: torch.dtype = QINT8) -> Self:
        """Answer a quantized copy of ``module``, which is not modified.

        Raises:
            InputTypeError: ``module`` is not a linear layer, or ``dtype`` not one of this class.
            QuantizationError: Its weight holds NaN or infinite values.
        """
        return cls.from_float(require_module(module, nn.Linear), scheme_from_dtype(dtype, symmetric))

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in FLOATS or not input.dim() or input.shape[-1] != self.in_features:
            return forward_other(self, input, self.in_features, self.forward)
        # Not by attribute: nn.Module finds a buffer only after it has looked everywhere else.
        buffers = self._buffers
        bias = buffers.get("bias")
        if bias is None:
            bias = self.bias  # there is none, or someone made it a parameter
        recorded = are_recorded(input, bias)
        activation, names = self.activation, self.activates_inside
        # Where derivatives are recorded, layer and activation keep for the way back what they would keep apart.
        if names is not None and (recorded or not activates_here(self, names)):
            activation = "none"
        if recorded:
            return self._multiply_with_gradient(input, bias, activation)
        scale = buffers.get("weight_scale")
        packed = None if scale is None else self._packed_weight()
        if packed is None:
            out = self._multiply_plain(input, bias, activation)
        else:
            tiles, column_sum = packed
            out = torch.ops.mono_quant.linear_dynamic_packed.default(
                input, tiles, column_sum, scale, buffers.get("weight_zero_point"), bias, self.out_features, activation
            )
        if names is not None and activation != "none":
            note_activated(out)
        return out

    def _multiply_plain(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        buffers = self._buffers
        scale = buffers.get("weight_scale")
        if scale is None and self.scheme.kind == BFLOAT16:
            return linear_bfloat16(input, self.codes, bias, activation)
        if scale is None:
            half: Tensor = torch.ops.mono_quant.linear_half(input, buffers["weight"], bias)
            return half
        plain: Tensor = torch.ops.mono_quant.linear_dynamic.default(
            input, buffers["weight"], scale, buffers.get("weight_zero_point"), bias, activation
        )
        return plain

    def _multiply_with_gradient(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        buffers = self._buffers
        scale, zero_point = buffers.get("weight_scale"), buffers.get("weight_zero_point")
        if scale is None:
            return straight_through(_FloatProduct(self.scheme.kind), input, bias, (self.codes,), activation)
        packed = self._packed_weight()
        if packed is None:
            stored = (self._buffers["weight"], scale, zero_point)
            return straight_through(_PlainProduct(), input, bias, stored, activation)
        product = _PackedProduct(self.out_features, self.in_features)
        return straight_through(product, input, bias, (*packed, scale, zero_point), activation)

    def _matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def to_float(self) -> nn.Module:
        return build_linear(self.weight, self.bias, self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}" + ("" if self.activation == "none" else f", then {self.activation}")
        )


def build_linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """Answer an ``nn.Linear`` that holds ``weight`` (``[out, in]``) and a copy of ``bias``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear.train(training)


def quantize_linear_module(module: nn.Linear, dtype: torch.dtype = QINT8, symmetric: bool = False) -> QuantizedLinear:
    """Answer a :class:`QuantizedLinear` with the weight of ``module``, which is not modified.

    Args:
        module: The float layer.
        dtype: ``torch.qint8`` or ``torch.float16``.
        symmetric: Whether the weight is quantized without zero points.

    Raises:
        InputTypeError: ``module`` is not a linear layer, or ``dtype`` is neither of these.
        QuantizationError: The weight holds NaN or infinite values.
    """
    return QuantizedLinear.from_linear(module, symmetric, dtype)
