"""``sensitivity``: what quantizing each layer does to a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from mono_quant.api.algorithm import read_batches
from mono_quant.api.error_sums import Outputs
from mono_quant.api.formats import FLOAT, find_units, parse_formats, uniform_assignment
from mono_quant.api.layer_effects import Effects, measure_effects
from mono_quant.api.method import Calibration
from mono_quant.api.names import shortened
from mono_quant.api.options import Selectors, resolve_options
from mono_quant.api.progress import progress_bar
from mono_quant.api.replace import Progress
from mono_quant.api.working_copy import WorkingCopy
from mono_quant.calibration import Batch, call_model, evaluating
from mono_quant.errors import InputError, InputTypeError
from mono_quant.io import load_source
from mono_quant.report import decibels, model_bytes, named_tensors
from mono_quant.report.sensitivity import (
    FormatEffect,
    LayerSensitivity,
    SensitivityReport,
    TensorError,
    UniformEffect,
)

LOGITS: Final = "logits"
DEFAULT_SEED: Final = 0


def sensitivity(
    model: nn.Module | str | Path,
    calibration_data: Any,
    *,
    formats: Sequence[str] | str | None = None,
    include: Selectors | None = None,
    skip: Selectors | None = None,
    min_parameters: int = 0,
    scheme: str = "symmetric",
    group_size: int | None = None,
    num_calibration_samples: int | None = None,
    logits: str | None = None,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
    show_progress: bool = False,
) -> SensitivityReport:
    """Measure the error that each layer causes in each format, alone and in company.

    The model runs once over the data in float, with one to sixteen backward passes (the fewer samples, the more), and
    once for each format with every layer in it. A layer's own error is measured exactly. The error of the model's
    output where one layer alone is quantized is estimated to first order from gradients of random directions of the
    output (Hutchinson 1990; :mod:`mono_quant.api.probes`), so that no layer needs a run of its own; layers that no
    gradient reaches are tried one by one on the first batch. Outputs of several tensors are taken for one, each
    divided by its root mean square.

    Args:
        model: A module or a path to a transformers directory; a module is not modified.
        calibration_data: Float inputs, token ids, batches of keyword arguments; see
            :func:`mono_quant.calibration.iterate_batches`. Timings are those of the first batch, so let it look like
            what the model will be served with.
        formats: Of ``"int4"`` (weights in groups, float arithmetic), ``"int8"`` (int8 weights and arithmetic),
            ``"int8_weights"`` (weights in groups, float arithmetic) and ``"float16"`` (weights); all by default.
            Layers other than linear ones have ``int8`` and ``float16``.
        include, skip, min_parameters, scheme, group_size: As for :func:`mono_quant.quantize`.
        num_calibration_samples: Use at most this many samples; 128 by default.
        logits: Name of the output that holds logits over its last dimension: a key, a position such as ``"[0]"``, or
            ``"output"`` for a model that answers a bare tensor. By default the output that is named ``logits``;
            nothing is guessed from shapes. Their divergence from the float model's is measured besides.
        seed: Of the random directions. The same seed answers the same numbers, but for the times.
        progress: Called with passes done, passes in all, and what is being done.
        show_progress: Show a progress bar on standard error.

    Raises:
        ConfigurationError: A format is unknown, or an option cannot be honoured.
        InputError: The data is unusable, the model fails on it or cannot be copied, or has no output named ``logits``.
        QuantizationError: A weight is not finite; its layer is named.
    """
    options = resolve_options(
        bits=8, scheme=scheme, include=include, skip=skip, min_parameters=min_parameters, group_size=group_size
    )
    chosen = parse_formats(formats)
    source = load_source(model) if isinstance(model, str | Path) else model
    if not isinstance(source, nn.Module):
        raise InputTypeError(
            f"sensitivity is measured by running the model, and a {type(source).__name__} cannot be run",
            suggestion="Pass the torch.nn.Module, or a transformers directory.",
        )
    batches = read_batches(Calibration(calibration_data, num_calibration_samples), source)
    units, _ = find_units(source, options, chosen)
    copy = WorkingCopy(source, units)
    outputs = Outputs(find_logits(source, batches[0], logits))
    with progress_bar(progress, show_progress) as report:
        effects = measure_effects(copy, batches, chosen, outputs, seed, report or _unreported)
    return build_report(copy, chosen, effects, outputs)


def _unreported(done: int, total: int, what: str) -> None:
    """Take a report that nobody asked for."""


def find_logits(model: nn.Module, batch: Batch, name: str | None) -> str | None:
    """Answer the name of the output that holds logits, ``None`` if there is none.

    Raises:
        InputError: The output that the caller names does not exist or holds no floating-point numbers.
    """
    with evaluating(model), torch.no_grad():
        found = named_tensors(call_model(model, batch.head(1), 0))
    usable = {key for key, tensor in found.items() if tensor.is_floating_point() and tensor.dim()}
    if name is None:
        return next((key for key in found if key in usable and key.rpartition(".")[2] == LOGITS), None)
    if name not in usable:
        raise InputError(
            f"the model has no output of floating-point numbers named {name!r}",
            suggestion=f"It has {', '.join(sorted(map(repr, usable))) or 'none at all'}.",
        )
    return name


def build_report(copy: WorkingCopy, formats: Sequence[str], effects: Effects, outputs: Outputs) -> SensitivityReport:
    """Answer what was measured, layer by layer."""
    everything = model_bytes(copy.model)
    held = sum(copy.unit_bytes(unit, FLOAT) for unit in copy.units)
    by_name = {unit.name: unit for unit in copy.units}
    uniform = {}
    for name in formats:
        assignment = uniform_assignment(copy.units, name)
        stored = sum(copy.unit_bytes(by_name[unit], chosen) for unit, chosen in assignment.items())
        sums, divergence = effects.uniform[name]
        kl = None if outputs.logits is None else divergence
        uniform[name] = UniformEffect(everything - held + stored, sums.error(), kl)
    layers = tuple(_layer(copy, effects, layer, outputs.logits is not None) for layer in copy.layer_names)
    return SensitivityReport(layers, uniform, effects.samples, outputs.logits, tuple(_notes(copy, effects)))


def _layer(copy: WorkingCopy, effects: Effects, layer: str, has_logits: bool) -> LayerSensitivity:
    unit = next(unit for unit in copy.units if layer in unit.layers)
    position = unit.layers.index(layer)
    found = {}
    for name in (*unit.formats, FLOAT):
        alone, company = effects.alone.get((layer, name)), effects.company.get((layer, name))
        noise = effects.noise.get((unit.name, name))
        found[name] = FormatEffect(
            scheme=None if name == FLOAT else unit.formats[name][position].scheme,
            bytes=0 if position else copy.unit_bytes(unit, name),
            seconds=effects.seconds.get((layer, name)),
            alone=None if alone is None else alone.error(),
            company=None if company is None or layer in effects.incomparable else company.error(),
            model=None if noise is None else _model_error(effects.signal, noise),
            model_kl=effects.divergence.get((unit.name, name)) if has_logits else None,
        )
    return LayerSensitivity(layer, found, tuple(other for other in unit.layers if other != layer))


def _model_error(signal: float, noise: float) -> TensorError:
    # The cosine of an output with an error at right angles to it.
    cosine = 1.0 / math.sqrt(1.0 + noise / signal) if signal > 0 else float(noise == 0)
    return TensorError(decibels(signal, noise), cosine)


def _notes(copy: WorkingCopy, effects: Effects) -> list[str]:
    reached = {layer for layer, _ in effects.alone}
    notes = [
        (
            [layer for layer in copy.layer_names if layer not in reached],
            "are reached by no calibration data: nothing is known of their errors",
        ),
        (effects.by_run, "are reached by no gradient: the model was run with each of them alone, on the first batch"),
        (
            sorted(effects.incomparable),
            "were called on other shapes in a quantized model: their errors in company are not known",
        ),
    ]
    return [f"{len(names)} layers {what}: {shortened(names)}" for names, what in notes if names]


__all__ = ["build_report", "find_logits", "sensitivity"]
