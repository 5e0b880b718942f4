"""The shorter calls that mono-quant 1.1 has beside ``quantize``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.api.options import Selectors
from mono_quant.api.quantize import quantize
from mono_quant.api.static import DEFAULT_SAMPLES
from mono_quant.config import QuantizationConfig
from mono_quant.core.mappers import QINT8
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import InputError

# What mono-quant 1.1 groups 4-bit weights by.
_DEFAULT_GROUP_SIZE: Final = 128


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


def static_quantize(
    model: nn.Module,
    calibration_data: Any,
    dtype: torch.dtype = QINT8,
    symmetric: bool = False,
    per_channel: bool = True,
    layer_types: Selectors | None = None,
    skip_types: Selectors | None = None,
    layer_names: Iterable[str] | None = None,
    skip_names: Iterable[str] | None = None,
    num_calibration_samples: int = DEFAULT_SAMPLES,
    config: QuantizationConfig | None = None,
    on_failure: str = "error",
    run_validation: bool = True,
    modules_to_not_convert: Iterable[str] | None = None,
    skip_layer_types: Selectors | None = None,
    skip_layer_names: Iterable[str] | None = None,
    skip_param_threshold: int = 0,
    group_size: int = _DEFAULT_GROUP_SIZE,
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> tuple[nn.Module, QuantizationInfo]:
    """Quantize with calibration data; the shorter form of :func:`quantize` that mono-quant 1.1 has.

    Args:
        model: A module; not touched.
        calibration_data: As :func:`quantize` takes it. It is not read where ``dtype`` or ``config`` ask for float16.
        symmetric: Of the weights where they have 4 bits. With 8 bits the weights of static layers are symmetric and
            activations have zero points, so that ``False``, the default of 1.1, and ``True`` mean the same.
        group_size: Inputs that share one scale where ``config`` asks for 4 bits; the default is the widest of 128, 64
            and 32 that divides a layer's inputs. Otherwise there is one scale for each output channel, and a number
            other than the default is answered with a warning.
        dtype, per_channel, layer_types, skip_types, layer_names, skip_names, num_calibration_samples, config,
            on_failure, run_validation, modules_to_not_convert, skip_layer_types, skip_layer_names,
            skip_param_threshold, accuracy_warning, sqnr_warning_threshold, sqnr_error_threshold: As :func:`quantize`
            takes them.

    Returns:
        The quantized model, and what was done.

    Raises:
        InputError: There is no calibration data.
        As :func:`quantize`.
    """
    chosen = QuantizationConfig.from_kwargs(config) if config is not None else None
    half = dtype == torch.float16 if chosen is None else chosen.bits == 16 or chosen.dtype == torch.float16
    bits = 8 if chosen is None else chosen.bits
    if calibration_data is None and not half:
        raise InputError(
            "static_quantize needs calibration_data, found None", suggestion="Use dynamic_quantize, which needs none."
        )
    if chosen is not None and chosen.symmetric is not None:
        symmetric = chosen.symmetric
    result = quantize(
        model,
        bits=bits if not half else 16,
        calibration_data=None if half else calibration_data,
        num_calibration_samples=None if half else num_calibration_samples,
        symmetric=symmetric if bits == 4 else True,
        per_channel=per_channel if chosen is None else chosen.per_channel,
        group_size=group_size if bits == 4 and group_size != _DEFAULT_GROUP_SIZE else None,
        dtype=None if chosen is not None else dtype,
        layer_types=layer_types, skip_types=skip_types, layer_names=layer_names, skip_names=skip_names,
        on_failure=on_failure, run_validation=run_validation, modules_to_not_convert=modules_to_not_convert,
        skip_layer_types=skip_layer_types, skip_layer_names=skip_layer_names,
        skip_param_threshold=skip_param_threshold, accuracy_warning=accuracy_warning,
        sqnr_warning_threshold=sqnr_warning_threshold, sqnr_error_threshold=sqnr_error_threshold,
    )  # fmt: skip
    if bits != 4 and group_size != _DEFAULT_GROUP_SIZE:
        result.info.warnings.append(f"group_size={group_size} has no effect: only 4-bit weights are grouped")
    return result.model, result.info
