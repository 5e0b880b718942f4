"""The public calls: quantize a model, take a quantization back, and what they answer."""

from mono_quant.api.options import Selector, Selectors
from mono_quant.api.quantize import quantize
from mono_quant.api.result import QuantizationResult
from mono_quant.api.revert import dequantize_model
from mono_quant.api.sensitivity import sensitivity
from mono_quant.api.shorthands import dynamic_quantize, static_quantize
from mono_quant.errors import (
    BackendError,
    BudgetError,
    CheckpointError,
    ConfigurationError,
    InputError,
    InputTypeError,
    MonoQuantError,
    QuantizationError,
    ValidationError,
)
from mono_quant.modules import revert_to_standard_modules

__all__ = [
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ConfigurationError",
    "InputError",
    "InputTypeError",
    "MonoQuantError",
    "QuantizationError",
    "QuantizationResult",
    "Selector",
    "Selectors",
    "ValidationError",
    "dequantize_model",
    "dynamic_quantize",
    "quantize",
    "revert_to_standard_modules",
    "sensitivity",
    "static_quantize",
]
