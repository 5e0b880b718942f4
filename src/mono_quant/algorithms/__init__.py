"""Better codes for the same bits: scalings, roundings and bias correction, each named after its paper."""

from mono_quant.algorithms.apply import (
    ALGORITHMS,
    AlgorithmOptions,
    AlgorithmOutcome,
    apply_algorithm,
    needs_data,
    parse_algorithm,
    share_copy,
)
from mono_quant.algorithms.gptq import GPTQOptions, quantize_gptq
from mono_quant.algorithms.grid import Grid
from mono_quant.algorithms.hqq import fit_grid, quantize_data_free

__all__ = [
    "ALGORITHMS",
    "AlgorithmOptions",
    "AlgorithmOutcome",
    "GPTQOptions",
    "Grid",
    "apply_algorithm",
    "fit_grid",
    "needs_data",
    "parse_algorithm",
    "quantize_data_free",
    "quantize_gptq",
    "share_copy",
]
