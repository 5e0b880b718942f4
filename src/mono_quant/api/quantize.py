"""The one call: ``quantize``, and ``dynamic_quantize`` as mono-quant 1.1 names it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as ProgressBar
from torch import Tensor, nn

from mono_quant import integrations as integrations  # registers layers of other libraries
from mono_quant.api.options import Options, Selectors, resolve_options
from mono_quant.api.replace import Progress, Replacements, cast_rest, quantize_copy, quantize_inplace
from mono_quant.api.result import QuantizationResult
from mono_quant.api.selection import select_layers
from mono_quant.api.state_dict import quantize_state_dict
from mono_quant.config import QuantizationConfig
from mono_quant.core.mappers import QINT8
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import ConfigurationError, InputError, InputTypeError, QuantizationError, ValidationError
from mono_quant.io import load_source
from mono_quant.modules import disable_fused_path, mark_layers_that_share
from mono_quant.modules import fuse_activations as fuse_activation_modules
from mono_quant.report import decibels, model_bytes

Model = nn.Module | Mapping[str, Tensor] | str | Path


def quantize(
    model: Model,
    bits: int = 8,
    dynamic: bool | None = None,
    scheme: str = "symmetric",
    calibration_data: Any = None,
    show_progress: bool = False,
    *,
    include: Selectors | None = None,
    skip: Selectors | None = None,
    min_parameters: int = 0,
    group_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    fuse_activations: bool = True,
    inplace: bool = False,
    progress: Progress | None = None,
    run_validation: bool = True,
    on_failure: str = "error",
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
    dtype: torch.dtype | None = None,
    symmetric: bool | None = None,
    per_channel: bool | None = None,
    config: QuantizationConfig | None = None,
    layer_names: Iterable[str] | None = None,
    layer_types: Selectors | None = None,
    skip_names: Iterable[str] | None = None,
    skip_types: Selectors | None = None,
    skip_layer_names: Iterable[str] | None = None,
    skip_layer_types: Selectors | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
    skip_param_threshold: int | None = None,
    num_calibration_samples: int | None = None,
) -> QuantizationResult:
    """Quantize a model; unless ``inplace`` is set, a copy, and the original is never touched.

    Linear, convolution and embedding layers are replaced by layers of the same behaviour that store integers. With
    ``bits=8`` linear layers and convolutions also compute in integers: their inputs are quantized as they come,
    each row (each sample of a convolution) on its own, so no calibration data is needed.

    Args:
        model: A module; a state dict; or a path to a ``.safetensors`` file, a ``.pt`` file of plain tensors, or a
            transformers directory.
        bits: 8 (int8), 4 (int4 weights in groups, float arithmetic) or 16 (float16 weights, float32 arithmetic).
        dynamic: ``True`` for dynamic quantization, also the default without calibration data.
        scheme: ``"symmetric"`` weights, or ``"asymmetric"`` ones with zero points.
        calibration_data: Reserved for static quantization, which this version does not have.
        show_progress: Show a progress bar on standard error.
        include: Quantize only these layers: exact names (of a layer, or of a block for all layers inside), globs, or
            module types.
        skip: Leave these layers in float; as ``include``.
        min_parameters: Leave layers with fewer weights in float.
        group_size: Inputs that share one scale. With ``bits=4`` the default is the widest of 128, 64 and 32 that
            divides a layer's inputs; with ``bits=8`` it asks for weight-only int8.
        compute_dtype: Cast what stays in float, for example to ``torch.bfloat16``; floating-point inputs of the
            model must then have that dtype.
        fuse_activations: Let an int8 linear layer compute the ReLU, GELU or SiLU module that follows it, where it is
            certain that nothing else reads its output.
        inplace: Quantize ``model`` itself, freeing each float weight as soon as it is replaced.
        progress: Called after each layer with the number done, the number in all and the layer's name.
        run_validation: Measure the error of each weight, for ``info`` and for the two thresholds.
        on_failure: What happens when the weights' ratio falls below ``sqnr_error_threshold``: ``"error"``,
            ``"warn"`` or ``"ignore"``.
        accuracy_warning: The same for ``sqnr_warning_threshold``; ``"warn"`` adds to the result's warnings.
        sqnr_warning_threshold: Signal-to-quantization-noise ratio of all weights together, in decibels.
        sqnr_error_threshold: As above.
        dtype: ``torch.qint8``, ``torch.quint8`` (asymmetric) or ``torch.float16``; another way to say ``bits``.
        symmetric: Another way to say ``scheme``; wins over it.
        per_channel: ``False`` for one scale per tensor instead of one per output channel.
        config: The number format in one object; wins over the single options.
        layer_names, layer_types: 1.1's names of ``include``.
        skip_names, skip_types, skip_layer_names, skip_layer_types, modules_to_not_convert: 1.1's names of ``skip``. A
            name also stands for a last part (``"lm_head"`` for ``"model.lm_head"``) and may match nothing.
        skip_param_threshold: 1.1's name of ``min_parameters``.
        num_calibration_samples: Reserved for static quantization.

    Returns:
        The quantized model with what was done and what was not, and why. For a state dict the model is a state dict.

    Raises:
        ConfigurationError: An option is impossible, contradicts another, or names layers that do not exist.
        InputError: The model or the path cannot be used as given; ``InputTypeError`` if it is of the wrong type.
        CheckpointError: The file cannot be read.
        QuantizationError: A weight is not finite (its layer is named), or there is nothing to quantize.
        ValidationError: The error of the weights is beyond a threshold that is set to ``"error"``.
    """
    _require_dynamic(dynamic, calibration_data, num_calibration_samples)
    options = resolve_options(
        bits=bits, scheme=scheme, include=include, skip=skip, min_parameters=min_parameters, group_size=group_size,
        compute_dtype=compute_dtype, fuse_activations=fuse_activations, inplace=inplace,
        run_validation=run_validation, on_failure=on_failure, accuracy_warning=accuracy_warning,
        sqnr_warning_threshold=sqnr_warning_threshold, sqnr_error_threshold=sqnr_error_threshold, dtype=dtype,
        symmetric=symmetric, per_channel=per_channel, config=config, layer_names=layer_names,
        layer_types=layer_types, skip_names=skip_names, skip_types=skip_types, skip_layer_names=skip_layer_names,
        skip_layer_types=skip_layer_types, modules_to_not_convert=modules_to_not_convert,
        skip_param_threshold=skip_param_threshold,
    )  # fmt: skip
    source = load_source(model) if isinstance(model, str | Path) else model
    with _progress(progress, show_progress) as report:
        return _run(source, options, report)


def _require_dynamic(dynamic: bool | None, calibration_data: Any, num_calibration_samples: int | None) -> None:
    if calibration_data is not None:
        if dynamic:
            raise ConfigurationError(
                "dynamic=True and calibration_data contradict each other",
                suggestion="Dynamic quantization needs no data: leave calibration_data out.",
            )
        raise ConfigurationError(
            "static quantization with calibration_data is not available in this version",
            suggestion="Leave calibration_data out: dynamic quantization needs none.",
        )
    if dynamic is False:
        raise InputError(
            "dynamic=False asks for static quantization, which needs calibration_data",
            suggestion="Leave dynamic out, or set it to True.",
        )
    if num_calibration_samples is not None:
        raise ConfigurationError("num_calibration_samples was given without calibration_data")


def _run(model: nn.Module | Mapping[str, Tensor], options: Options, progress: Progress | None) -> QuantizationResult:
    started = time.perf_counter()
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


@contextmanager
def _progress(progress: Progress | None, show: bool) -> Iterator[Progress | None]:
    if not show:
        yield progress
        return
    with ProgressBar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Quantizing", total=None)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"Quantizing {name}")
            if progress is not None:
                progress(done, total, name)

        yield report


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
