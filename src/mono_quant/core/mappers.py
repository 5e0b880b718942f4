"""From tensors to quantization parameters: scale and zero point per tensor, per channel or per group.

Affine quantization maps a real ``x`` to the integer ``round(x / scale + zero_point)`` (Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018). Ranges are computed in float32.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from mono_quant.errors import ConfigurationError, InputError, InputTypeError, QuantizationError

# PyTorch means to remove its quantized dtypes. Until then they name the target of the public functions.
QINT8: Final[torch.dtype] = getattr(torch, "qint8", torch.int8)
QUINT8: Final[torch.dtype] = getattr(torch, "quint8", torch.uint8)

# A scale of zero would divide by zero and a subnormal one would overflow its inverse. The smallest normal number is
# far below any scale that changes a result, and keeps |w - dequantized| <= scale / 2 for a channel of zeros too.
SMALLEST_SCALE: Final[float] = torch.finfo(torch.float32).tiny

_RANGES: Final[dict[torch.dtype, tuple[int, int]]] = {
    QINT8: (-128, 127),
    torch.int8: (-128, 127),
    QUINT8: (0, 255),
    torch.uint8: (0, 255),
}


def get_dtype_range(dtype: torch.dtype) -> tuple[int, int]:
    """Answer the smallest and the largest integer code of ``dtype``.

    Args:
        dtype: ``torch.qint8``, ``torch.quint8``, ``torch.int8`` or ``torch.uint8``.

    Raises:
        ConfigurationError: ``dtype`` has no integer codes.
    """
    try:
        return _RANGES[dtype]
    except KeyError:
        known = ", ".join(str(d) for d in _RANGES)
        raise ConfigurationError(
            f"dtype {dtype} has no integer range; expected one of {known}",
            suggestion="Use torch.qint8 for weights; float16 needs no scale and no zero point.",
        ) from None


def get_bits_range(bits: int) -> tuple[int, int]:
    """Answer the smallest and the largest signed code of ``bits`` bits, for example (-8, 7) for 4."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def require_float_tensor(tensor: object) -> Tensor:
    """Answer ``tensor`` if it is a floating-point tensor.

    Raises:
        InputTypeError: It is not a tensor, or not one of floating point.
    """
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"expected a floating-point torch.Tensor, found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise InputTypeError(f"expected a floating-point tensor, found dtype {tensor.dtype}")
    return tensor


def normalize_axis(axis: int, dim: int) -> int:
    """Answer ``axis`` as a non-negative index into ``dim`` dimensions.

    Raises:
        InputError: The tensor has no such axis.
    """
    if not -dim <= axis < dim:
        raise InputError(f"axis {axis} is out of range for a tensor of {dim} dimensions")
    return axis % dim


def scale_zp_from_range(low: Tensor, high: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Answer scale (float32) and zero point (int32) for the value ranges ``[low, high]``, elementwise.

    Symmetric: ``scale = max(|low|, |high|) / qmax`` with a zero point of 0, or the middle code when the codes are
    unsigned. Asymmetric: the range is widened to hold 0, so that zero stays exact, and the zero point is rounded.

    Raises:
        QuantizationError: A bound is NaN or infinite.
    """
    low, high = low.float(), high.float()
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise QuantizationError(
            "the tensor holds NaN or infinite values, which have no quantization range",
            suggestion="Find the layer that produced them; torch.nan_to_num replaces them if that is what you want.",
        )
    if symmetric:
        middle = 0 if qmin < 0 else (qmin + qmax + 1) // 2
        scale = torch.maximum(low.abs(), high.abs()) / (qmax - middle)
        scale = scale.clamp(min=SMALLEST_SCALE)
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = qmax - qmin
    # Dividing before subtracting keeps a range that spans all of float32 finite.
    scale = (high / steps - low / steps).clamp(min=SMALLEST_SCALE)
    zero_point = torch.round(qmin - low / scale).clamp(qmin, qmax).to(torch.int32)
    return scale, zero_point


def calculate_scale_zp_per_tensor(
    tensor: Tensor, dtype: torch.dtype = QINT8, symmetric: bool = False
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Answer one scale and one zero point for the whole of ``tensor``.

    Args:
        tensor: Floating point, any shape.
        dtype: The codes' dtype (see :func:`get_dtype_range`), or ``torch.float16``, which needs neither.
        symmetric: Centre the codes on zero instead of fitting the range.

    Returns:
        ``scale`` float32 and ``zero_point`` int32, both of shape ``()``; ``(None, None)`` for float16.

    Raises:
        InputTypeError: ``tensor`` is not a floating-point tensor.
        QuantizationError: It holds NaN or infinite values.
        ConfigurationError: ``dtype`` is not a target of quantization.
    """
    tensor = require_float_tensor(tensor).detach()
    if dtype == torch.float16:
        return None, None
    qmin, qmax = get_dtype_range(dtype)
    if tensor.numel() == 0:
        low = high = torch.zeros((), device=tensor.device)
    else:
        low, high = torch.aminmax(tensor)
    return scale_zp_from_range(low, high, qmin, qmax, symmetric)


def calculate_scale_zp_per_channel(
    tensor: Tensor, dtype: torch.dtype = QINT8, symmetric: bool = False, axis: int = 0
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Answer one scale and one zero point for each index along ``axis``.

    Args:
        tensor: Floating point, at least one dimension.
        dtype: The codes' dtype (see :func:`get_dtype_range`), or ``torch.float16``, which needs neither.
        symmetric: Centre the codes on zero instead of fitting the range.
        axis: The channel axis; may be negative.

    Returns:
        ``scale`` float32 and ``zero_point`` int32, both of shape ``(tensor.shape[axis],)``; ``(None, None)`` for
        float16.

    Raises:
        InputTypeError, InputError, QuantizationError, ConfigurationError: As the function per tensor; also when
            there is no such axis.
    """
    tensor = require_float_tensor(tensor).detach()
    axis = normalize_axis(axis, tensor.dim())
    if dtype == torch.float16:
        return None, None
    qmin, qmax = get_dtype_range(dtype)
    low, high = channel_range(tensor, axis)
    return scale_zp_from_range(low, high, qmin, qmax, symmetric)


def channel_range(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Answer minimum and maximum of ``tensor`` for each index along ``axis``; zeros where a channel is empty."""
    others = [d for d in range(tensor.dim()) if d != axis]
    if not others:
        return tensor, tensor
    if tensor.numel() == 0:
        empty = torch.zeros(tensor.shape[axis], device=tensor.device)
        return empty, empty
    return torch.amin(tensor, dim=others), torch.amax(tensor, dim=others)


def calculate_scale_zp_groupwise(
    tensor: Tensor,
    group_size: int = 128,
    axis: int = 0,
    symmetric: bool = True,
    dtype: torch.dtype = QINT8,
    bits: int = 4,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Answer one scale and one zero point for each group of ``group_size`` inputs of each output channel.

    Args:
        tensor: Floating point, at least two dimensions. All but ``axis`` are flattened and cut into groups.
        group_size: Elements in a group; must divide the flattened length.
        axis: The output-channel axis; may be negative.
        symmetric: Centre the codes on zero instead of fitting the range.
        dtype: ``torch.qint8`` (or ``torch.int8``) for integer codes, ``torch.float16`` for none.
        bits: Width of the codes, 4 or 8.

    Returns:
        ``scale`` float32 and ``zero_point`` int32, both of shape ``(channels, length / group_size)``;
        ``(None, None)`` for float16.

    Raises:
        ConfigurationError: ``group_size`` does not divide the length, or ``dtype`` or ``bits`` is not one of these.
        InputTypeError, InputError, QuantizationError: As the function per channel; also for a vector.
    """
    tensor = require_float_tensor(tensor).detach()
    axis = normalize_axis(axis, tensor.dim())
    if dtype == torch.float16:
        return None, None
    if dtype not in (QINT8, torch.int8):
        raise ConfigurationError(f"group-wise codes are signed integers; expected torch.qint8, found {dtype}")
    if bits not in (4, 8):
        raise ConfigurationError(f"bits={bits} is not a group-wise width; expected 4 or 8")
    if tensor.dim() < 2:
        raise InputError(f"groups are cut out of each output channel; expected two dimensions, found {tensor.dim()}")
    groups = split_groups(tensor.movedim(axis, 0).flatten(1), group_size)
    if groups.numel() == 0:
        low = high = torch.zeros(groups.shape[:2], device=tensor.device)
    else:
        low, high = groups.amin(dim=2), groups.amax(dim=2)
    qmin, qmax = get_bits_range(bits)
    return scale_zp_from_range(low, high, qmin, qmax, symmetric)


def split_groups(matrix: Tensor, group_size: int) -> Tensor:
    """Answer ``[out, in]`` as ``[out, in / group_size, group_size]``.

    Raises:
        ConfigurationError: ``group_size`` is not positive or does not divide ``in``.
    """
    in_features = matrix.shape[1]
    if group_size < 1 or in_features % group_size:
        raise ConfigurationError(
            f"group_size={group_size} does not divide the {in_features} inputs of the weight",
            suggestion=f"Choose a divisor of {in_features}, or skip the layer.",
        )
    return matrix.reshape(matrix.shape[0], in_features // group_size, group_size)
