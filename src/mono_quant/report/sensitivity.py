"""What each layer's quantization does to a model: the answer of :func:`mono_quant.sensitivity`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mono_quant.core.layer_scheme import LayerScheme


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from the float model's.

    Attributes:
        sqnr_db: Signal-to-quantization-noise ratio in decibels.
        cosine: Cosine similarity, all batches taken as one long vector.
    """

    sqnr_db: float
    cosine: float


@dataclass(frozen=True)
class FormatEffect:
    """What one layer costs and causes in one format.

    Attributes:
        scheme: How it is stored; ``None`` where it stays in float.
        bytes: What it stores. A weight that several layers share counts for the first of them.
        seconds: One call on the first calibration batch; all of its calls if it has several.
        alone: Error of its own output for the float model's inputs; ``None`` if no data reached it.
        company: Error of its own output where all layers before it are in the same format too; ``None`` where the
            quantized model called the layer on other shapes.
        model: Error of the model's output where this layer alone is quantized, together with those that share its
            weight.
        model_kl: Kullback-Leibler divergence of the model's logits from the float model's, in nats for each
            position, where this layer alone is quantized; ``None`` without logits.
    """

    scheme: LayerScheme | None
    bytes: int
    seconds: float | None = None
    alone: TensorError | None = None
    company: TensorError | None = None
    model: TensorError | None = None
    model_kl: float | None = None


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer in each format that it has.

    Attributes:
        name: Its name in the model.
        formats: By the format's name; ``"float"`` is the layer as it is.
        shares_with: Names of the layers that hold the same weight, which always have the same format.
    """

    name: str
    formats: Mapping[str, FormatEffect]
    shares_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class UniformEffect:
    """The model with every layer in one format; layers that do not have it are in int8.

    Attributes:
        bytes: All parameters and buffers.
        output: Error of the model's output.
        kl: As :attr:`FormatEffect.model_kl`.
    """

    bytes: int
    output: TensorError
    kl: float | None = None


@dataclass(frozen=True)
class SensitivityReport:
    """How sensitive a model is to the quantization of each of its layers.

    Attributes:
        layers: In the model's order.
        uniform: By the format's name.
        samples: Calibration samples that were run.
        logits: Name of the output that was taken for logits, or ``None``.
        notes: What the reader should know, one sentence each.
    """

    layers: tuple[LayerSensitivity, ...]
    uniform: Mapping[str, UniformEffect]
    samples: int
    logits: str | None = None
    notes: tuple[str, ...] = field(default=())

    def worst(self, format_name: str) -> list[LayerSensitivity]:
        """Answer the layers that have a format, the one that hurts the model's output most in it first.

        Layers that no data reached come last.
        """

        def harm(layer: LayerSensitivity) -> float:
            effect = layer.formats[format_name].model
            return math.inf if effect is None else effect.sqnr_db

        return sorted((layer for layer in self.layers if format_name in layer.formats), key=harm)

    def to_dict(self) -> dict[str, Any]:
        """Answer the report as plain values."""
        return asdict(self)


__all__ = ["FormatEffect", "LayerSensitivity", "SensitivityReport", "TensorError", "UniformEffect"]
