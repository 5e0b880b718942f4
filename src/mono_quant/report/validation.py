"""Checks of a quantized model, with the names that mono-quant 1.1 gives them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mono_quant.core import LayerScheme, QuantizationInfo
from mono_quant.core.layer_scheme import FLOAT16
from mono_quant.errors import ConfigurationError, MonoQuantError, ValidationError
from mono_quant.io.header import LayerRecord
from mono_quant.report.metrics import decibels, error_energy, model_bytes
from mono_quant.report.outputs import Inputs, compare_outputs, inference, require_modules, run_model
from mono_quant.report.round_trip import round_trip_faults
from mono_quant.report.weights import (
    Model,
    Records,
    float_weight,
    is_comparable,
    quantized_layers,
    stored_weight,
    weight_faults,
)

_ON_FAILURE = ("error", "warn", "ignore")


@dataclass
class ValidationResult:
    """What the checks found.

    Attributes:
        sqnr_db: Signal-to-quantization-noise ratio over all quantized weights, in decibels; ``None`` if nothing could
            be compared.
        original_size_mb: Parameters and buffers of the original, in MiB.
        quantized_size_mb: The same of the quantized model.
        compression_ratio: The one divided by the other.
        load_test_passed: Whether the saved model, loaded again, has the same bits (and, with inputs, outputs); ``None``
            if that was not tried.
        weight_range_valid: Whether all weights and scales are finite and all codes within their range; ``None`` if no
            layer is quantized.
        errors: What failed, one sentence each.
        warnings: What the caller should know, one sentence each.
        layer_sqnr_db: The ratio of each quantized layer's weight.
        output_sqnr_db: The lowest ratio among the model's outputs; ``None`` without inputs.
        output_cosine: The lowest cosine similarity among the model's outputs; ``None`` without inputs.
    """

    sqnr_db: float | None = None
    original_size_mb: float | None = None
    quantized_size_mb: float | None = None
    compression_ratio: float | None = None
    load_test_passed: bool | None = False
    weight_range_valid: bool | None = False
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layer_sqnr_db: dict[str, float] = field(default_factory=dict)
    output_sqnr_db: float | None = None
    output_cosine: float | None = None


def validate_quantization(
    original: Model,
    quantized: Model,
    on_failure: str = "error",
    inputs: Inputs | None = None,
    *,
    min_sqnr_db: float = 10.0,
    records: Records | None = None,
) -> ValidationResult:
    """Check a quantized model against the one that it was made from.

    The checks: every quantized layer has its counterpart in the original; the weights' signal-to-quantization-noise
    ratio; all weights and scales finite, all codes in range; saved to a temporary file and loaded again, all tensors
    have the same bits. With ``inputs`` both models also run, in evaluation mode, and so does the loaded one.

    Args:
        original: The float model, or its state dict.
        quantized: The quantized model, or its state dict.
        on_failure: ``"error"`` raises, ``"warn"`` warns, ``"ignore"`` only answers.
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments, or a function that takes a model
            and answers its output. Only for modules.
        min_sqnr_db: The check fails if the ratio over all weights is lower; a single layer below it is a warning.
        records: For a quantized state dict, what its checkpoint's header says of each layer.

    Raises:
        ValidationError: A check failed and ``on_failure`` is ``"error"``; names every failure.
        ConfigurationError: ``on_failure`` is none of the three.
        InputTypeError: A model is neither a module nor a state dict, or ``inputs`` came with state dicts.
    """
    require_on_failure(on_failure)
    if inputs is not None:
        require_modules(original, quantized)
    result = ValidationResult()
    before, after = model_bytes(original), model_bytes(quantized)
    result.original_size_mb, result.quantized_size_mb = before / 2**20, after / 2**20
    result.compression_ratio = before / max(1, after)
    if records is None and not isinstance(quantized, nn.Module):
        records = half_precision_layers(original, quantized)
    check_weights(result, quantized, records)
    compare_weights(result, original, quantized, min_sqnr_db, records)
    faults = round_trip_faults(original, quantized, records, inputs)
    result.load_test_passed = not faults
    result.errors += faults
    if inputs is not None:
        _check_outputs(result, *require_modules(original, quantized), inputs)
    report_failures(result, on_failure)
    return result


def require_on_failure(on_failure: str) -> None:
    """Refuse an unknown way to deal with failures.

    Raises:
        ConfigurationError: It is none of ``"error"``, ``"warn"`` and ``"ignore"``.
    """
    if on_failure not in _ON_FAILURE:
        raise ConfigurationError(f"on_failure={on_failure!r} is not one of {', '.join(_ON_FAILURE)}")


def report_failures(result: ValidationResult, on_failure: str) -> None:
    """Raise or warn, as asked, if any check failed.

    Raises:
        ValidationError: There are errors and ``on_failure`` is ``"error"``.
    """
    if not result.errors or on_failure == "ignore":
        return
    message = "validation failed: " + "; ".join(result.errors)
    if on_failure == "error":
        raise ValidationError(
            message, suggestion="on_failure='ignore' answers all results; leave the named layers out with skip=."
        )
    warnings.warn(message, stacklevel=3)


def half_precision_layers(original: Model, quantized: Model) -> dict[str, LayerRecord]:
    """Answer the layers of a headerless state dict whose weight is float16 where the original's is wider."""
    exact = dict(_named_tensors(original))
    return {
        name.rpartition(".")[0]: LayerRecord(LayerScheme(FLOAT16, bits=16))
        for name, tensor in _named_tensors(quantized)
        if name.rpartition(".")[2] == "weight"
        and tensor.dtype == torch.float16
        and tensor.dim() >= 2
        and name in exact
        and exact[name].dtype in (torch.float32, torch.float64, torch.bfloat16)
    }


def check_weights(result: ValidationResult, quantized: Model, records: Records | None = None) -> None:
    """Add to ``result`` whether all numbers of a quantized model are sound.

    Tensors that do not fit together are errors of the result too.
    """
    layers = quantized_layers(quantized, records)
    faults = [] if layers else ["no layer of the model is quantized"]
    for layer in layers:
        try:
            faults += weight_faults(stored_weight(quantized, layer, records))
        except MonoQuantError as error:
            faults.append(error.message)
    own = {f"{layer}.weight" if layer else "weight" for layer in layers}
    for name, tensor in _named_tensors(quantized):
        # Buffers may hold infinities on purpose, attention masks for example.
        trained = name.rpartition(".")[2] in ("weight", "bias")
        if trained and name not in own and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            faults.append(f"{name} holds NaN or infinite values")
    result.weight_range_valid = not faults if layers else None
    result.errors += faults


def compare_weights(
    result: ValidationResult,
    original: Model,
    quantized: Model,
    min_sqnr_db: float,
    records: Records | None = None,
) -> None:
    """Add to ``result`` how far the quantized weights are from the original's, where they can be compared."""
    if not is_comparable(quantized):
        return
    signal = noise = 0.0
    seen: set[tuple[object, ...]] = set()
    for layer in quantized_layers(quantized, records):
        try:
            stored = stored_weight(quantized, layer, records)
            energies = error_energy(float_weight(original, quantized, stored), stored.weight)
        except MonoQuantError as error:
            if error.message not in result.errors:
                result.errors.append(error.message)
            continue
        result.layer_sqnr_db[layer] = decibels(*energies)
        if stored.memory not in seen:
            seen.add(stored.memory)
            signal, noise = signal + energies[0], noise + energies[1]
    if not result.layer_sqnr_db:
        return
    result.sqnr_db = decibels(signal, noise)
    if not result.sqnr_db >= min_sqnr_db:
        result.errors.append(
            f"the weights' signal-to-quantization-noise ratio is {result.sqnr_db:.1f} dB, expected at least "
            f"{min_sqnr_db:g} dB"
        )
    low = {layer: value for layer, value in result.layer_sqnr_db.items() if not value >= min_sqnr_db}
    if low:
        worst = sorted(low, key=lambda layer: low[layer])[:3]
        named = ", ".join(f"{layer!r} ({low[layer]:.1f} dB)" for layer in worst)
        result.warnings.append(f"{len(low)} layers are below {min_sqnr_db:g} dB, the worst: {named}")


def _check_outputs(result: ValidationResult, original: nn.Module, quantized: nn.Module, inputs: Inputs) -> None:
    with inference(original, quantized):
        outputs = compare_outputs(run_model(original, inputs), run_model(quantized, inputs))
    result.output_sqnr_db = min(output.sqnr_db for output in outputs)
    result.output_cosine = min(output.cosine for output in outputs)
    result.errors += [
        f"output {output.name!r} of the quantized model holds NaN or infinite values"
        for output in outputs
        if not output.finite
    ]


def _named_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, nn.Module):
        yield from model.named_parameters()
        yield from model.named_buffers()
    else:
        yield from model.items()


def check_accuracy_warnings(
    info: QuantizationInfo,
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
    all_layers_quantized_warning: bool = True,
    low_calibration_warning: bool = True,
    on_failure: str = "warn",
) -> QuantizationInfo:
    """Add warnings to ``info`` where its numbers suggest a loss of accuracy.

    Args:
        info: Of a quantization; its ``warnings`` are extended.
        sqnr_warning_threshold: Decibels below which the weights' ratio is worth a warning.
        sqnr_error_threshold: Decibels below which it is critical.
        all_layers_quantized_warning: Whether to say so if every layer is quantized to 4 bits.
        low_calibration_warning: Whether to say so if fewer than 50 samples were used to calibrate. Dynamic
            quantization, which uses none, never is.
        on_failure: What a critical ratio does: ``"error"`` raises, ``"warn"`` warns, ``"ignore"`` only records it.

    Returns:
        ``info``.

    Raises:
        ValidationError: The ratio is critical and ``on_failure`` is ``"error"``.
        ConfigurationError: ``on_failure`` is none of the three.
    """
    require_on_failure(on_failure)
    found: list[str] = []
    critical = None
    if info.sqnr_db is not None and not info.sqnr_db >= sqnr_error_threshold:
        critical = (
            f"CRITICAL: the weights' signal-to-quantization-noise ratio is {info.sqnr_db:.2f} dB, below "
            f"{sqnr_error_threshold:g} dB: a significant loss of accuracy is likely"
        )
        found.append(critical)
    elif info.sqnr_db is not None and info.sqnr_db < sqnr_warning_threshold:
        found.append(
            f"Warning: the weights' signal-to-quantization-noise ratio is {info.sqnr_db:.2f} dB, below "
            f"{sqnr_warning_threshold:g} dB: measure the accuracy on your task"
        )
    four_bits = any(layer.scheme.bits == 4 for layer in info.layers.values()) or not info.layers
    if all_layers_quantized_warning and info.selected_layers and not info.skipped_layers and four_bits:
        found.append("All layers were quantized: with 4 bits, leaving embeddings and the last layer out often pays")
    if low_calibration_warning and 0 < info.calibration_samples_used < 50:
        found.append(
            f"Only {info.calibration_samples_used} samples were used to calibrate; about 100 give stable ranges"
        )
    info.warnings.extend(sentence for sentence in found if sentence not in info.warnings)
    if critical is not None and on_failure == "error":
        raise ValidationError(critical, suggestion="Use more bits or smaller groups, or leave the worst layers out.")
    if critical is not None and on_failure == "warn":
        warnings.warn(critical, stacklevel=2)
    return info


__all__ = [
    "ValidationResult",
    "check_accuracy_warnings",
    "check_weights",
    "compare_weights",
    "half_precision_layers",
    "report_failures",
    "require_on_failure",
    "validate_quantization",
]
