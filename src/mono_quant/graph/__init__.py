"""Static int8 graphs: capture, fold, fuse, calibrate, lower."""

from mono_quant.core import Cut
from mono_quant.graph.contents import (
    StaticRange,
    StaticWeight,
    described_ranges,
    described_tensors,
    is_static,
    static_weights,
)
from mono_quant.graph.layerwise import StaticLayer
from mono_quant.graph.options import StaticOptions, StaticReport
from mono_quant.graph.program import StaticGraph
from mono_quant.graph.quantize import quantize_static
from mono_quant.graph.serialize import describe_static, restore_static

__all__ = [
    "Cut",
    "StaticGraph",
    "StaticLayer",
    "StaticOptions",
    "StaticRange",
    "StaticReport",
    "StaticWeight",
    "describe_static",
    "described_ranges",
    "described_tensors",
    "is_static",
    "quantize_static",
    "restore_static",
    "static_weights",
]
