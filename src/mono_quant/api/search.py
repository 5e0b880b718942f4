"""A search for the cheapest precision of each layer that keeps to a budget."""

from __future__ import annotations

from torch import nn

from mono_quant.api.method import Request
from mono_quant.api.options import Options
from mono_quant.api.replace import Progress
from mono_quant.api.result import QuantizationResult
from mono_quant.errors import ConfigurationError


def search_precision(
    model: nn.Module, options: Options, request: Request, progress: Progress | None
) -> QuantizationResult:
    """Quantize a module under a budget; see :func:`mono_quant.quantize`."""
    raise ConfigurationError("the search is not available in this version")
