"""Weights to codes and back: int8 per channel or per tensor, int4 in groups, float16."""

from __future__ import annotations

import torch
from torch import Tensor

from mono_quant.core.mappers import (
    QINT8,
    calculate_scale_zp_groupwise,
    channel_range,
    get_bits_range,
    normalize_axis,
    require_float_tensor,
    scale_zp_from_range,
)
from mono_quant.core.packing import pack_int32, unpack_int32
from mono_quant.core.quantized_tensor import QuantizedTensor, row_chunks
from mono_quant.errors import InputTypeError, QuantizationError


def quantize_affine(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = 0,
    group_size: int | None = None,
    bits: int = 8,
) -> QuantizedTensor:
    """Quantize with given parameters: ``round(x / scale + zero_point)``, clamped to the codes of ``bits`` bits.

    Args:
        tensor: Floating point.
        scale: float32; ``()``, ``[channels]`` or ``[channels, groups]`` (see :class:`QuantizedTensor`).
        zero_point: Any integer dtype of the scale's shape; ``None`` for symmetric codes, whose range is then
            symmetric too (-127 to 127 for 8 bits), so that negating a weight negates its codes.
        axis: The channel axis, or ``None`` per tensor.
        group_size: Elements of a channel in one group, or ``None``.
        bits: 4 or 8.
    """
    qmin, qmax = get_bits_range(bits)
    if zero_point is None:
        qmin = -qmax
    stored_zero_point = None if zero_point is None else zero_point.to(torch.int8)
    rows = tensor.detach().reshape(1, -1) if axis is None else tensor.detach().movedim(axis, 0)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=tensor.device)
    row_scale = scale.reshape(1) if axis is None else scale
    row_zero_point = None if zero_point is None else (zero_point.reshape(1) if axis is None else zero_point)
    for chunk in row_chunks(rows.shape[0], rows[:1].numel()):
        part = rows[chunk]
        values = part.reshape(len(part), -1).float()
        if group_size is not None:
            values = torch.unflatten(values, 1, (-1, group_size))
        # PyTorch's own quantizers multiply with the inverse and round last; in this order the codes agree exactly.
        values = values * row_scale[chunk].unsqueeze(-1).reciprocal()
        if row_zero_point is not None:
            values += row_zero_point[chunk].unsqueeze(-1)
        codes[chunk] = values.round_().clamp_(qmin, qmax).reshape(part.shape)
    codes = codes.reshape(tensor.shape) if axis is None else codes.movedim(0, axis).contiguous()
    return QuantizedTensor(codes, scale, stored_zero_point, axis, group_size, bits)


def quantize_weight_int8(weight: Tensor, symmetric: bool = False, axis: int = 0) -> QuantizedTensor:
    """Quantize ``weight`` to 8 bits with one scale (and zero point) per channel.

    Args:
        weight: Floating point, at least one dimension, for example ``[out, in]`` or ``[out, in, kh, kw]``.
        symmetric: Codes in [-127, 127] around zero instead of [-128, 127] fitted to the range.
        axis: The channel axis; may be negative.

    Returns:
        A per-channel affine quantized tensor. Every element is within half a scale of the original (and two units in
        the last place of its channel's largest element).

    Raises:
        InputTypeError: ``weight`` is not a floating-point tensor.
        InputError: It has no such axis.
        QuantizationError: It holds NaN or infinite values.
    """
    weight = require_float_tensor(weight)
    axis = normalize_axis(axis, weight.dim())
    low, high = channel_range(weight.detach(), axis)
    scale, zero_point = scale_zp_from_range(low, high, -128, 127, symmetric)
    return quantize_affine(weight, scale, None if symmetric else zero_point, axis)


def quantize_weight_int8_per_tensor(weight: Tensor, symmetric: bool = False) -> QuantizedTensor:
    """Quantize ``weight`` to 8 bits with one range for the whole tensor, written out per channel of axis 0.

    The layers compute with one scale per output channel; this repeats the one scale, so that the same kernels serve.
    """
    weight = require_float_tensor(weight)
    normalize_axis(0, weight.dim())
    if weight.numel() == 0:
        return quantize_weight_int8(weight, symmetric)
    low, high = torch.aminmax(weight.detach())
    scale, zero_point = scale_zp_from_range(low, high, -128, 127, symmetric)
    channels = weight.shape[0]
    return quantize_affine(weight, scale.repeat(channels), None if symmetric else zero_point.repeat(channels))


def quantize_weight_groupwise(
    weight: Tensor, group_size: int, symmetric: bool = True, bits: int = 4, axis: int = 0
) -> QuantizedTensor:
    """Quantize ``weight`` with one scale (and zero point) per ``group_size`` inputs of each output channel.

    Args:
        weight: Floating point ``[out, in]`` (further dimensions are flattened into ``in``).
        group_size: Must divide ``in``.
        symmetric: Codes around zero (scale = max|w| / 7 for 4 bits) instead of fitted to the range.
        bits: 4 or 8.
        axis: The output-channel axis; it is moved to the front of the result.

    Raises:
        ConfigurationError: ``group_size`` does not divide ``in``, or ``bits`` is neither 4 nor 8.
        InputTypeError, InputError, QuantizationError: As :func:`quantize_weight_int8`.
    """
    weight = require_float_tensor(weight).detach()
    scale, zero_point = calculate_scale_zp_groupwise(weight, group_size, axis, symmetric, QINT8, bits)
    assert scale is not None
    matrix = weight.movedim(axis, 0).flatten(1)
    return quantize_affine(matrix, scale, None if symmetric else zero_point, 0, group_size, bits)


def quantize_weight_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = True, axis: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``weight`` to 4 bits in groups and pack eight codes into each 32-bit word.

    Args:
        weight: Floating point ``[out, in]`` (further dimensions are flattened into ``in``).
        group_size: Inputs in a group; must divide ``in``.
        symmetric: Codes around zero instead of fitted to the range.
        axis: The output-channel axis.

    Returns:
        ``packed`` int32 ``[out, ceil(in / 8)]``, ``scale`` float32 and ``zero_point`` int8 ``[out, in / group_size]``
        (zeros when symmetric). :func:`dequantize_weight_int4` undoes it.

    Raises:
        ConfigurationError, InputTypeError, InputError, QuantizationError: As :func:`quantize_weight_groupwise`.
    """
    quantized = quantize_weight_groupwise(weight, group_size, symmetric, bits=4, axis=axis)
    zero_point = quantized.zero_point
    if zero_point is None:
        zero_point = torch.zeros_like(quantized.scale, dtype=torch.int8)
    return pack_int32(quantized.codes, 4), quantized.scale, zero_point


def dequantize_weight_int4(packed: Tensor, scale: Tensor, zero_point: Tensor, group_size: int = 128) -> Tensor:
    """Undo :func:`quantize_weight_int4`: answer float32 ``[out, in]`` with ``in = groups * group_size``.

    Raises:
        InputError: ``packed`` does not hold ``groups * group_size`` codes a row.
    """
    codes = unpack_int32(packed, 4, scale.shape[1] * group_size)
    return QuantizedTensor(codes, scale, zero_point, 0, group_size, 4).dequantize()


def quantize_weight_fp16(weight: Tensor) -> Tensor:
    """Answer ``weight`` in float16.

    Raises:
        InputTypeError: ``weight`` is not a floating-point tensor.
        QuantizationError: It holds NaN or infinite values, or values beyond float16's 65,504.
    """
    weight = require_float_tensor(weight)
    # Never the storage of the original, which its owner may write to.
    half = weight.detach().to(torch.float16, copy=True)
    if not bool(torch.isfinite(half).all()):
        raise QuantizationError(
            "the weight holds NaN, infinite values or values beyond 65,504, the largest float16",
            suggestion="Skip the layer, or store it with bits=8, whose scale is float32.",
        )
    return half


def quantize_weight_bf16(weight: Tensor) -> Tensor:
    """Answer ``weight`` in bfloat16.

    Raises:
        InputTypeError: ``weight`` is not a floating-point tensor.
        QuantizationError: It holds NaN or infinite values, or values that round to infinity.
    """
    rounded = require_float_tensor(weight).detach().to(torch.bfloat16, copy=True)
    if not bool(torch.isfinite(rounded).all()):
        raise QuantizationError(
            "the weight holds NaN, infinite values or values beyond the largest bfloat16",
            suggestion="Repair the checkpoint, or skip the layer.",
        )
    return rounded


def dequantize_weight(q_weight: object) -> Tensor:
    """Bring a quantized or float16 weight back to float32.

    Args:
        q_weight: A :class:`QuantizedTensor`, a quantized tensor of PyTorch, or a float16 tensor.

    Raises:
        InputTypeError: It is anything else (a subclass of ``TypeError``).
    """
    if isinstance(q_weight, QuantizedTensor):
        return q_weight.dequantize()
    if isinstance(q_weight, Tensor):
        if q_weight.is_quantized:
            return q_weight.dequantize()
        if q_weight.dtype == torch.float16:
            return q_weight.float()
        raise InputTypeError(
            f"cannot dequantize a tensor of dtype {q_weight.dtype}; expected a quantized or float16 one"
        )
    raise InputTypeError(f"cannot dequantize {type(q_weight).__name__}; expected a quantized or float16 tensor")


__all__ = [
    "dequantize_weight",
    "dequantize_weight_int4",
    "quantize_affine",
    "quantize_weight_bf16",
    "quantize_weight_fp16",
    "quantize_weight_groupwise",
    "quantize_weight_int4",
    "quantize_weight_int8",
    "quantize_weight_int8_per_tensor",
]
