"""Inputs that a layer cannot take as they are: widened where that means something, refused by name where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from mono_quant.errors import InputError, InputTypeError

#: What the operators compute with.
FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
INDICES: Final = (torch.int64, torch.int32)


def describe(layer: nn.Module) -> str:
    """Answer a layer's type and geometry: it does not know its own name in the model."""
    return f"{type(layer).__name__}({layer.extra_repr()})"


def forward_other(layer: nn.Module, input: Tensor, in_features: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Answer what a linear layer makes of an input that its operators do not take.

    The arithmetic is float32 throughout: float64 is computed in it, by ``multiply``, and answered in float64.

    Raises:
        InputTypeError: The input is not floating-point, or a float of less than 16 bits.
        InputError: Its last dimension is not ``in_features``.
    """
    if input.dtype not in FLOATS and input.dtype != torch.float64:
        raise InputTypeError(
            f"{describe(layer)} expects float32, bfloat16, float16 or float64, found an input of {input.dtype}",
            suggestion="Convert it before, for example with input.float().",
        )
    if not input.dim() or input.shape[-1] != in_features:
        # Tiles are padded: the kernels cannot tell a row of the wrong length from a right one.
        raise InputError(f"{describe(layer)} expects [..., {in_features}], found an input of shape {list(input.shape)}")
    return multiply(input.float()).double()


def require_indices(layer: nn.Module, indices: Tensor) -> None:
    """Refuse indices that are not integers of 32 or 64 bits.

    Raises:
        InputTypeError: They are of another dtype.
    """
    if indices.dtype not in INDICES:
        raise InputTypeError(
            f"{describe(layer)} expects int64 or int32 indices, found {indices.dtype}",
            suggestion="Convert them before, for example with indices.long().",
        )
