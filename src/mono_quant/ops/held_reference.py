"""Weights of all layers of a model, handed over once: what the specifications of encoders and decoders share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from mono_quant.errors import InputError

_EPS: Final = 2

#: By which held layers are known. Below zero: those of the native library are not.
numbers: Final = itertools.count(-1, -1)


def by_layer(
    weights: Sequence[Tensor], eps: Sequence[float], tensors_each: int
) -> tuple[tuple[Sequence[Tensor], ...], tuple[tuple[float, float], ...]]:
    """Answer the weights of each layer, and what is added to the variances or mean squares of its two norms.

    Raises:
        InputError: There are no layers, or the numbers of weights and eps do not fit.
    """
    layers = len(weights) // tensors_each
    if not layers or len(weights) != layers * tensors_each or len(eps) != layers * _EPS:
        raise InputError(
            f"got {len(weights)} weights and {len(eps)} eps, expected {tensors_each} and {_EPS} for each layer"
        )
    each = tuple(weights[at : at + tensors_each] for at in range(0, len(weights), tensors_each))
    return each, tuple(zip(eps[::2], eps[1::2], strict=True))
