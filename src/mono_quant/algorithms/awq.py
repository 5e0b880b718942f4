"""AWQ: larger weights, and so finer codes, for the inputs that carry most.

Lin, Tang, Tang, Yang, Dang and Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
(2023): the weights of an input are multiplied, and the input divided, by a power of the input's mean magnitude. The
power is the one that, tried on sampled inputs, leaves the smallest error in the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from mono_quant.algorithms.grid import Grid
from mono_quant.core.layer_scheme import LayerScheme

#: Brings a proposed scale ``[in]`` into a form that can be folded.
Constraint = Callable[[Tensor], Tensor]

_POWERS: Final = tuple(step / 20 for step in range(1, 21))
_SMALLEST: Final = 1e-4


def search_awq_scale(
    matrices: Sequence[Tensor], schemes: Sequence[LayerScheme], rows: Tensor, constrain: Constraint | None = None
) -> Tensor | None:
    """Answer the factors by which the weights of each input are to be multiplied, float32 ``[in]``.

    Args:
        matrices: The weights ``[out, in]`` of all layers that share the input.
        schemes: The scheme of each.
        rows: Sampled inputs, float32 ``[n, in]``.
        constrain: See :data:`Constraint`.

    Returns:
        ``None`` if no scaling tried is better than none.
    """
    magnitude = rows.abs().mean(dim=0).clamp_(min=_SMALLEST)
    proposals = (magnitude**power for power in _POWERS)
    return best_scale(proposals, lambda scale: _error(matrices, schemes, rows, scale), magnitude, constrain)


def best_scale(
    proposals: Iterable[Tensor], error: Callable[[Tensor], float], like: Tensor, constrain: Constraint | None
) -> Tensor | None:
    """Answer the proposal with the smallest error, or ``None`` if none is better than factors of 1."""
    best, smallest = None, error(torch.ones_like(like))
    for proposal in proposals:
        scale = proposal if constrain is None else constrain(proposal)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if not bool(torch.isfinite(scale).all() & (scale > 0).all()):
            continue
        found = error(scale)
        if found < smallest:
            best, smallest = scale, found
    return best


def _error(matrices: Sequence[Tensor], schemes: Sequence[LayerScheme], rows: Tensor, scale: Tensor) -> float:
    total = 0.0
    for matrix, scheme in zip(matrices, schemes, strict=True):
        scaled = matrix.float() * scale
        grid = Grid.from_range(scaled, scheme)
        difference = (grid.values(grid.round(scaled)) - scaled) / scale
        total += float((rows @ difference.t()).square().sum())
    return total
