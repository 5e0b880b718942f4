"""The 8-bit layers inside a statically quantized model, for reports and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mono_quant.core import LayerScheme, QuantizedTensor
from mono_quant.core.layer_scheme import INT8_STATIC
from mono_quant.errors import CheckpointError
from mono_quant.graph.arithmetic import LARGEST_CODE
from mono_quant.graph.layers.linear import DynamicLinear
from mono_quant.graph.layers.packed import PackedLayer
from mono_quant.graph.layerwise import StaticLayer
from mono_quant.graph.program import StaticGraph


@dataclass(frozen=True)
class StaticWeight:
    """One layer with an 8-bit weight.

    Attributes:
        name: The layer of the float model that it comes from; a layer that is called twice is there twice.
        prefix: What its tensors' names in the state dict begin with.
        module: Holds ``codes``, ``weight_scale`` and ``bias``.
        scheme: ``int8_static``, or ``int8_dynamic`` where the rows of its input have scales of their own.
    """

    name: str
    prefix: str
    module: Any
    scheme: LayerScheme

    @property
    def weight(self) -> QuantizedTensor:
        """The stored weight, output channels first; in a graph that is after folding."""
        return QuantizedTensor(self.module.codes, self.module.weight_scale.reshape(-1), None, axis=0)

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        return sum(tensor.nbytes for tensor in self.module.state_dict().values())


def is_static(model: nn.Module) -> bool:
    """Say whether a model is, or holds, a static graph or static layers."""
    return any(isinstance(module, StaticGraph | StaticLayer) for module in model.modules())


def static_weights(model: nn.Module) -> list[StaticWeight]:
    """Answer the layers with 8-bit weights inside a statically quantized model, in order."""
    found: list[StaticWeight] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, StaticGraph):
            found += _of_graph(module, prefix)
        elif isinstance(module, StaticLayer):
            found.append(StaticWeight(name, f"{prefix}layer.", module.layer, LayerScheme(INT8_STATIC)))
    return found


def _of_graph(graph: StaticGraph, prefix: str) -> Iterator[StaticWeight]:
    for index, (step, layer) in enumerate(zip(graph.steps, graph.layers, strict=True)):
        place = f"{prefix}layers.{index}."
        if isinstance(layer, PackedLayer):
            yield StaticWeight(step.name, place, layer, LayerScheme(INT8_STATIC))
        elif isinstance(layer, DynamicLinear):
            yield StaticWeight(step.name, f"{place}linear.", layer.linear, LayerScheme())


def described_tensors(description: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Answer dtype and shape of each tensor that a description (see :func:`describe_static`) speaks of, by name.

    Raises:
        CheckpointError: The description is damaged.
    """
    try:
        return {
            f"{prefix}{name}": (str(dtype), [int(size) for size in shape])
            for _, prefix, layer in _described_layers(description)
            for name, (dtype, shape) in layer["tensors"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the description of a static model is damaged: {error!r}") from error


@dataclass(frozen=True)
class StaticRange:
    """The values that the codes at one layer can stand for; what lies beyond is clamped.

    Attributes:
        input: Lowest and highest value that goes in.
        output: The same for what comes out; ``None`` where the layer answers floats.
    """

    input: tuple[float, float]
    output: tuple[float, float] | None


def described_ranges(description: Mapping[str, Any]) -> dict[str, StaticRange]:
    """Answer the ranges of each layer with an 8-bit weight and fixed scales, by name.

    Raises:
        CheckpointError: The description is damaged.
    """
    ranges: dict[str, StaticRange] = {}
    try:
        for name, _, layer in _described_layers(description):
            spec = layer["spec"]
            if "weight" in layer["tensors"] and spec.get("input") is not None:
                output = spec.get("output")
                ranges[name] = StaticRange(_range(spec["input"]), None if output is None else _range(output))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the description of a static model is damaged: {error!r}") from error
    return ranges


def _described_layers(description: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Answer the name, what the names of its tensors begin with, and the description of each layer."""
    if description["kind"] == "graph":
        for index, step in enumerate(description["graph"]["steps"]):
            yield str(step["name"]), f"layers.{index}.", step["layer"]
    else:
        for name, described in description["layers"].items():
            yield name, f"{name}.layer." if name else "layer.", described["layer"]


def _range(qparams: Any) -> tuple[float, float]:
    scale, zero_point = qparams
    return float(scale) * (0 - int(zero_point)), float(scale) * (LARGEST_CODE - int(zero_point))
