"""What one layer of a decoder of the Llama family answers: the specification of ``decoder_layer``, and its shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.ops.encoder_reference import TENSORS_EACH, attend

#: The linear layers in the order in which ``weights`` holds them, see :mod:`mono_quant.ops.encoder_reference`. The
#: weights of the norm before attention and of the norm before the feed-forward part follow.
LINEARS: Final = ("query", "key", "value", "output", "gate", "up", "down")
WEIGHTS: Final = len(LINEARS) * TENSORS_EACH + 2


def decoder_layer(
    linear: Callable[..., Tensor],
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

    Args:
        linear: The specification of ``linear_dynamic_packed``.
        x: float32 ``[samples, length, width]``.
        past_keys, past_values: float32 ``[samples, key heads, past, depth]``; the sizes of heads are read from them.
        cosine, sine: The angles of the positions of ``x``, float32 ``[samples or 1, length, depth]``. Pairs of elements
            half a head apart are rotated, as in GPT-NeoX.
        mask: ``None``, bool (``True`` is seen) or float32 (added), ``[samples or 1, 1, length or 1, past + length]``.
        weights: For each of :data:`LINEARS` tiles, column sums, scales, bias and zero points; then the norms' weights.
        heads: Heads of queries, a multiple of those of keys.
        scale: What scores are multiplied with.
        attention_eps, output_eps: Added to the mean squares of the two norms.
        causal: Whether a token sees itself and what lies before only; the last sees all.
        activation: What ``gate`` goes through, see :data:`mono_quant.ops.ACTIVATIONS`.

    Returns:
        float32 ``[samples, length, width]``, and keys and values ``[samples, key heads, past + length, depth]``.

    Raises:
        InputError: The number of weights, or a size, does not fit.
    """
    if len(weights) != WEIGHTS:
        raise InputError(f"decoder_layer got {len(weights)} weights, expected {WEIGHTS}")
    samples, length, _ = x.shape
    key_heads, depth = past_keys.shape[1], past_keys.shape[3]
    if heads < 1 or heads % key_heads or depth % 2:
        raise InputError(f"{heads} heads over {key_heads} heads of keys of {depth} elements are no attention")

    def project(name: str, rows: Tensor, act: str = "none") -> Tensor:
        at = LINEARS.index(name) * TENSORS_EACH
        tiles, column_sum, weight_scale, bias, zero_point = weights[at : at + TENSORS_EACH]
        zeros = zero_point.reshape(-1, 1) if zero_point.numel() else None
        return linear(rows, tiles, column_sum, weight_scale, zeros, bias, weight_scale.numel(), act)

    def split(rows: Tensor) -> Tensor:
        return rows.view(samples, length, rows.shape[-1] // depth, depth).transpose(1, 2)

    normed = _norm(x, weights[-2], attention_eps)
    query = _rotate(split(project("query", normed)), cosine, sine)
    keys = torch.cat([past_keys, _rotate(split(project("key", normed)), cosine, sine)], dim=2)
    values = torch.cat([past_values, split(project("value", normed))], dim=2)
    group = heads // key_heads
    seen = _causal(mask, length, keys.shape[2]) if causal else mask
    context = attend(query, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1), seen, scale)
    hidden = x + project("output", context.transpose(1, 2).reshape(samples, length, heads * depth))
    normed = _norm(hidden, weights[-1], output_eps)
    return hidden + project("down", project("gate", normed, activation) * project("up", normed)), keys, values


def _causal(mask: Tensor | None, queries: int, keys: int) -> Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
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
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(grown, dtype=x.dtype, device=x.device),
            torch.empty(grown, dtype=x.dtype, device=x.device))  # fmt: skip
