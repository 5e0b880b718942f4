"""The shorter calls that mono-quant 1.1 has beside ``quantize``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.api.options import Selectors
from mono_quant.api.quantize import quantize
from mono_quant.config import QuantizationConfig
from mono_quant.core.mappers import QINT8


def dynamic_quantize(
    model: nn.Module | Mapping[str, Tensor],
    dtype: torch.dtype = QINT8,
    symmetric: bool = False,
    per_channel: bool = True,
    config: QuantizationConfig | None = None,
    *,
    include: Selectors | None = None,
    skip: Selectors | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
    skip_layer_types: Selectors | None = None,
    skip_layer_names: Iterable[str] | None = None,
    skip_param_threshold: int = 0,
) -> tuple[Any, list[str]]:
    """Quantize without calibration data; the shorter form of :func:`quantize` that mono-quant 1.1 has.

    Returns:
        The quantized copy, and the names of the layers with weights that stayed in float.

    Raises:
        As :func:`quantize`.
    """
    result = quantize(
        model, dtype=dtype, symmetric=symmetric, per_channel=per_channel, config=config, include=include, skip=skip,
        modules_to_not_convert=modules_to_not_convert, skip_layer_types=skip_layer_types,
        skip_layer_names=skip_layer_names, min_parameters=skip_param_threshold,
    )  # fmt: skip
    return result.model, result.info.skipped_layers
