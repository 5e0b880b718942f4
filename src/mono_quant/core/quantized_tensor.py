"""The one representation of a quantized tensor: integer codes with their scale and zero point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mono_quant.core.mappers import QINT8
from mono_quant.errors import InputError

# Work on a few megabytes at a time: what is temporary then stays in the cache and never doubles a large weight.
_CHUNK_ELEMENTS = 1 << 18


def row_chunks(rows: int, row_length: int, elements: int = _CHUNK_ELEMENTS) -> Iterator[slice]:
    """Cut ``rows`` rows of ``row_length`` into slices of about ``elements`` elements."""
    step = max(1, elements // max(1, row_length))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes that stand for ``(codes - zero_point) * scale``.

    It answers to the accessors of PyTorch's quantized tensors, and :func:`torch.dequantize` accepts it.

    Attributes:
        codes: int8, the shape of the tensor it stands for.
        scale: float32; ``()`` per tensor, ``[channels]`` per channel, ``[channels, groups]`` per group.
        zero_point: int8 of the scale's shape, or ``None`` where every zero point is 0 (symmetric).
        axis: The channel axis, or ``None`` per tensor.
        group_size: Elements of a channel that share one scale, or ``None``.
        bits: Width of the codes: 8 or 4.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    axis: int | None = 0
    group_size: int | None = None
    bits: int = 8

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.dequantize and len(args) == 1 and isinstance(args[0], cls):
            return args[0].dequantize()
        return NotImplemented

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """``torch.qint8`` as long as PyTorch has it, then ``torch.int8``."""
        return QINT8

    @property
    def is_quantized(self) -> bool:
        return True

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def nbytes(self) -> int:
        """Bytes of codes (packed to their width), scale and zero point."""
        codes = -(-self.codes.numel() * self.bits // 8)
        return codes + self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.nbytes)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.codes.shape if dim is None else self.codes.shape[dim]

    def dim(self) -> int:
        return self.codes.dim()

    def numel(self) -> int:
        return self.codes.numel()

    def int_repr(self) -> Tensor:
        """Answer the codes, int8."""
        return self.codes

    def qscheme(self) -> torch.qscheme:
        """Answer PyTorch's name for per-tensor or per-channel affine quantization.

        Raises:
            InputError: The tensor is group-wise, for which PyTorch has no name.
        """
        if self.group_size is not None:
            raise InputError(
                "a group-wise quantized tensor has no torch.qscheme", suggestion="Read group_size and axis instead."
            )
        return torch.per_tensor_affine if self.axis is None else torch.per_channel_affine

    def q_scale(self) -> float:
        """Answer the one scale of a tensor quantized per tensor."""
        self._require(per_tensor=True)
        return float(self.scale)

    def q_zero_point(self) -> int:
        """Answer the one zero point of a tensor quantized per tensor."""
        self._require(per_tensor=True)
        return 0 if self.zero_point is None else int(self.zero_point)

    def q_per_channel_scales(self) -> Tensor:
        """Answer the scales as PyTorch does: float64 ``[channels]`` (``[channels, groups]`` where group-wise)."""
        self._require(per_tensor=False)
        return self.scale.double()

    def q_per_channel_zero_points(self) -> Tensor:
        """Answer the zero points as PyTorch does: int64, the shape of the scales."""
        self._require(per_tensor=False)
        if self.zero_point is None:
            return torch.zeros_like(self.scale, dtype=torch.int64)
        return self.zero_point.long()

    def q_per_channel_axis(self) -> int:
        self._require(per_tensor=False)
        assert self.axis is not None
        return self.axis

    def _require(self, *, per_tensor: bool) -> None:
        if (self.axis is None) != per_tensor:
            found = "per tensor" if self.axis is None else "per channel"
            asked = "per tensor" if per_tensor else "per channel"
            raise InputError(f"asked for parameters {asked} of a tensor that is quantized {found}")

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Answer the tensor on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero_point=zero_point)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Answer the real values, computed in float32 and rounded to ``dtype``."""
        if self.axis is None:
            return self._values(self.codes, self.scale, self.zero_point, dtype)
        rows = self.codes.movedim(self.axis, 0)
        result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        for chunk in row_chunks(rows.shape[0], rows[:1].numel()):
            codes = rows[chunk].reshape(len(rows[chunk]), -1)
            if self.group_size is not None:
                codes = torch.unflatten(codes, 1, (-1, self.group_size))
            zero_point = None if self.zero_point is None else self.zero_point[chunk].unsqueeze(-1)
            values = self._values(codes, self.scale[chunk].unsqueeze(-1), zero_point, dtype)
            result[chunk] = values.reshape(rows[chunk].shape)
        return result.movedim(0, self.axis)

    def error_energy(self, original: Tensor) -> tuple[float, float]:
        """Answer the sum of squares of ``original`` and of what quantizing it changed.

        Args:
            original: Floating point, of the same shape.
        """
        axis = self.axis or 0
        signal = noise = 0.0
        rows, codes = original.detach().movedim(axis, 0), self.codes.movedim(axis, 0)
        for chunk in row_chunks(rows.shape[0], rows[:1].numel()):
            scale = self.scale if self.axis is None else self.scale[chunk]
            zero_point = self.zero_point if self.zero_point is None or self.axis is None else self.zero_point[chunk]
            part = QuantizedTensor(codes[chunk], scale, zero_point, None if self.axis is None else 0, self.group_size)
            exact = rows[chunk].float()
            signal += float(exact.square().sum())
            noise += float(part.dequantize().sub_(exact).square_().sum())
        return signal, noise

    @staticmethod
    def _values(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        values = codes.float()
        if zero_point is not None:
            values -= zero_point
        # The outermost code may stand for a value half a scale beyond the largest weight, and so beyond the dtype.
        largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return values.mul_(scale).clamp_(-largest, largest).to(dtype)

    def __repr__(self) -> str:
        granularity = "per tensor" if self.axis is None else f"axis={self.axis}"
        if self.group_size is not None:
            granularity += f", group_size={self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"QuantizedTensor(shape={tuple(self.shape)}, bits={self.bits}, {granularity}, {kind})"
