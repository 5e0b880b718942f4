"""CPU operators made of what PyTorch ships: oneDNN's integer products behind the schemas of this package.

Used where the native library is absent. Rows are worked on in blocks, because PyTorch needs about ten passes for what
a fused kernel does in two: within a block all but the first pass find their data in the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mono_quant.core.mappers import SMALLEST_SCALE
from mono_quant.core.packing import unpack_tiles
from mono_quant.core.quantized_tensor import row_chunks
from mono_quant.locks import ForkSafeLock
from mono_quant.ops import reference

# 255 * 255 * K (a weight less its zero point spans 255 too) must stay below 2**31; the sum is split beyond.
MAX_EXACT_LENGTH = 32_768

# Rows times inputs of one block.
_BLOCK_ELEMENTS = 1 << 18


@cache
def integer_products_are_exact() -> bool:
    """Say whether oneDNN multiplies 8-bit integers without saturating on this processor.

    Before VNNI, x86 processors had only a multiply that clips pairs of products to 16 bits, and oneDNN uses it.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported())


_announcement: list[str] = []


def announce_on_first_use(text: str) -> None:
    """Warn with ``text`` when a linear layer or a convolution first runs on this backend."""
    _announcement[:] = [text]


def _announce() -> None:
    if _announcement:
        warnings.warn(_announcement.pop(), stacklevel=2)


class _DerivedTensors:
    """Tensors computed once from a weight and kept as long as the weight lives and is not written to.

    A write through ``weight.data`` or through memory shared with NumPy is counted nowhere and cannot be seen.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute
        self._entries = WeakTensorKeyDictionary()
        self._lock = ForkSafeLock()

    def get(self, weight: Tensor, *details: object, hint: tuple[object, ...] = ()) -> Tensor:
        """Answer the tensor for ``weight`` and ``details``. ``hint`` goes to its making, but one serves all hints."""
        if weight.is_inference():
            # Inference tensors count no versions, so a write to one would go unnoticed.
            return self._compute(weight, *details, *hint)
        key = (weight._version, weight.data_ptr(), *details)
        with self._lock:
            entry = self._entries.get(weight)
            if entry is None or entry[0] != key:
                entry = (key, self._compute(weight, *details, *hint))
                self._entries[weight] = entry
        value: Tensor = entry[1]
        return value

    def forget(self, weight: Tensor) -> None:
        """Let go of what was computed from ``weight``, and of itself."""
        with self._lock:
            self._entries.pop(weight, None)


def _column_sum(weight: Tensor) -> Tensor:
    return weight.sum(dim=1, dtype=torch.int32)


_column_sums = _DerivedTensors(_column_sum)


def _signed_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows as :func:`reference.quantize_rows` does, with codes and zero points moved down by 128.

    Returns:
        ``codes`` int8 ``[M, K]``, ``scale`` float32 ``[M, 1]`` and ``zero_point`` float32 ``[M, 1]``.
    """
    values = rows.float()
    low = values.amin(1, keepdim=True).clamp_(max=0)
    high = values.amax(1, keepdim=True).clamp_(min=0)
    scale = high.div_(255).sub_(low / 255).clamp_(min=SMALLEST_SCALE)
    scale.masked_fill_(scale == torch.inf, torch.nan)
    inverse = scale.reciprocal()
    zero_point = low.neg_().mul_(inverse).round_().sub_(128)
    scaled = values * inverse
    # A NaN row's codes are arbitrary; its NaN scale makes every output NaN.
    codes = scaled.round_().add_(zero_point).clamp_(-128, 127).to(torch.int8)
    return codes, scale, zero_point


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mono_quant.ops.reference.quantize_rows`."""
    if x.numel() == 0:
        return reference.quantize_rows(x)
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    scale = torch.empty(rows.shape[0])
    zero_point = torch.empty(rows.shape[0], dtype=torch.int32)
    for block in row_chunks(rows.shape[0], rows.shape[1], _BLOCK_ELEMENTS):
        signed, block_scale, block_zero_point = _signed_rows(rows[block])
        broken = block_scale.isnan()
        codes[block] = (signed.view(torch.uint8) ^ 0x80).masked_fill_(broken, 0)
        scale[block] = block_scale[:, 0]
        zero_point[block] = block_zero_point.add_(128).masked_fill_(broken, 0)[:, 0].to(torch.int32)
    return codes.reshape(x.shape), scale.reshape(x.shape[:-1]), zero_point.reshape(x.shape[:-1])


def linear_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    activation: str = "none",
) -> Tensor:
    """See :func:`mono_quant.ops.reference.linear_dynamic`."""
    _announce()
    out_features, in_features = weight.shape
    # torch._int_mm answers wrong products where its matrices are vectors: with one input all strides are 1.
    too_short = in_features <= 1
    if x.numel() == 0 or weight.numel() == 0 or too_short or not integer_products_are_exact():
        return reference.linear_dynamic(x, weight, weight_scale, weight_zero_point, bias, activation)
    activate = reference.activation_function(activation)
    rows = reference.flatten_rows(x, in_features)
    out = torch.empty(rows.shape[0], out_features, dtype=x.dtype)
    column_scale = weight_scale.reshape(-1)
    float_bias = None if bias is None else bias.float()
    for block in row_chunks(rows.shape[0], max(in_features, out_features), _BLOCK_ELEMENTS):
        codes, scale, zero_point = _signed_rows(rows[block])
        result = _integer_product(codes, zero_point.to(torch.int32), weight, weight_zero_point)
        result.mul_(scale).mul_(column_scale)
        if float_bias is not None:
            result.add_(float_bias)
        out[block] = activate(result)
    return out.reshape(*x.shape[:-1], out_features)


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
    """See :func:`mono_quant.ops.reference.linear_dynamic_packed`; unpacks first, for PyTorch has no such layout."""
    del column_sum
    weight = unpack_tiles(packed, out_features, x.shape[-1])
    return linear_dynamic(x, weight, weight_scale, weight_zero_point, bias, activation)


def _integer_product(codes: Tensor, zero_point: Tensor, weight: Tensor, weight_zero_point: Tensor | None) -> Tensor:
    """Answer ``sum_k (codes - zero_point) * (weight - weight_zero_point)`` exactly, rounded to float32 ``[M, N]``."""
    length = codes.shape[1]
    if length > MAX_EXACT_LENGTH:
        total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float64)
        # Pieces of equal size, so that the last one is never a single column.
        pieces = -(-length // MAX_EXACT_LENGTH)
        step = -(-length // pieces)
        for start in range(0, length, step):
            part = slice(start, start + step)
            piece = weight[:, part].contiguous()
            sums = piece.sum(dim=1, dtype=torch.int32)
            total += _corrected_sum(codes[:, part].contiguous(), zero_point, piece, weight_zero_point, sums)
        return total.float()
    return _corrected_sum(codes, zero_point, weight, weight_zero_point, _column_sums.get(weight)).float()


def _corrected_sum(
    codes: Tensor, zero_point: Tensor, weight: Tensor, weight_zero_point: Tensor | None, column_sum: Tensor
) -> Tensor:
    total = torch._int_mm(codes, weight.t())
    total.addr_(zero_point[:, 0], column_sum, alpha=-1)
    if weight_zero_point is not None:
        row_sum = codes.sum(dim=1, dtype=torch.int32) - codes.shape[1] * zero_point[:, 0]
        total.addr_(row_sum, weight_zero_point[:, 0].to(torch.int32), alpha=-1)
    return total


def _prepack_conv(
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    shape: tuple[int, ...],
    zero_point: int,
) -> Tensor:
    scale = torch.ones(weight.shape[0])
    # The layout depends on the input's shape and on whether it has a zero point; with a layout for another input oneDNN
    # reorders the weight at each call.
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        weight, scale, 1.0, zero_point, list(stride), list(padding), list(dilation), groups, list(shape)
    )
    return packed


_packed_convs = _DerivedTensors(_prepack_conv)


def forget(weight: Tensor) -> None:
    """Let go of what was derived from a weight, and of the weight, which is held weakly."""
    for derived in (_column_sums, _packed_convs):
        derived.forget(weight)


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
    """See :func:`mono_quant.ops.reference.conv_dynamic`.

    Samples are convolved one by one: each has its own zero point, and oneDNN corrects for it in int32, exactly.
    """
    taps = weight[:1].numel()
    too_long = taps > MAX_EXACT_LENGTH
    if x.numel() == 0 or weight.numel() == 0 or too_long or not integer_products_are_exact():
        return reference.conv_dynamic(
            x, weight, weight_scale, weight_zero_point, bias, stride, padding, dilation, groups
        )
    codes, scale, zero_point = quantize_rows(x.flatten(1))
    codes = codes.reshape(x.shape)
    first = ((1, *x.shape[1:]), int(zero_point.reshape(-1)[0]))
    packed = _packed_convs.get(weight, tuple(stride), tuple(padding), tuple(dilation), groups, hint=first)
    convolve = _QCONVS[x.dim() - 3]
    column_scale = weight_scale.reshape(-1)
    no_zero_points = torch.zeros(weight.shape[0], dtype=torch.int64)
    # Where the weight has zero points, the bias is added after their correction.
    fused_bias = None if bias is None or weight_zero_point is not None else bias.float()
    samples = []
    for sample, (sample_scale, sample_zero_point) in enumerate(zip(scale.tolist(), zero_point.tolist(), strict=True)):
        samples.append(
            convolve(
                codes[sample : sample + 1], sample_scale, sample_zero_point, packed, column_scale, no_zero_points,
                fused_bias, stride, padding, dilation, groups, 1.0, 0, torch.float32, "none", [], "",
            )
        )  # fmt: skip
    out = samples[0] if len(samples) == 1 else torch.cat(samples)
    if weight_zero_point is not None:
        centred = codes.to(torch.int16) - zero_point.to(torch.int16).reshape(-1, *[1] * (x.dim() - 1))
        windows = _window_sums(centred, weight, stride, padding, dilation, groups)
        channels = (1, -1, *[1] * (x.dim() - 2))
        factor = (column_scale * weight_zero_point.reshape(-1)).reshape(channels)
        out -= windows.mul_(scale.reshape(-1, *[1] * (x.dim() - 1))).mul(factor)
        if bias is not None:
            out += bias.float().reshape(channels)
    # Codes or inputs in channels-last order would give an output in that order.
    return out.to(x.dtype).contiguous()


_QCONVS: tuple[Callable[..., Tensor], ...] = (
    torch.ops.onednn.qconv1d_pointwise,
    torch.ops.onednn.qconv2d_pointwise,
    torch.ops.onednn.qconv3d_pointwise,
)


def _window_sums(
    centred: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Answer the sum of ``centred`` under the kernel at every output position, float32 ``[B, O, *spatial']``."""
    sums = torch.unflatten(centred, 1, (groups, -1)).sum(dim=2, dtype=torch.int32).float()
    ones = torch.ones(groups, 1, *weight.shape[2:])
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[centred.dim() - 3]
    windows = convolve(sums, ones, None, stride, padding, dilation, groups)
    return windows.repeat_interleave(weight.shape[0] // groups, dim=1)
