"""Linear layers whose weights are packed into few bits while the arithmetic stays in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from mono_quant.core.layer_scheme import WEIGHT_ONLY, LayerScheme
from mono_quant.core.packing import pack_int32, unpack_int32
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.core.quantizers import quantize_weight_groupwise
from mono_quant.errors import ConfigurationError, InputTypeError
from mono_quant.modules.base import QuantizedModule, ordinary_tensors, require_module
from mono_quant.modules.gradients import Product, Stored, are_recorded, straight_through
from mono_quant.modules.inputs import FLOATS, forward_other
from mono_quant.modules.linear import build_linear


@dataclass(frozen=True)
class _WeightOnlyProduct(Product):
    """``linear_weight_only`` on packed codes, scales and zero points."""

    in_features: int
    bits: int
    group_size: int

    def compute(self, x: Tensor, bias: Tensor | None, stored: Stored, activation: str) -> Tensor:
        packed, scale, zero_point = stored
        out: Tensor = torch.ops.mono_quant.linear_weight_only.default(
            x, packed, scale, zero_point, bias, self.in_features, self.bits, self.group_size
        )
        return out

    def weight(self, stored: Stored) -> Tensor:
        packed, scale, zero_point = stored
        assert packed is not None
        assert scale is not None
        codes = unpack_int32(packed, self.bits, self.in_features)
        return QuantizedTensor(codes, scale, zero_point, 0, self.group_size, self.bits).dequantize()


class WeightOnlyLinear(QuantizedModule):
    """Stands in for :class:`torch.nn.Linear` with weights of 4 or 8 bits in groups that share one scale.

    Buffers, as in a checkpoint: ``weight_packed`` int32 ``[out, ceil(in * bits / 32)]``, ``weight_scale`` float32
    ``[out, in / group_size]``, ``weight_zero_point`` int8 of that shape when asymmetric, ``weight_shape`` int64
    ``[2]`` and ``bias``.

    Shapes: input ``[..., in_features]`` of float32, bfloat16 or float16; output ``[..., out_features]`` of the same
    dtype. Products are computed in float32.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Linear

    in_features: int
    out_features: int
    weight_packed: Tensor
    weight_shape: Tensor

    @classmethod
    def like(cls, module: nn.Module, scheme: LayerScheme) -> Self:
        if scheme.kind != WEIGHT_ONLY:
            raise ConfigurationError(f"{cls.__name__} stores {WEIGHT_ONLY} schemes, found {scheme.kind}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight = cls.stored_weight(module)
        out_features, in_features = weight.shape
        layer.in_features, layer.out_features = in_features, out_features
        layer.float_dtype = weight.dtype
        layer.scheme = scheme
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        with torch.device("meta"):
            words = -(-in_features * scheme.bits // 32)
            groups = in_features // layer.group_size if in_features else 0
            layer.set_tensor("weight_packed", torch.empty(out_features, words, dtype=torch.int32))
            layer.set_tensor("weight_scale", torch.empty(out_features, groups))
            zero_point = None if scheme.symmetric else torch.empty(out_features, groups, dtype=torch.int8)
            layer.set_tensor("weight_zero_point", zero_point)
            layer.set_tensor("bias", None if bias is None else torch.empty_like(bias, device="meta"))
        layer.set_tensor("weight_shape", torch.tensor([out_features, in_features]))
        return layer

    @property
    def group_size(self) -> int:
        """Inputs that share one scale; all of them where the scheme is per channel."""
        return self.scheme.group_size or max(1, self.in_features)

    @classmethod
    def quantize_weight(cls, module: nn.Module, scheme: LayerScheme) -> QuantizedTensor:
        weight = cls.stored_weight(module)
        group_size = scheme.group_size or max(1, weight.shape[1])
        with ordinary_tensors():
            return quantize_weight_groupwise(weight, group_size, scheme.symmetric, scheme.bits)

    def _set_weight(self, weight: QuantizedTensor | Tensor) -> None:
        assert isinstance(weight, QuantizedTensor)
        self.set_tensor("weight_packed", pack_int32(weight.codes, self.scheme.bits))
        self.set_tensor("weight_scale", weight.scale)
        self.set_tensor("weight_zero_point", weight.zero_point)
        self.set_tensor("weight_shape", torch.tensor(weight.shape, device=weight.device))

    @property
    def codes(self) -> Tensor:
        return self.weight_packed

    def _check_new_codes(self, value: Tensor) -> None:
        raise InputTypeError(
            f"the weight of a {type(self).__name__} is stored in words of {self.scheme.bits}-bit codes and cannot be "
            f"set to a {type(value).__name__} of {value.dtype}",
            suggestion="Change the float layer and quantize it again.",
        )

    @property
    def _quantized_weight(self) -> QuantizedTensor:
        assert self.weight_scale is not None
        codes = unpack_int32(self.weight_packed, self.scheme.bits, self.in_features)
        return QuantizedTensor(codes, self.weight_scale, self.weight_zero_point, 0, self.group_size, self.scheme.bits)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in FLOATS or not input.dim() or input.shape[-1] != self.in_features:
            return forward_other(self, input, self.in_features, self.forward)
        buffers = self._buffers
        bias = buffers["bias"] if "bias" in buffers else self.bias  # noqa: SIM401 (reads the attribute only then)
        if are_recorded(input, bias):
            stored = (buffers["weight_packed"], buffers["weight_scale"], buffers.get("weight_zero_point"))
            product = _WeightOnlyProduct(self.in_features, self.scheme.bits, self.group_size)
            return straight_through(product, input, bias, stored)
        out: Tensor = torch.ops.mono_quant.linear_weight_only.default(
            input, buffers["weight_packed"], buffers["weight_scale"], buffers.get("weight_zero_point"),
            bias, self.in_features, self.scheme.bits, self.group_size,
        )  # fmt: skip
        return out

    def to_float(self) -> nn.Module:
        return build_linear(self.weight, self.bias, self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}"
        )


def quantize_linear_module_int4(module: nn.Linear, group_size: int = 128, symmetric: bool = True) -> WeightOnlyLinear:
    """Answer a :class:`WeightOnlyLinear` of 4 bits with the weight of ``module``, which is not modified.

    Raises:
        InputTypeError: ``module`` is not a linear layer.
        ConfigurationError: ``group_size`` does not divide its ``in_features``.
        QuantizationError: The weight holds NaN or infinite values.
    """
    scheme = LayerScheme(WEIGHT_ONLY, bits=4, symmetric=symmetric, group_size=group_size)
    return WeightOnlyLinear.from_float(require_module(module, nn.Linear), scheme)
