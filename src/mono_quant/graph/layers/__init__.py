"""The steps of a static graph. Each is a pure function of its inputs with buffers and a plain description."""

from __future__ import annotations

from typing import Final

from mono_quant.graph.layers.aten import Call
from mono_quant.graph.layers.conv import QuantizedConvolution
from mono_quant.graph.layers.elementwise import Add, Dequantize, Multiply, Quantize, Table
from mono_quant.graph.layers.layer import Layer
from mono_quant.graph.layers.linear import DynamicLinear, StaticLinear
from mono_quant.graph.layers.spatial import AveragePool, GlobalAverage, MaxPool, Pad, Spread

#: Every layer by its name in a checkpoint.
KINDS: Final[dict[str, type[Layer]]] = {
    layer.kind: layer
    for layer in (
        Add, AveragePool, Call, Dequantize, DynamicLinear, GlobalAverage, MaxPool, Multiply, Pad, Quantize,
        QuantizedConvolution, Spread, StaticLinear, Table,
    )
}  # fmt: skip

__all__ = ["KINDS", "Layer"]
