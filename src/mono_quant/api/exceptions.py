"""The exceptions under the path that mono-quant 1.1 gives them; :mod:`mono_quant.errors` is their home."""

from mono_quant.errors import (
    ConfigurationError,
    InputError,
    MonoQuantError,
    QuantizationError,
    ValidationError,
)

__all__ = ["ConfigurationError", "InputError", "MonoQuantError", "QuantizationError", "ValidationError"]
