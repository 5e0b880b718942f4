"""SmoothQuant: moves the outliers of a layer's inputs into its weights, where they do less harm.

Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models" (2022): each input is divided by ``max|x| ** a / max|w| ** (1 - a)`` and its weights are multiplied by
it. The paper sets the migration strength ``a`` by hand, mostly to 0.5; here it is the one that leaves the smallest
error in the outputs of sampled inputs, with inputs quantized row by row as the layers do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mono_quant import ops as ops  # registers the operator that quantizes rows
from mono_quant.algorithms.awq import Constraint, best_scale
from mono_quant.algorithms.grid import Grid
from mono_quant.core.layer_scheme import INT8_DYNAMIC, LayerScheme

_STRENGTHS: Final = tuple(step / 20 for step in range(1, 21))
_SMALLEST: Final = 1e-5


def search_smoothing_scale(
    matrices: Sequence[Tensor],
    schemes: Sequence[LayerScheme],
    rows: Tensor,
    constrain: Constraint | None = None,
    strengths: Sequence[float] = _STRENGTHS,
) -> Tensor | None:
    """Answer the factors by which each input is to be divided, and its weights multiplied, float32 ``[in]``.

    Args:
        matrices: The weights ``[out, in]`` of all layers that share the input.
        schemes: The scheme of each.
        rows: Sampled inputs, float32 ``[n, in]``.
        constrain: See :data:`mono_quant.algorithms.awq.Constraint`.
        strengths: Migration strengths to try, in [0, 1].

    Returns:
        ``None`` if no strength is better than leaving the inputs as they are.
    """
    inputs = rows.abs().amax(dim=0).clamp_(min=_SMALLEST)
    weights = torch.stack([matrix.detach().float().abs().amax(dim=0) for matrix in matrices]).amax(dim=0)
    weights = weights.clamp_(min=_SMALLEST)
    exact = [rows @ matrix.detach().float().t() for matrix in matrices]
    proposals = (inputs**strength / weights ** (1 - strength) for strength in strengths)
    return best_scale(proposals, lambda scale: _error(matrices, schemes, rows, exact, scale), inputs, constrain)


def _error(
    matrices: Sequence[Tensor], schemes: Sequence[LayerScheme], rows: Tensor, exact: Sequence[Tensor], scale: Tensor
) -> float:
    smooth = rows / scale
    quantized = quantized_rows(smooth)
    total = 0.0
    for matrix, scheme, outputs in zip(matrices, schemes, exact, strict=True):
        scaled = matrix.detach().float() * scale
        grid = Grid.from_range(scaled, scheme)
        inputs = quantized if scheme.kind == INT8_DYNAMIC else smooth
        total += float((inputs @ grid.values(grid.round(scaled)).t() - outputs).square_().sum())
    return total


def quantized_rows(rows: Tensor) -> Tensor:
    """Answer what dynamically quantized rows stand for, float32 of the same shape."""
    codes, scale, zero_point = torch.ops.mono_quant.quantize_rows(rows)
    values: Tensor = (codes.float() - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)
    return values
