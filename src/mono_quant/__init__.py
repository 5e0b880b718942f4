"""mono_quant makes a PyTorch model smaller and faster with one call, and proves that it still works.

Example:
    result = mono_quant.quantize(model)
    result.model                          # still an nn.Module
    result.save("model.safetensors")      # plain tensors, a versioned header, no pickle
"""

from mono_quant._version import __version__
from mono_quant.api import (
    BackendError,
    BudgetError,
    CheckpointError,
    ConfigurationError,
    InputError,
    InputTypeError,
    MonoQuantError,
    QuantizationError,
    QuantizationResult,
    ValidationError,
    dequantize_model,
    dynamic_quantize,
    quantize,
    revert_to_standard_modules,
    sensitivity,
    static_quantize,
)
from mono_quant.config import QuantizationConfig
from mono_quant.core import LayerInfo, LayerScheme, QuantizationInfo, QuantizedTensor
from mono_quant.io import load_model, save_model
from mono_quant.modules import fuse_pair
from mono_quant.ops import SystemConfig, show_config, system_config
from mono_quant.report import (
    SearchPoint,
    SearchReport,
    SensitivityReport,
    ValidationResult,
    check_accuracy_warnings,
    validate_quantization,
)

__all__ = [
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ConfigurationError",
    "InputError",
    "InputTypeError",
    "LayerInfo",
    "LayerScheme",
    "MonoQuantError",
    "QuantizationConfig",
    "QuantizationError",
    "QuantizationInfo",
    "QuantizationResult",
    "QuantizedTensor",
    "SearchPoint",
    "SearchReport",
    "SensitivityReport",
    "SystemConfig",
    "ValidationError",
    "ValidationResult",
    "__version__",
    "check_accuracy_warnings",
    "dequantize_model",
    "dynamic_quantize",
    "fuse_pair",
    "load_model",
    "quantize",
    "revert_to_standard_modules",
    "save_model",
    "sensitivity",
    "show_config",
    "static_quantize",
    "system_config",
    "validate_quantization",
]
