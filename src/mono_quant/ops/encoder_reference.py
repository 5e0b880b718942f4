"""What one layer of a transformer encoder answers: the specification of ``encoder_layer``, and its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.ops.reference import activation_function, linear_dynamic_packed, linear_weight_only

#: The linear layers in the order in which ``weights`` holds them, :data:`TENSORS_EACH` tensors for each. Weight and
#: bias of the norm after attention and of the norm after the feed-forward pair follow.
LINEARS: Final = ("query", "key", "value", "output", "up", "down")
TENSORS_EACH: Final = 5
WEIGHTS: Final = len(LINEARS) * TENSORS_EACH + 4


def encoder_layer(
    x: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    heads: int,
    scale: float,
    attention_eps: float,
    output_eps: float,
    activation: str,
) -> Tensor:
    """Answer ``y = norm(h + down(act(up(h))))`` with ``h = norm(x + output(attention(x)))``, computed in float32.

    Args:
        x: float32 or bfloat16 ``[samples, length, width]``.
        mask: ``None``, bool (``True`` is seen), float32 or bfloat16 (added to the scores), ``[samples or 1, 1, length
            or 1, length]``. A query that sees nothing gets zeros from attention.
        weights: For each of :data:`LINEARS` tiles, column sums int32, scales float32, bias float32 and zero points
            int8 (empty for a symmetric weight); then weight and bias of the two norms, float32 or bfloat16.
        heads: Number of attention heads; divides ``width``.
        scale: What scores are multiplied with.
        attention_eps, output_eps: Added to the variances of the two norms.
        activation: Between ``up`` and ``down``, see :data:`mono_quant.ops.ACTIVATIONS`.

    Returns:
        ``[samples, length, width]`` in the dtype of ``x``.

    Raises:
        InputError: The number of weights, or a size, does not fit.
    """
    if len(weights) != WEIGHTS:
        raise InputError(f"encoder_layer got {len(weights)} weights, expected {WEIGHTS}")
    dtype, (samples, length, width) = x.dtype, x.shape
    if heads < 1 or width % heads:
        raise InputError(f"the width {width} is not a multiple of the number of heads {heads}")

    def project(name: str, rows: Tensor, act: str = "none") -> Tensor:
        return linear_at(LINEARS.index(name), weights, rows, act)

    def split(rows: Tensor) -> Tensor:
        return rows.view(samples, length, heads, width // heads).transpose(1, 2)

    x = x.float()
    query, key, value = (split(project(name, x)) for name in ("query", "key", "value"))
    context = attend(query, key, value, mask, scale).transpose(1, 2).reshape(samples, length, width)
    first, second = weights[-4:-2], weights[-2:]
    hidden = _norm(project("output", context) + x, first[0], first[1], attention_eps)
    wide = project("up", hidden, activation)
    return _norm(project("down", wide) + hidden, second[0], second[1], output_eps).to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Answer ``softmax(query key^T * scale + mask) value`` for ``[..., rows, depth]``; zeros where all is masked."""
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0) @ value


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight.float(), bias.float(), eps)


def linear_at(place: int, weights: Sequence[Tensor], rows: Tensor, activation: str) -> Tensor:
    """Answer what the linear layer at ``place`` among ``weights`` makes of ``rows``.

    In the place of tiles and column sums there may be the int32 words of few-bit values and their bits, as one int32;
    then scales and zero points are ``[outputs, groups]``.
    """
    tiles, column_sum, weight_scale, bias, zero_point = weights[place * TENSORS_EACH : (place + 1) * TENSORS_EACH]
    if tiles.dtype == torch.int32:
        inputs, groups = rows.shape[-1], weight_scale.shape[1]
        zeros = zero_point if zero_point.numel() else None
        out = linear_weight_only(
            rows, tiles, weight_scale, zeros, bias, inputs, int(column_sum), inputs // max(groups, 1)
        )
        return activation_function(activation)(out)
    zeros = zero_point.reshape(-1, 1) if zero_point.numel() else None
    return linear_dynamic_packed(rows, tiles, column_sum, weight_scale, zeros, bias, weight_scale.numel(), activation)


def hidden_states_shape(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
