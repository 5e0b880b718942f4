"""Static quantization: ranges of activations come from calibration data, and stay 8-bit from layer to layer."""

from __future__ import annotations

from torch import nn

from mono_quant.api.method import Calibration, StaticChoices
from mono_quant.api.options import Options
from mono_quant.api.replace import Progress
from mono_quant.api.result import QuantizationResult
from mono_quant.errors import ConfigurationError


def quantize_with_calibration(
    model: nn.Module, options: Options, calibration: Calibration, choices: StaticChoices, progress: Progress | None
) -> QuantizationResult:
    """Quantize weights and activations of a module; see :func:`mono_quant.quantize`."""
    raise ConfigurationError("static quantization with calibration_data is not available in this version")
