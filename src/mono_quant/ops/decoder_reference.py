"""What one layer of a decoder of the Llama family answers, with either kind of cache: specification and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.ops.encoder_reference import TENSORS_EACH, attend, hidden_states_shape, linear_at

#: The linear layers in the order in which ``weights`` holds them, see :mod:`mono_quant.ops.encoder_reference`. The
#: weights of the norm before attention and of the norm before the feed-forward part follow.
LINEARS: Final = ("query", "key", "value", "output", "gate", "up", "down")
WEIGHTS: Final = len(LINEARS) * TENSORS_EACH + 2


def decoder_layer(
    x: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    heads: int,
    scale: float,
    attention_eps: float,
    output_eps: float,
    causal: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer ``h + down(act(gate(norm(h))) * up(norm(h)))`` with ``h = x + output(attention(norm(x)))``.

    All is computed in float32. Where ``x`` is bfloat16, keys and values, what layers with words of few-bit values read,
    and the answer are rounded to it.

    Args:
        x: float32 or bfloat16 ``[samples, length, width]``.
        past_keys, past_values: ``[samples, key heads, past, depth]`` in the dtype of ``x``; the sizes of heads are read
            from them.
        cosine, sine: The angles of the positions of ``x``, float32 or bfloat16 ``[samples or 1, length, depth]``. Pairs
            of elements half a head apart are rotated, as in GPT-NeoX.
        mask: ``None``, bool (``True`` is seen), float32 or bfloat16 (added), ``[samples or 1, 1, length or 1, past +
            length]``.
        weights: For each of :data:`LINEARS` tiles, column sums, scales, bias and zero points, or words of few-bit
            values, bits, scales, bias and zero points (see :func:`~mono_quant.ops.encoder_reference.linear_at`); then
            the norms' weights, in the dtype of ``x``.
        heads: Heads of queries, a multiple of those of keys.
        scale: What scores are multiplied with.
        attention_eps, output_eps: Added to the mean squares of the two norms.
        causal: Whether a token sees itself and what lies before only; the last sees all.
        activation: What ``gate`` goes through, see :data:`mono_quant.ops.ACTIVATIONS`.

    Returns:
        ``[samples, length, width]``, and keys and values ``[samples, key heads, past + length, depth]``, in the dtype
        of ``x``.

    Raises:
        InputError: The number of weights, a size or a dtype does not fit.
    """
    _expect_one_dtype(x, past_keys, past_values)
    past, length = past_keys.shape[2], x.shape[1]

    def grow(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)

    seen = _causal(mask, past, length, past + length) if causal else mask
    sizes, eps = (heads, past_keys.shape[1], past_keys.shape[3]), (attention_eps, output_eps)
    return _layer(x, grow, cosine, sine, seen, weights, sizes, scale, eps, activation)


def decoder_layer_static_cache(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    heads: int,
    scale: float,
    attention_eps: float,
    output_eps: float,
    causal: bool,
    activation: str,
) -> Tensor:
    """Answer what :func:`decoder_layer` does, with keys and values that have room for all tokens from the start.

    Those of ``x`` are written to their places in ``keys`` and ``values``.

    Args:
        keys, values: ``[samples, key heads, capacity, depth]`` in the dtype of ``x``, each row dense; changed in place.
        position: The number of tokens before those of ``x``, one int64.
        mask: As there, but over all keys: ``[samples or 1, 1, length or 1, capacity]``. Without a mask, the keys up to
            the last token of ``x`` are attended to.

    Returns:
        ``[samples, length, width]`` in the dtype of ``x``.

    Raises:
        InputError: The number of weights, a size or a dtype does not fit, or the cache has no room.
    """
    _expect_one_dtype(x, keys, values)
    past, length, capacity = int(position), x.shape[1], keys.shape[2]
    if past < 0 or past + length > capacity:
        raise InputError(
            f"a cache for {capacity} tokens got {length} at position {past}",
            suggestion="Make it larger, or reset it.",
        )

    attended = past + length if mask is None else capacity

    def grow(new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        keys[:, :, past : past + length] = new_keys
        values[:, :, past : past + length] = new_values
        return keys[:, :, :attended], values[:, :, :attended]

    seen = _causal(mask, past, length, attended) if causal else mask
    sizes, eps = (heads, keys.shape[1], keys.shape[3]), (attention_eps, output_eps)
    return _layer(x, grow, cosine, sine, seen, weights, sizes, scale, eps, activation)[0]


def _layer(
    x: Tensor,
    grow: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    cosine: Tensor,
    sine: Tensor,
    seen: Tensor | None,
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int],
    scale: float,
    eps: tuple[float, float],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer the layer's output, and what ``grow`` makes of the keys and values of ``x``; ``seen`` is their mask."""
    heads, key_heads, depth = sizes
    if len(weights) != WEIGHTS:
        raise InputError(f"decoder_layer got {len(weights)} weights, expected {WEIGHTS}")
    dtype, (samples, length, _) = x.dtype, x.shape
    if heads < 1 or heads % key_heads or depth % 2:
        raise InputError(f"{heads} heads over {key_heads} heads of keys of {depth} elements are no attention")

    def project(name: str, rows: Tensor, act: str = "none") -> Tensor:
        place = LINEARS.index(name)
        words = weights[place * TENSORS_EACH].dtype == torch.int32
        return linear_at(place, weights, rows.to(dtype).float() if words else rows, act)

    def split(rows: Tensor) -> Tensor:
        return rows.view(samples, length, rows.shape[-1] // depth, depth).transpose(1, 2)

    x, cosine, sine = x.float(), cosine.float(), sine.float()
    normed = _norm(x, weights[-2].float(), eps[0])
    query = _rotate(split(project("query", normed)), cosine, sine)
    new_keys, new_values = _rotate(split(project("key", normed)), cosine, sine), split(project("value", normed))
    keys, values = grow(new_keys.to(dtype), new_values.to(dtype))
    met = [held.float().repeat_interleave(heads // key_heads, 1) for held in (keys, values)]
    context = attend(query, met[0], met[1], seen, scale)
    hidden = x + project("output", context.transpose(1, 2).reshape(samples, length, heads * depth))
    normed = _norm(hidden, weights[-1].float(), eps[1])
    out = hidden + project("down", project("gate", normed, activation) * project("up", normed))
    return out.to(dtype), keys, values


def _expect_one_dtype(x: Tensor, *caches: Tensor) -> None:
    for cache in caches:
        if cache.dtype != x.dtype:
            raise InputError(f"keys or values are {cache.dtype}, expected the input's {x.dtype}")


def _causal(mask: Tensor | None, past: int, queries: int, keys: int) -> Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(past)[None, None]
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine[:, None] + torch.cat([-second, first], dim=-1) * sine[:, None]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def decoder_layer_shape(x: Tensor, past_keys: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    samples, heads, past, depth = past_keys.shape
    grown = (samples, heads, past + x.shape[1], depth)
    return (hidden_states_shape(x),
            torch.empty(grown, dtype=x.dtype, device=x.device),
            torch.empty(grown, dtype=x.dtype, device=x.device))  # fmt: skip
