"""Quantizes layer by layer: weights are stored in few bits, and activations are quantized as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from mono_quant.api.algorithm import AlgorithmPlan, plan_algorithm, prepare
from mono_quant.api.checks import check_accuracy, require_replaceable
from mono_quant.api.method import Request
from mono_quant.api.options import Options
from mono_quant.api.replace import Progress, Replacements, cast_rest, quantize_copy, quantize_inplace
from mono_quant.api.result import QuantizationResult
from mono_quant.api.selection import Selection, assign_schemes, parted_weights, select_layers
from mono_quant.api.state_dict import quantize_state_dict
from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import ConfigurationError, InputTypeError, QuantizationError
from mono_quant.modules import disable_fused_path, fuse_layers, mark_layers_that_share, unfused_layers
from mono_quant.modules import fuse_activations as fuse_activation_modules
from mono_quant.report import decibels, model_bytes


def quantize_layers(
    model: nn.Module | Mapping[str, Tensor], options: Options, request: Request, progress: Progress | None
) -> QuantizationResult:
    """Quantize the layers of a module or a state dict; see :func:`mono_quant.quantize`."""
    started = time.perf_counter()
    if isinstance(model, nn.Module):
        require_replaceable(model)
        selection = select_layers(model, options)
        return _quantize_selection(model, selection, options, plan_algorithm(request, model), progress, started)
    if not isinstance(model, Mapping):
        raise InputTypeError(
            f"cannot quantize a {type(model).__name__}; expected a torch.nn.Module, a state dict or a path"
        )
    if options.compute_dtype is not None:
        raise ConfigurationError("compute_dtype applies to modules; a state dict computes nothing")
    plan = plan_algorithm(request, None)
    replacements = Replacements()
    quantized, reasons = quantize_state_dict(model, options, plan, replacements, progress)
    outcome = _Outcome(quantized, list(replacements.layers), reasons, [])
    return _result(outcome, replacements, options, model_bytes(model), started)


def quantize_by_schemes(
    model: nn.Module,
    schemes: Mapping[str, LayerScheme | None],
    options: Options,
    progress: Progress | None = None,
    why_float: Mapping[str, str] | None = None,
    plan: AlgorithmPlan | None = None,
) -> QuantizationResult:
    """Quantize the layers of a module, each as ``schemes`` says.

    Args:
        model: Not touched unless ``options.inplace`` is set.
        schemes: For a layer's name, how it is stored; ``None`` leaves it in float. Layers that it does not name are
            quantized as ``options`` say. Every name must be one that :func:`~mono_quant.api.selection.select_layers`
            answers for the same options.
        options: Everything else.
        progress: Called after each layer.
        why_float: For layers that stay in float, the reason to report.
        plan: Algorithms to run first.

    Raises:
        ConfigurationError: A name is not one of the layers that can be quantized, or its scheme does not fit it.
        QuantizationError, InputError, InputTypeError, ValidationError: As :func:`mono_quant.quantize`.
    """
    started = time.perf_counter()
    require_replaceable(model)
    selection = select_layers(model, options)
    assign_schemes(selection, schemes, why_float or {})
    reasons = selection.skip_reasons
    selection.skip_reasons = {name: reasons[name] for name, _ in model.named_modules() if name in reasons}
    return _quantize_selection(model, selection, options, plan or AlgorithmPlan(), progress, started)


@dataclass(frozen=True)
class _Outcome:
    """A quantized model, its quantized layers in order, the reasons for the others, warnings, samples used, layers that
    run as one call, and why others of their classes do not."""

    model: nn.Module | dict[str, Tensor]
    order: list[str]
    reasons: dict[str, str]
    warnings: list[str]
    samples: int = 0
    fused: list[str] = field(default_factory=list)
    unfused: dict[str, str] = field(default_factory=dict)


def _quantize_selection(
    model: nn.Module, selection: Selection, options: Options, plan: AlgorithmPlan, progress: Progress | None,
    started: float,
) -> QuantizationResult:  # fmt: skip
    bytes_before = model_bytes(model)
    order = [candidate.name for candidate in selection.chosen]
    if not order:
        raise QuantizationError(f"nothing to quantize: {_why_nothing(selection.skip_reasons)}")
    training = model.training
    selection.warnings += parted_weights(model, selection)
    prepared = prepare(model, selection, plan, options.inplace, progress)
    if plan.steps:
        progress = None  # it was told of every layer
    replacements = Replacements(prepared.weights)
    replace = quantize_inplace if options.inplace else quantize_copy
    quantized = replace(prepared.model, prepared.selection.chosen, replacements, options.run_validation, progress)
    fused, unfused, path_warnings = _finish(quantized, options)
    warnings = [*selection.warnings, *path_warnings]
    if training:
        warnings.append("the model is in training mode: call eval() before inference")
    outcome = _Outcome(quantized, order, selection.skip_reasons, warnings, prepared.samples, fused, unfused)
    return _result(outcome, replacements, options, bytes_before, started)


def _finish(quantized: nn.Module, options: Options) -> tuple[list[str], dict[str, str], list[str]]:
    """Do what is left once the layers are replaced.

    Returns:
        The names of the layers that run as one call, for others of their classes why not, and warnings.
    """
    if options.compute_dtype is not None:
        cast_rest(quantized, options.compute_dtype)
    mark_layers_that_share(quantized)
    fused: list[str] = []
    if options.fuse_activations:
        fuse_activation_modules(quantized)
        fused = fuse_layers(quantized)
    unfused = unfused_layers(quantized)
    if not options.fuse_activations:
        unfused = dict.fromkeys(unfused, "fuse_activations=False")
    warnings = [
        f"{name or 'the model'}: PyTorch's fused float path is off, or it would run instead"
        for name in disable_fused_path(quantized)
    ]
    return fused, unfused, warnings


def _result(
    outcome: _Outcome, replacements: Replacements, options: Options, bytes_before: int, started: float
) -> QuantizationResult:
    if not replacements.layers:
        raise QuantizationError(f"nothing to quantize: {_why_nothing(outcome.reasons)}")
    bytes_after = model_bytes(outcome.model)
    info = QuantizationInfo(
        selected_layers=outcome.order,
        skipped_layers=list(outcome.reasons),
        calibration_samples_used=outcome.samples,
        dtype=options.dtype,
        symmetric=options.symmetric,
        sqnr_db=decibels(replacements.signal, replacements.noise) if options.run_validation else None,
        original_size_mb=bytes_before / 2**20,
        quantized_size_mb=bytes_after / 2**20,
        compression_ratio=bytes_before / max(1, bytes_after),
        warnings=[*options.notes, *outcome.warnings],
        skip_reasons=outcome.reasons,
        layers={name: replacements.layers[name] for name in outcome.order},
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        seconds=time.perf_counter() - started,
        fused_layers=outcome.fused,
        unfused_layers=outcome.unfused,
    )
    check_accuracy(info, options)
    return QuantizationResult(outcome.model, info, list(info.warnings))


def _why_nothing(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return "the model has no layer with weights"
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    common = sorted(counts, key=lambda reason: -counts[reason])[:3]
    return "; ".join(f"{counts[reason]} x {reason}" for reason in common)
