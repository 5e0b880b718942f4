"""What all layers of a decoder answer in one call: specification and shapes.

The weights are handed over once and named by a number from then on: a decoder of thirty layers has a thousand tensors,
more than a call for one token should have to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.ops.decoder_reference import WEIGHTS, decoder_layer, decoder_layer_static_cache
from mono_quant.ops.encoder_reference import hidden_states_shape
from mono_quant.ops.held_reference import by_layer, numbers


@dataclass(frozen=True)
class _Held:
    weights: tuple[Sequence[Tensor], ...]
    heads: int
    sizes: tuple[int, int]
    scale: float
    eps: tuple[tuple[float, float], ...]
    activation: str


_held: dict[int, _Held] = {}


def hold_decoder_layers(
    weights: Sequence[Tensor],
    heads: int,
    key_heads: int,
    depth: int,
    scale: float,
    eps: Sequence[float],
    activation: str,
) -> int:
    """Take note of the weights of a decoder's layers.

    They are held until :func:`release_decoder_layers` (of the native library: until
    :func:`mono_quant.ops.native.release_decoder_layers`). What is later written into them is seen.

    Args:
        weights: Those of :func:`~mono_quant.ops.decoder_reference.decoder_layer`, of one layer after the other.
        heads, key_heads, depth: Heads of queries, heads of keys, and the elements of each, in every layer.
        scale: What scores are multiplied with.
        eps: For each layer what is added to the mean squares of its two norms.
        activation: What ``gate`` goes through, see :data:`mono_quant.ops.ACTIVATIONS`.

    Returns:
        A number by which the backend in use knows these layers.

    Raises:
        InputError: The number of weights does not fit.
    """
    each, pairs = by_layer(weights, eps, WEIGHTS)
    number = next(numbers)
    _held[number] = _Held(each, heads, (key_heads, depth), scale, pairs, activation)
    return number


def release_decoder_layers(held: int) -> None:
    """Forget the layers of a number; one that is not there is no error."""
    _held.pop(held, None)


def decoder_layers(
    held: int,
    x: Tensor,
    past_keys: Sequence[Tensor],
    past_values: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Answer what the layers answer, each called with the answer of the one before.

    Args:
        held: From :func:`hold_decoder_layers`.
        x: float32 or bfloat16 ``[samples, length, width]``.
        past_keys, past_values: For each layer ``[samples, key heads, past, depth]``, all of one length.
        cosine, sine, mask, causal: As for one layer.

    Returns:
        ``[samples, length, width]``, and for each layer its keys and its values
        ``[samples, key heads, past + length, depth]``.

    Raises:
        InputError: There are no layers of this number, or a size does not fit.
    """
    layers = _layers(held, past_keys, past_values)
    keys, values = [], []
    each = zip(layers.weights, layers.eps, past_keys, past_values, strict=True)
    for weights, (first, second), held_keys, held_values in each:
        x, grown_keys, grown_values = decoder_layer(
            x, held_keys, held_values, cosine, sine, mask, weights, layers.heads, layers.scale, first, second, causal,
            layers.activation,
        )  # fmt: skip
        keys.append(grown_keys)
        values.append(grown_values)
    return x, keys, values


def decoder_layers_static_cache(
    held: int,
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    positions: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """Answer what :func:`decoder_layers` does, with keys and values that have room for all tokens from the start.

    Args:
        keys, values: For each layer ``[samples, key heads, capacity, depth]``; changed in place.
        positions: For each layer the number of tokens before those of ``x``, one int64; not changed.

    Returns:
        ``[samples, length, width]``.

    Raises:
        InputError: There are no layers of this number, a size does not fit, or a cache has no room.
    """
    layers = _layers(held, keys, values)
    each = zip(layers.weights, layers.eps, keys, values, positions, strict=True)
    for weights, (first, second), held_keys, held_values, position in each:
        x = decoder_layer_static_cache(
            x, held_keys, held_values, position, cosine, sine, mask, weights, layers.heads, layers.scale, first, second,
            causal, layers.activation,
        )  # fmt: skip
    return x


def _layers(held: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> _Held:
    if held not in _held:
        raise InputError(f"there are no decoder layers of number {held}")
    layers = _held[held]
    sizes = layers.sizes
    for tensor in (*keys, *values):
        if (tensor.shape[1], tensor.shape[3]) != sizes:
            raise InputError(f"keys or values of shape {tuple(tensor.shape)}, expected {sizes[0]} heads of {sizes[1]}")
    return layers


def decoder_layers_shape(
    held: int, x: Tensor, past_keys: Sequence[Tensor], *_: object, **__: object
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    def grown(past: Tensor) -> Tensor:
        samples, heads, length, depth = past.shape
        return torch.empty((samples, heads, length + x.shape[1], depth), dtype=x.dtype, device=x.device)

    return hidden_states_shape(x), [grown(past) for past in past_keys], [grown(past) for past in past_keys]
