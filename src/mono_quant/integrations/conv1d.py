"""The linear layer of GPT-2 and its kin in transformers, whose weight is stored ``[in, out]``."""

from __future__ import annotations

from typing import Final, Self

import torch
from torch import Tensor, nn

from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.mappers import QINT8
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.errors import InputTypeError
from mono_quant.modules.base import scheme_from_dtype
from mono_quant.modules.linear import QuantizedLinear
from mono_quant.modules.registry import register

#: By name, so that transformers need not be installed, nor imported before it is used.
CONV1D: Final = "transformers.pytorch_utils.Conv1D"


class QuantizedConv1D(QuantizedLinear):
    """Stands in for ``transformers.pytorch_utils.Conv1D`` and multiplies in integers.

    The codes are stored ``[out, in]`` as in every other linear layer, with a scale per output; ``weight`` reads as
    the original does, ``[in, out]``.

    Shapes: input ``[..., nx]`` of float32, bfloat16 or float16; output ``[..., nf]`` of the same dtype.
    """

    @property
    def nf(self) -> int:
        """Size of each output row."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Size of each input row."""
        return self.in_features

    @classmethod
    def _require_float_type(cls, module: nn.Module) -> None:
        if not any(f"{base.__module__}.{base.__qualname__}" == CONV1D for base in type(module).__mro__):
            raise InputTypeError(f"{cls.__name__} replaces {CONV1D}, found {type(module).__name__}")

    @classmethod
    def stored_weight(cls, module: nn.Module) -> Tensor:
        return super().stored_weight(module).t()

    @classmethod
    def quantize_weight(cls, module: nn.Module, scheme: LayerScheme) -> QuantizedTensor | Tensor:
        quantized = super().quantize_weight(module, scheme)
        return quantized.contiguous() if isinstance(quantized, Tensor) else quantized

    @classmethod
    def from_conv1d(cls, module: nn.Module, dtype: torch.dtype = QINT8, symmetric: bool = False) -> Self:
        """Answer a quantized copy of ``module``, which is not modified.

        Raises:
            InputTypeError: ``module`` is not transformers' ``Conv1D``, or ``dtype`` not one of this class.
            QuantizationError: Its weight holds NaN or infinite values.
        """
        return cls.from_float(module, scheme_from_dtype(dtype, symmetric))

    @property
    def weight(self) -> Tensor:
        """The weight ``[in, out]`` in :attr:`float_dtype`, computed at each reading."""
        return super().weight.t()

    def to_float(self) -> nn.Module:
        # Optional: whoever holds such a layer has transformers installed.
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer: nn.Module = Conv1D(self.nf, self.nx)  # type: ignore[no-untyped-call]
        weight = self.weight.contiguous()
        bias = weight.new_zeros(self.nf) if self.bias is None else self.bias.clone()
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        return layer.train(self.training)


register(CONV1D, QuantizedConv1D)
