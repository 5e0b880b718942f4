"""The original against the quantized model: bytes, error of weights and outputs, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Final

import torch
from torch import nn

from mono_quant.errors import ConfigurationError
from mono_quant.report.metrics import model_bytes
from mono_quant.report.outputs import Inputs, OutputError, compare_outputs, inference, require_modules, run_model
from mono_quant.report.validation import ValidationResult, compare_weights, half_precision_layers
from mono_quant.report.weights import Model, Records, is_comparable, quantized_layers, stored_weight

_NOT_COMPARABLE: Final = "the weights are not compared: in a static graph norms are folded into them"
_WARM_UP = 3
# A timing covers so many calls that it takes at least this long: shorter ones measure the clock.
_SECONDS_PER_TIMING = 2e-3

#: Called before each round of timings with the number done and the number in all.
RoundProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerError:
    """How far the weight of one quantized layer is from the original's.

    Attributes:
        layer: The layer's name.
        scheme: How it is quantized, in words.
        sqnr_db: Signal-to-quantization-noise ratio in decibels.
    """

    layer: str
    scheme: str
    sqnr_db: float


@dataclass(frozen=True)
class Latency:
    """Seconds that one call takes.

    Attributes:
        original: Median of the original model.
        quantized: Median of the quantized model.
        ratio: Quantized divided by original: below 1 is faster.
        repeats: Timings of each.
        threads: Threads that PyTorch ran on.
    """

    original: float
    quantized: float
    ratio: float
    repeats: int
    threads: int


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_models` found.

    Attributes:
        original_bytes: Parameters and buffers of the original.
        quantized_bytes: The same of the quantized model.
        size_ratio: Quantized divided by original: below 1 is smaller.
        weight_sqnr_db: Ratio over all quantized weights; ``None`` if none could be compared.
        layers: Each quantized layer's error.
        outputs: Each output tensor's error; empty without inputs.
        latency: ``None`` without inputs or without repeats.
        warnings: What could not be compared, one sentence each.
    """

    original_bytes: int
    quantized_bytes: int
    size_ratio: float
    weight_sqnr_db: float | None
    layers: tuple[LayerError, ...] = ()
    outputs: tuple[OutputError, ...] = ()
    latency: Latency | None = None
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Answer the comparison as plain values."""
        return asdict(self)


def compare_models(
    original: Model,
    quantized: Model,
    inputs: Inputs | None = None,
    repeats: int = 20,
    *,
    records: Records | None = None,
    progress: RoundProgress | None = None,
) -> Comparison:
    """Compare two models, or two state dicts.

    Both run on the same inputs, in evaluation mode and without gradients. Timings of the two alternate, and which goes
    first alternates too, so that whatever else the machine does meets both alike.

    Args:
        original: The float model, or its state dict.
        quantized: The quantized model, or its state dict; a module with other layers than ours works too.
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments, or a function that takes a model
            and answers its output. Without inputs, and for state dicts, only sizes and weights are compared.
        repeats: Timings of each model; 0 measures no time.
        records: For a quantized state dict, what its checkpoint's header says of each layer.
        progress: Called before each round of timings.

    Raises:
        ConfigurationError: ``repeats`` is negative.
        InputTypeError: A model is neither a module nor a state dict, or ``inputs`` came with a state dict.
        InputError: The models answer different tensors.
    """
    if repeats < 0:
        raise ConfigurationError(f"repeats={repeats} is negative")
    before, after = model_bytes(original), model_bytes(quantized)
    if records is None and not isinstance(quantized, nn.Module):
        records = half_precision_layers(original, quantized)
    weights = ValidationResult()
    compare_weights(weights, original, quantized, -math.inf, records)
    outputs: tuple[OutputError, ...] = ()
    latency = None
    if inputs is not None:
        models = require_modules(original, quantized)
        with inference(*models):
            outputs = compare_outputs(*(run_model(model, inputs) for model in models))
            if repeats:
                latency = measure_latency(*models, inputs, repeats, progress)
    return Comparison(
        original_bytes=before,
        quantized_bytes=after,
        size_ratio=after / max(1, before),
        weight_sqnr_db=weights.sqnr_db,
        layers=tuple(
            LayerError(layer, str(stored_weight(quantized, layer, records).scheme), weights.layer_sqnr_db[layer])
            for layer in quantized_layers(quantized, records)
            if layer in weights.layer_sqnr_db
        ),
        outputs=outputs,
        latency=latency,
        warnings=tuple(weights.errors) if is_comparable(quantized) else (_NOT_COMPARABLE,),
    )


def measure_latency(
    original: nn.Module, quantized: nn.Module, inputs: Inputs, repeats: int, progress: RoundProgress | None = None
) -> Latency:
    """Time both models by turns; the modules should be in evaluation mode.

    Args:
        original: One model.
        quantized: The other.
        inputs: As for :func:`compare_models`.
        repeats: Timings of each, at least 1.
        progress: Called before each round.
    """
    models = (original, quantized)
    # The fastest of a few calls tells how many calls make one timing long enough.
    calls = [
        math.ceil(_SECONDS_PER_TIMING / max(1e-7, min(_time(model, inputs, 1) for _ in range(_WARM_UP))))
        for model in models
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for done in range(repeats):
        if progress is not None:
            progress(done, repeats)
        for side in (0, 1) if done % 2 == 0 else (1, 0):
            seconds[side].append(_time(models[side], inputs, calls[side]))
    first, second = (median(values) for values in seconds)
    return Latency(first, second, second / first, repeats, torch.get_num_threads())


def _time(model: nn.Module, inputs: Inputs, calls: int) -> float:
    _wait_for_device()
    started = time.perf_counter()
    for _ in range(calls):
        run_model(model, inputs)
    _wait_for_device()
    return (time.perf_counter() - started) / calls


def _wait_for_device() -> None:
    # Kernels of an accelerator run on after the call that started them has returned.
    if torch.cuda.is_available():
        torch.cuda.synchronize()


__all__ = ["Comparison", "Latency", "LayerError", "compare_models", "measure_latency"]
