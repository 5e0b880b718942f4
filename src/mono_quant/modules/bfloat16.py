"""Products in bfloat16 inside a model of another dtype.

PyTorch's own product does the work; what is left to win is traffic. On a processor with bfloat16 units the product of
a wide layer takes no longer than writing its output twice, once for the conversion and once for an activation. So the
activation is computed in bfloat16, and long inputs go through in pieces whose intermediate values stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of a piece's output in bfloat16.
_PIECE_BYTES: Final = 800_000
_SMALLEST_PIECE: Final = 32

_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear_bfloat16(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Multiply rows with a bfloat16 weight in bfloat16.

    Args:
        input: Floating point ``[..., K]``.
        weight: bfloat16 ``[N, K]``.
        bias: Floating point ``[N]``, rounded to bfloat16.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``; computed on the rounded product.

    Returns:
        ``[..., N]`` in the dtype of ``input``.
    """
    half = None if bias is None else bias.to(torch.bfloat16)
    function = _ACTIVATIONS[activation]

    def piece(rows: Tensor) -> Tensor:
        return function(F.linear(rows.to(torch.bfloat16), weight, half))

    # Inside a compiled model the compiler joins what would be written twice.
    if torch.compiler.is_compiling() or input.dtype == torch.bfloat16 or input.dim() == 1:
        return piece(input).to(input.dtype)
    size = max(_SMALLEST_PIECE, _PIECE_BYTES // (2 * max(1, weight.shape[0])))
    rows = input.reshape(-1, input.shape[-1])
    if len(rows) <= size:
        return piece(input).to(input.dtype)
    output = input.new_empty(len(rows), weight.shape[0])
    for start in range(0, len(rows), size):
        output[start : start + size] = piece(rows[start : start + size])
    return output.reshape(*input.shape[:-1], -1)
