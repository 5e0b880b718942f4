"""Pure-PyTorch specification of the operators, for any device.

That of whole layers and of chains of layers is in :mod:`mono_quant.ops.encoder_reference`,
:mod:`mono_quant.ops.decoder_reference` and :mod:`mono_quant.ops.code_reference`.

These functions define what the operators mean; faster backends must agree with them. Integer products run in float64,
which holds every sum of 8-bit products exactly (up to 2**53), so one formula serves all lengths and all devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant.core.mappers import SMALLEST_SCALE
from mono_quant.core.packing import pack_tiles, unpack_int32, unpack_tiles
from mono_quant.core.quantized_tensor import row_chunks
from mono_quant.errors import ConfigurationError, InputError

# Elements counted at a time: their bin numbers stay in the cache.
_COUNTED_AT_ONCE: Final = 1 << 19


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (torch.erf(x * math.sqrt(0.5)) + 1)


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (torch.tanh((x + 0.044715 * x * x * x) * math.sqrt(2 / math.pi)) + 1)


def _silu(x: Tensor) -> Tensor:
    return x / (torch.exp(-x) + 1)


# Not torch.nn.functional's: those round the last elements of a block differently from the others, so that a row's
# result would depend on the rows around it and on the number of threads. erf, tanh and exp do not.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Answer the function that an operator's ``activation`` argument names.

    Raises:
        ConfigurationError: There is none of that name.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ConfigurationError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}") from None


def flatten_rows(x: Tensor, in_features: int) -> Tensor:
    """Answer ``x`` as ``[rows, in_features]``.

    Raises:
        InputError: The rows of ``x`` have another length, which reshaping might not notice.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise InputError(f"the input has shape {tuple(x.shape)}, the weight expects rows of {in_features} features")
    return x.reshape(x.shape[:-1].numel(), in_features)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every row (the last dimension) on its own: asymmetric, unsigned 8 bits.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.

    Returns:
        ``codes`` uint8 ``[..., K]``, ``scale`` float32 ``[...]`` and ``zero_point`` int32 ``[...]``. A row with a NaN
        or an infinity has a NaN scale, so that whatever is computed from it is NaN, and codes and zero point 0.
    """
    values = x.float()
    if values.shape[-1] == 0:
        low = high = torch.zeros(*values.shape[:-1], 1, device=x.device)
    else:
        low = values.amin(-1, keepdim=True).clamp(max=0)
        high = values.amax(-1, keepdim=True).clamp(min=0)
    # Dividing before subtracting keeps a range that spans all of float32 finite.
    scale = (high / 255 - low / 255).clamp(min=SMALLEST_SCALE)
    finite = torch.isfinite(scale)
    inverse = scale.reciprocal()
    zero_point = torch.where(finite, torch.round(-low * inverse), 0.0)
    codes = (torch.round(values * inverse) + zero_point).clamp(0, 255)
    codes = torch.where(finite, codes, 0.0)
    scale = torch.where(finite, scale, torch.nan)
    return codes.to(torch.uint8), scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def linear_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    activation: str = "none",
) -> Tensor:
    """Quantize the rows of ``x``, multiply as integers, scale at the end.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.
        weight: int8 codes ``[N, K]``.
        weight_scale: float32 ``[N, 1]``.
        weight_zero_point: int8 ``[N, 1]``, or ``None`` for zeros.
        bias: ``[N]`` of any floating dtype, or ``None``.
        activation: One of :data:`ACTIVATIONS`, applied in float32.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    activate = activation_function(activation)
    codes, scale, zero_point = quantize_rows(flatten_rows(x, weight.shape[1]))
    centred = codes.double() - zero_point.unsqueeze(-1)
    weight_codes = weight.double()
    if weight_zero_point is not None:
        weight_codes -= weight_zero_point
    total = torch.matmul(centred, weight_codes.t())
    out = total.float() * scale.unsqueeze(-1) * weight_scale.reshape(-1)
    if bias is not None:
        out = out + bias.float()
    return activate(out).to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def pack_weight(weight: Tensor) -> Tensor:
    """Reorder int8 ``[N, K]`` into the kernels' tiles; see :func:`mono_quant.core.packing.pack_tiles`."""
    return pack_tiles(weight)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo :func:`pack_weight`."""
    return unpack_tiles(packed, out_features, in_features)


def linear_dynamic_packed(
    x: Tensor,
    packed: Tensor,
    column_sum: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """:func:`linear_dynamic` on a weight in tiles.

    Args:
        packed: int8 tiles of ``pack_weight``.
        column_sum: int32 ``[N]``, the sum of each output channel's codes. Kernels need it to correct for the rows'
            zero points; the specification does not.
        out_features: ``N``.
    """
    del column_sum
    weight = unpack_tiles(packed, out_features, x.shape[-1])
    return linear_dynamic(x, weight, weight_scale, weight_zero_point, bias, activation)


def embedding(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Look up rows of an int8 table.

    Args:
        indices: int32 or int64 ``[...]``.
        weight: int8 codes ``[V, D]``.
        weight_scale: float32 ``[V, 1]``.
        weight_zero_point: int8 ``[V, 1]`` or ``None``.
        dtype: Floating dtype of the answer.

    Returns:
        ``[..., D]``.
    """
    rows = F.embedding(indices, weight).float()
    if weight_zero_point is not None:
        rows -= F.embedding(indices, weight_zero_point)
    return rows.mul_(F.embedding(indices, weight_scale)).to(dtype)


def conv_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Quantize each sample of ``x``, convolve as integers, scale at the end.

    Args:
        x: float32, bfloat16 or float16 ``[B, C, *spatial]`` with one to three spatial dimensions.
        weight: int8 codes ``[O, C / groups, *kernel]``.
        weight_scale: float32 ``[O, 1, ...]``.
        weight_zero_point: int8 of that shape, or ``None``.
        bias: ``[O]`` or ``None``.
        stride, padding, dilation: One entry for each spatial dimension; the padding is with zeros.
        groups: Channel groups.

    Returns:
        ``[B, O, *spatial']`` in the dtype of ``x``.
    """
    codes, scale, zero_point = quantize_rows(x.flatten(1))
    # The zero point stands for 0.0, so padding after it is taken away pads with real zeros.
    centred = (codes.double() - zero_point.unsqueeze(-1)).reshape(x.shape)
    weight_codes = weight.double()
    if weight_zero_point is not None:
        weight_codes -= weight_zero_point
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    total = convolve(centred, weight_codes, None, stride, padding, dilation, groups)
    channels = [1, -1] + [1] * (x.dim() - 2)
    samples = [-1, 1] + [1] * (x.dim() - 2)
    out = total.float() * scale.reshape(samples) * weight_scale.reshape(channels)
    if bias is not None:
        out = out + bias.float().reshape(channels)
    # Codes or inputs in channels-last order would give an output in that order.
    return out.to(x.dtype).contiguous()


def linear_weight_only(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """Multiply float rows with weights that are stored in ``bits`` bits, computing in float32.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.
        weight_packed: int32 ``[N, ceil(K * bits / 32)]`` (see :func:`mono_quant.core.packing.pack_int32`).
        weight_scale: float32 ``[N, K / group_size]``.
        weight_zero_point: int8 of that shape, or ``None``.
        bias: ``[N]`` or ``None``.
        in_features: ``K``.
        bits: 4 or 8.
        group_size: Inputs that share one scale.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    rows = flatten_rows(x, in_features).float()
    out = torch.empty(rows.shape[0], weight_packed.shape[0], dtype=x.dtype, device=x.device)
    # A block of output channels at a time: the whole weight in float would cost what quantizing saved.
    for block in row_chunks(weight_packed.shape[0], in_features):
        codes = torch.unflatten(unpack_int32(weight_packed[block], bits, in_features).float(), 1, (-1, group_size))
        if weight_zero_point is not None:
            codes -= weight_zero_point[block].unsqueeze(-1)
        values = codes.mul_(weight_scale[block].unsqueeze(-1)).flatten(1)
        out[:, block] = F.linear(rows, values, None if bias is None else bias[block].float())
    return out.reshape(*x.shape[:-1], weight_packed.shape[0])


def linear_half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply float rows with a weight that is stored in float16, computing in float32.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.
        weight: float16 ``[N, K]``.
        bias: ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    rows = flatten_rows(x, weight.shape[1]).float()
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for block in row_chunks(weight.shape[0], weight.shape[1]):
        out[:, block] = F.linear(rows, weight[block].float(), None if bias is None else bias[block].float())
    return out.reshape(*x.shape[:-1], weight.shape[0])


def count_values(x: Tensor, bins: int, exponent: int) -> Tensor:
    """Count values in bins of the width ``2 ** exponent``.

    Args:
        x: float32, any shape, finite.
        bins: A power of two.
        exponent: At least -126, and such that every value has a bin.

    Returns:
        int64 ``[bins]``: bin ``i`` counts the values in ``((i - bins / 2) * width, (i - bins / 2 + 1) * width]``.
    """
    values = x.reshape(-1)
    total = torch.zeros(bins, dtype=torch.int64, device=x.device)
    # PyTorch counts on one core; Python's threads put the others to use.
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        waiting = []
        for chunk in values.split(_COUNTED_AT_ONCE):
            # Scaling up by a power of two is exact in float32; scaling down may underflow, and is done in float64.
            exact = chunk.double() if exponent > 0 else chunk
            numbers = (exact * math.ldexp(1.0, -exponent)).ceil_().add_(bins // 2 - 1).to(torch.int32)
            waiting.append(pool.submit(torch.bincount, numbers, minlength=bins))
            if len(waiting) > torch.get_num_threads():
                total += waiting.pop(0).result()
        for counted in waiting:
            total += counted.result()
    return total
