"""Static quantization: ranges of activations come from calibration data, and stay 8-bit from layer to layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import torch
from torch import nn

from mono_quant.api.checks import check_accuracy, require_replaceable
from mono_quant.api.method import Calibration, StaticChoices
from mono_quant.api.options import Options
from mono_quant.api.replace import Progress
from mono_quant.api.result import QuantizationResult
from mono_quant.api.selection import reasons_to_skip
from mono_quant.calibration import CalibrationProgress, count_samples
from mono_quant.core.quantization_info import LayerInfo, QuantizationInfo
from mono_quant.errors import ConfigurationError, QuantizationError
from mono_quant.graph import StaticGraph, StaticOptions, StaticReport, quantize_static, static_weights
from mono_quant.modules import QuantizedModule
from mono_quant.report import decibels, model_bytes

#: Samples that calibration uses at most, as in mono-quant 1.1.
DEFAULT_SAMPLES: Final = 150

_REMEDY: Final = "Leave one of the two out; without data a model is quantized dynamically."
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def quantize_with_calibration(
    model: nn.Module, options: Options, calibration: Calibration, choices: StaticChoices, progress: Progress | None
) -> QuantizationResult:
    """Quantize weights and activations of a module; see :func:`mono_quant.quantize`.

    Raises:
        ConfigurationError: An option asks for what static graphs do not have.
        InputError, InputTypeError: The data cannot be used; the batch is named.
        QuantizationError: The model is quantized already, a number in it is not finite, or no layer is left.
        ValidationError: The error is beyond a threshold that is set to ``"error"``.
    """
    started = time.perf_counter()
    _require_possible(options)
    require_replaceable(model)
    _require_float(model)
    reasons, warnings = reasons_to_skip(model, options)
    limit = calibration.samples or DEFAULT_SAMPLES
    settings = StaticOptions(
        calibration_samples=limit, skip=frozenset(reasons), progress=_calibration_progress(progress, limit),
        **choices.given(),
    )  # fmt: skip
    bytes_before = model_bytes(model)
    quantized, report = quantize_static(model, calibration.data, settings)
    if progress is not None and report.samples < limit and count_samples(calibration.data) is None:
        progress(report.samples, report.samples, "calibration")
    bytes_after = model_bytes(quantized)
    skipped = dict(_skipped(model, quantized, report, reasons))
    energies = [report.energies[name] for name in report.layers]
    signal, noise = (sum(part) for part in zip(*energies, strict=True))
    info = QuantizationInfo(
        selected_layers=list(report.layers),
        skipped_layers=list(skipped),
        calibration_samples_used=report.samples,
        dtype=options.dtype,
        symmetric=True,
        sqnr_db=decibels(signal, noise) if options.run_validation else None,
        original_size_mb=bytes_before / 2**20,
        quantized_size_mb=bytes_after / 2**20,
        compression_ratio=bytes_before / max(1, bytes_after),
        warnings=[*options.notes, *warnings, *report.warnings],
        skip_reasons=skipped,
        layers=_layers(model, quantized, report, options.run_validation),
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        output_sqnr_db=report.sqnr_db,
        cuts=list(report.cuts),
        not_captured=None if report.captured else report.reason,
    )
    info.seconds = time.perf_counter() - started
    check_accuracy(info, options)
    return QuantizationResult(quantized, info, list(info.warnings))


def _require_possible(options: Options) -> None:
    """Refuse options that static quantization cannot honour."""
    refused = {
        f"bits={options.bits}": (options.bits != 8, "static graphs have 8-bit weights and activations"),
        "asymmetric weights": (not options.symmetric, "the weights of static graphs are symmetric; activations always "
                               "have zero points"),
        "per_channel=False": (not options.per_channel, "static graphs have a scale for each output channel"),
        f"compute_dtype={options.compute_dtype}": (
            options.compute_dtype not in (None, torch.float32), "what stays in float in a static graph is float32"
        ),
        "fuse_activations=False": (not options.fuse_activations, "static graphs always fuse activations"),
        "inplace=True": (options.inplace, "a static graph is a new module, and cannot take the place of the model"),
    }  # fmt: skip
    for option, (asked, why) in refused.items():
        if asked:
            raise ConfigurationError(
                f"{option} and static quantization (calibration_data) exclude each other: {why}", suggestion=_REMEDY
            )


def _require_float(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            raise QuantizationError(
                f"layer {name!r} is quantized already ({module.scheme})",
                suggestion="Calibrate and quantize the float model that it was made from.",
            )


def _calibration_progress(progress: Progress | None, limit: int) -> CalibrationProgress | None:
    if progress is None:
        return None

    def report(done: int, total: int | None, label: str) -> None:
        # Of data without a length only the limit is known; at the end the number is right.
        progress(done, limit if total is None else total, "calibration")

    return report


def _layers(model: nn.Module, quantized: nn.Module, report: StaticReport, measured: bool) -> dict[str, LayerInfo]:
    """Answer the record of each quantized layer, in the order of the graph."""
    modules = dict(model.named_modules())
    records: dict[str, LayerInfo] = {}
    for weight in static_weights(quantized):
        module = modules.get(weight.name)
        parameters = [] if module is None else list(module.parameters(recurse=False))
        before = sum(p.nbytes for p in parameters) or 4 * weight.weight.numel()
        present = records.get(weight.name)
        records[weight.name] = LayerInfo(
            scheme=weight.scheme,
            bytes_before=before,
            # A layer that is called twice has two sets of codes.
            bytes_after=weight.nbytes + (0 if present is None else present.bytes_after),
            sqnr_db=decibels(*report.energies[weight.name]) if measured else None,
        )
    return {name: records[name] for name in report.layers}


def _skipped(
    model: nn.Module, quantized: nn.Module, report: StaticReport, reasons: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Answer for each layer with weights that stayed in float why, in the model's order.

    Batch norms that were folded into their neighbours are gone, and did not stay.
    """
    cuts: dict[str, str] = {}
    for cut in report.cuts:
        cuts.setdefault(cut.name, cut.reason)
    steps = {step.name for step in quantized.steps} if isinstance(quantized, StaticGraph) else set()
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)) or _within(name, report.layers):
            continue
        kind = type(module).__name__
        if name in report.skipped:
            yield name, reasons.get(name, report.skipped[name])
        elif name in cuts:
            yield name, reasons.get(name, f"{kind}: {cuts[name]}")
        elif not report.captured:
            yield name, reasons.get(name, f"{kind} has no static 8-bit form")
        elif name in steps:
            yield name, reasons.get(name, f"{kind} has no 8-bit form")
        elif not type(module).__module__.startswith("torch.nn."):
            yield name, f"the parameters that {kind} itself holds stay in float"
        elif not isinstance(module, _NORMS):
            yield name, "the model does not use it"


def _within(name: str, layers: list[str]) -> bool:
    """Say whether a module is one of the layers, or belongs to one: attention reads the weights of its parts."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


__all__ = ["DEFAULT_SAMPLES", "quantize_with_calibration"]
