"""Static int8 graphs: capture, fold, fuse, calibrate, lower."""

from mono_quant.core import Cut
from mono_quant.graph.options import StaticOptions, StaticReport
from mono_quant.graph.program import StaticGraph
from mono_quant.graph.quantize import quantize_static
from mono_quant.graph.serialize import describe_static, restore_static

__all__ = [
    "Cut",
    "StaticGraph",
    "StaticOptions",
    "StaticReport",
    "describe_static",
    "quantize_static",
    "restore_static",
]
