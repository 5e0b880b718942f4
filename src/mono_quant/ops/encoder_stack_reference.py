"""What all layers of an encoder answer in one call: the specification.

As with decoders (:mod:`mono_quant.ops.decoder_stack_reference`), the weights are handed over once and named by a number
from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.ops.encoder_reference import WEIGHTS, encoder_layer
from mono_quant.ops.held_reference import by_layer, numbers


@dataclass(frozen=True)
class _Held:
    weights: tuple[Sequence[Tensor], ...]
    heads: int
    scale: float
    eps: tuple[tuple[float, float], ...]
    activation: str


_held: dict[int, _Held] = {}


def hold_encoder_layers(
    weights: Sequence[Tensor], heads: int, scale: float, eps: Sequence[float], activation: str
) -> int:
    """Take note of the weights of an encoder's layers.

    They are held until :func:`release_encoder_layers` (of the native library: until
    :func:`mono_quant.ops.native.release_encoder_layers`). What is later written into them is seen.

    Args:
        weights: Those of :func:`~mono_quant.ops.encoder_reference.encoder_layer`, of one layer after the other.
        heads, scale, activation: As for one layer; the same in all.
        eps: For each layer what is added to the variances of its two norms.

    Returns:
        A number by which the backend in use knows these layers.

    Raises:
        InputError: The number of weights does not fit.
    """
    each, pairs = by_layer(weights, eps, WEIGHTS)
    number = next(numbers)
    _held[number] = _Held(each, heads, scale, pairs, activation)
    return number


def release_encoder_layers(held: int) -> None:
    """Forget the layers of a number; one that is not there is no error."""
    _held.pop(held, None)


def encoder_layers(held: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """Answer what the layers answer, each called with the answer of the one before.

    Args:
        held: From :func:`hold_encoder_layers`.
        x, mask: As for one layer.

    Returns:
        ``[samples, length, width]`` in the dtype of ``x``.

    Raises:
        InputError: There are no layers of this number, or a size does not fit.
    """
    if held not in _held:
        raise InputError(f"there are no encoder layers of number {held}")
    layers = _held[held]
    for weights, (first, second) in zip(layers.weights, layers.eps, strict=True):
        x = encoder_layer(x, mask, weights, layers.heads, layers.scale, first, second, layers.activation)
    return x
