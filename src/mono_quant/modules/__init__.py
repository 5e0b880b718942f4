"""Drop-in layers: where quantized arithmetic happens in a model. Factories never modify the original."""

from mono_quant import ops as ops  # registers the operators that the layers call
from mono_quant.modules.base import QuantizedModule
from mono_quant.modules.linear import QuantizedLinear, quantize_linear_module
from mono_quant.modules.registry import counterpart, counterpart_for_scheme, register
from mono_quant.modules.weight_only import WeightOnlyLinear, quantize_linear_module_int4

__all__ = [
    "QuantizedLinear",
    "QuantizedModule",
    "WeightOnlyLinear",
    "counterpart",
    "counterpart_for_scheme",
    "quantize_linear_module",
    "quantize_linear_module_int4",
    "register",
]
