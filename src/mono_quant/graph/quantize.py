"""Static quantization of a model: one graph where it can be captured, layer by layer where it cannot."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from mono_quant.calibration import Batch, CalibrationData, call_model, count_samples, evaluating, iterate_batches
from mono_quant.calibration.batches import tensors_in
from mono_quant.errors import QuantizationError
from mono_quant.graph.build import UnsupportedCallError
from mono_quant.graph.capture import Captured, NotCapturableError, capture, layer_name
from mono_quant.graph.domains import Domains, Kind, assign_domains
from mono_quant.graph.equalize import equalize
from mono_quant.graph.float_layers import channel_axis
from mono_quant.graph.fold import fold, layer_of
from mono_quant.graph.fuse import fuse
from mono_quant.graph.layerwise import quantize_layerwise
from mono_quant.graph.lower import Lowering
from mono_quant.graph.observe import Statistics, first_and_all, observe
from mono_quant.graph.options import StaticOptions, StaticReport
from mono_quant.graph.program import StaticGraph

# Of the first batch, to compare the answers before and after.
_COMPARED_SAMPLES: Final = 8


def quantize_static(
    model: nn.Module, data: CalibrationData, options: StaticOptions | None = None
) -> tuple[nn.Module, StaticReport]:
    """Quantize weights and activations of a model to 8 bits, with ranges taken from calibration data.

    The model is captured as a graph whose batch size (and, where the model allows it, image size) stays open; batch
    norms and padding are folded, additions and activations fused, and activations stay unsigned 8-bit codes from layer
    to layer. Weights are symmetric with a scale for each output channel. A model that cannot be captured is quantized
    layer by layer: the same 8-bit layers, with float activations between them.

    Args:
        model: A float32 model, not modified; any mode, it is run and captured in evaluation mode.
        data: See :func:`mono_quant.calibration.iterate_batches`. Read once.
        options: See :class:`StaticOptions`.

    Returns:
        A module that is called as ``model`` is and holds buffers only (layer by layer: a copy of the model), and what
        was done and not done.

    Raises:
        InputError, InputTypeError: The data cannot be used; names the batch.
        QuantizationError: A weight or an activation is not finite, or no layer can be quantized.
    """
    options = options or StaticOptions()
    report = StaticReport()
    total = count_samples(data, options.calibration_samples)
    first, batches = first_and_all(iterate_batches(data, options.calibration_samples, model))
    prepared: _Prepared | None = None
    if not options.capture:
        report.reason = "capture was not wanted"
    else:
        start = time.perf_counter()
        try:
            prepared = _prepare(model, first, options)
        except (NotCapturableError, UnsupportedCallError) as error:
            report.reason = str(error)
        report.capture_seconds = time.perf_counter() - start
    if prepared is None:
        report.warnings.append(f"the model was quantized layer by layer: {report.reason}")
        quantized: nn.Module = quantize_layerwise(model, batches, total, options, report)
    else:
        quantized = _lower(prepared, batches, total, options, report)
    device = next((p.device for p in model.parameters()), None)
    if device is not None:
        quantized.to(device)  # tables are made on the CPU
    if not report.layers:
        raise QuantizationError(
            f"{type(model).__name__} has no layer that static quantization could work on",
            suggestion="Quantize it dynamically, or check the names in skip.",
        )
    report.sqnr_db = _agreement(model, quantized, first.head(_COMPARED_SAMPLES))
    return quantized, report


@dataclass(frozen=True)
class _Prepared:
    """A folded and fused graph that is known to have a lowered form."""

    captured: Captured
    names: dict[fx.Node, str]
    domains: Domains


def _prepare(model: nn.Module, first: Batch, options: StaticOptions) -> _Prepared:
    """Answer the folded and fused graph.

    Raises:
        NotCapturableError, UnsupportedCallError: Say why there is none.
        QuantizationError: A weight is not finite; names the layer.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes - {torch.float32}:
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise NotCapturableError(f"its parameters are {found}; graphs compute in float32 between 8-bit layers")
    captured = capture(model, first)
    fold(captured.module)
    fuse(captured.module)
    if options.equalize:
        equalize(captured.module)
    names = {node: layer_name(node) for node in captured.module.graph.nodes}
    domains = assign_domains(captured.module, options.skip, names)
    # The data can be read only once: what cannot be lowered must show before calibration.
    Lowering(captured, domains, None, names, StaticReport()).run()
    return _Prepared(captured, names, domains)


def _lower(
    prepared: _Prepared, batches: Iterator[Batch], total: int | None, options: StaticOptions, report: StaticReport
) -> StaticGraph:
    captured, names, domains = prepared.captured, prepared.names, prepared.domains
    averaged: set[tuple[Any, int]] = {
        (node.args[0], channel_axis(layer_of(captured.module, node)))
        for node, kind in domains.kinds.items()
        if kind == Kind.LAYER
    }
    watched = {node: names[node] for node in domains.watched()}
    statistics = Statistics(watched, averaged, options)
    start = time.perf_counter()
    observe(captured, statistics, batches, total, options)
    report.calibration_seconds = time.perf_counter() - start
    graph = Lowering(captured, domains, statistics, names, report).run()
    report.captured = True
    report.samples = statistics.samples
    report.dynamic_sizes = captured.dynamic_sizes
    return graph.eval()


def _agreement(model: nn.Module, quantized: nn.Module, batch: Batch) -> float | None:
    """Answer the signal-to-noise ratio of the answers in decibels, over all floating-point tensors in them."""
    with evaluating(model), evaluating(quantized):
        expected, found = call_model(model, batch, 0), call_model(quantized, batch, 0)
    signal = noise = 0.0
    for exact, approximate in zip(tensors_in(expected), tensors_in(found), strict=True):
        if exact.is_floating_point():
            signal += float(exact.double().square().sum())
            noise += float((exact.double() - approximate.double()).square().sum())
    if signal == 0.0:
        return None
    return 10 * math.log10(signal / noise) if noise else math.inf
