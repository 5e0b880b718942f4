"""Quantizes layer by layer: weights are stored in few bits, and activations are quantized as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mono_quant.api.method import Request, choose_algorithm
from mono_quant.api.options import Options
from mono_quant.api.replace import Progress, Replacements, cast_rest, quantize_copy, quantize_inplace
from mono_quant.api.result import QuantizationResult
from mono_quant.api.selection import select_layers
from mono_quant.api.state_dict import quantize_state_dict
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import ConfigurationError, InputTypeError, QuantizationError, ValidationError
from mono_quant.modules import disable_fused_path, mark_layers_that_share
from mono_quant.modules import fuse_activations as fuse_activation_modules
from mono_quant.report import decibels, model_bytes


def quantize_layers(
    model: nn.Module | Mapping[str, Tensor], options: Options, request: Request, progress: Progress | None
) -> QuantizationResult:
    """Quantize the layers of a module or a state dict; see :func:`mono_quant.quantize`."""
    started = time.perf_counter()
    if choose_algorithm(request):
        raise ConfigurationError("algorithm= is not available in this version")
    replacements = Replacements()
    quantized: nn.Module | dict[str, Tensor]
    if isinstance(model, nn.Module):
        bytes_before = model_bytes(model)
        quantized, order, reasons, warnings = _run_module(model, options, replacements, progress)
    elif isinstance(model, Mapping):
        if options.compute_dtype is not None:
            raise ConfigurationError("compute_dtype applies to modules; a state dict computes nothing")
        bytes_before = model_bytes(model)
        quantized, reasons = quantize_state_dict(model, options, replacements, progress)
        order, warnings = list(replacements.layers), []
    else:
        raise InputTypeError(
            f"cannot quantize a {type(model).__name__}; expected a torch.nn.Module, a state dict or a path"
        )
    if not replacements.layers:
        raise QuantizationError(f"nothing to quantize: {_why_nothing(reasons)}")
    bytes_after = model_bytes(quantized)
    info = QuantizationInfo(
        selected_layers=order,
        skipped_layers=list(reasons),
        calibration_samples_used=0,
        dtype=options.dtype,
        symmetric=options.symmetric,
        sqnr_db=decibels(replacements.signal, replacements.noise) if options.run_validation else None,
        original_size_mb=bytes_before / 2**20,
        quantized_size_mb=bytes_after / 2**20,
        compression_ratio=bytes_before / max(1, bytes_after),
        warnings=[*options.notes, *warnings],
        skip_reasons=reasons,
        layers={name: replacements.layers[name] for name in order},
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        seconds=time.perf_counter() - started,
    )
    _check_accuracy(info, options)
    return QuantizationResult(quantized, info, list(info.warnings))


def _run_module(
    model: nn.Module, options: Options, replacements: Replacements, progress: Progress | None
) -> tuple[nn.Module, list[str], dict[str, str], list[str]]:
    """Answer the quantized model, its quantized layers in order, the reasons for the others, and warnings."""
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise InputTypeError(
            f"cannot replace layers inside a compiled model ({type(model).__name__})",
            suggestion="Quantize the module first and compile the result.",
        )
    selection = select_layers(model, options)
    order = [candidate.name for candidate in selection.chosen]
    if not order:
        return model, order, selection.skip_reasons, selection.warnings
    replace = quantize_inplace if options.inplace else quantize_copy
    quantized = replace(model, selection.chosen, replacements, options.run_validation, progress)
    if options.compute_dtype is not None:
        cast_rest(quantized, options.compute_dtype)
    mark_layers_that_share(quantized)
    if options.fuse_activations:
        fuse_activation_modules(quantized)
    for name in disable_fused_path(quantized):
        selection.warnings.append(f"{name or 'the model'}: PyTorch's fused float path is off, or it would run instead")
    if model.training:
        selection.warnings.append("the model is in training mode: call eval() before inference")
    return quantized, order, selection.skip_reasons, selection.warnings


def _check_accuracy(info: QuantizationInfo, options: Options) -> None:
    """Compare the weights' error with both thresholds.

    Raises:
        ValidationError: It is beyond a threshold whose action is ``"error"``.
    """
    if info.sqnr_db is None:
        return
    checks = (
        (options.sqnr_error_threshold, options.on_failure),
        (options.sqnr_warning_threshold, options.accuracy_warning),
    )
    for threshold, action in checks:
        if info.sqnr_db >= threshold or action == "ignore":
            continue
        message = f"the weights' signal-to-quantization-noise ratio is {info.sqnr_db:.1f} dB, below {threshold:g} dB"
        if action == "error":
            raise ValidationError(
                message, suggestion="Use more bits or smaller groups, or leave the worst layers of info.layers out."
            )
        info.warnings.append(message)
        return


def _why_nothing(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return "the model has no layer with weights"
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    common = sorted(counts, key=lambda reason: -counts[reason])[:3]
    return "; ".join(f"{counts[reason]} x {reason}" for reason in common)
