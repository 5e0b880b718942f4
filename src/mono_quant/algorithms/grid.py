"""The values that a layer's codes can stand for: scale and zero point of each group of a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant.core.layer_scheme import WEIGHT_ONLY, LayerScheme
from mono_quant.core.mappers import get_bits_range, scale_zp_from_range, split_groups
from mono_quant.core.quantized_tensor import QuantizedTensor, row_chunks


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a matrix ``[out, in]``, and how its codes are rounded.

    Attributes:
        scale: float32 ``[out, groups]``.
        zero_point: float32 of the same shape, holding integers in [-128, 127]; ``None`` where codes are symmetric.
        group_size: Inputs in a group; ``groups * group_size == in``.
        bits: Width of a code.
    """

    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    bits: int

    @property
    def qmin(self) -> int:
        low, high = get_bits_range(self.bits)
        return -high if self.zero_point is None else low

    @property
    def qmax(self) -> int:
        return get_bits_range(self.bits)[1]

    @classmethod
    def from_range(cls, matrix: Tensor, scheme: LayerScheme) -> Grid:
        """Answer the grid of round-to-nearest: each group from its smallest to its largest weight.

        Args:
            matrix: Floating point ``[out, in]``.
            scheme: An integer scheme.

        Raises:
            ConfigurationError: The scheme's group size does not divide ``in``.
            QuantizationError: The matrix holds NaN or infinite values.
        """
        group_size = group_length(matrix, scheme)
        groups = split_groups(matrix, group_size)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        if not scheme.per_channel:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        qmin, qmax = get_bits_range(scheme.bits)
        scale, zero_point = scale_zp_from_range(low, high, qmin, qmax, scheme.symmetric)
        return cls(scale, None if scheme.symmetric else zero_point.float(), group_size, scheme.bits)

    def columns(self) -> tuple[Tensor, Tensor | None]:
        """Answer scale and zero point of each single weight, ``[out, in]``."""
        scale = self.scale.repeat_interleave(self.group_size, dim=1)
        zero_point = None if self.zero_point is None else self.zero_point.repeat_interleave(self.group_size, dim=1)
        return scale, zero_point

    def round(self, matrix: Tensor) -> Tensor:
        """Answer the nearest codes of ``matrix``, float32 integers ``[out, in]``."""
        groups = split_groups(matrix.float(), self.group_size) * self.scale.unsqueeze(-1).reciprocal()
        if self.zero_point is not None:
            groups = groups + self.zero_point.unsqueeze(-1)
        return groups.round_().clamp_(self.qmin, self.qmax).reshape(matrix.shape)

    def values(self, codes: Tensor) -> Tensor:
        """Answer what ``codes`` stand for, float32 ``[out, in]``."""
        groups = split_groups(codes, self.group_size)
        if self.zero_point is not None:
            groups = groups - self.zero_point.unsqueeze(-1)
        return (groups * self.scale.unsqueeze(-1)).reshape(codes.shape)

    def quantize(self, weight: Tensor, scheme: LayerScheme) -> QuantizedTensor:
        """Answer ``weight``, output channels first, with its codes rounded to nearest, as ``scheme`` stores it."""
        matrix = weight.detach().flatten(1)
        codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        for rows in row_chunks(*matrix.shape):
            zero_point = None if self.zero_point is None else self.zero_point[rows]
            part = Grid(self.scale[rows], zero_point, self.group_size, self.bits)
            codes[rows] = part.round(matrix[rows]).to(torch.int8)
        return self.tensor(codes, scheme, weight.shape)

    def tensor(self, codes: Tensor, scheme: LayerScheme, shape: torch.Size) -> QuantizedTensor:
        """Answer the codes as the layer of ``scheme`` stores them.

        Args:
            codes: Integers ``[out, in]`` of any dtype.
            scheme: The scheme that the grid was made for.
            shape: The stored weight's shape, output channels first.
        """
        zero_point = None if self.zero_point is None else self.zero_point.to(torch.int8)
        if scheme.kind == WEIGHT_ONLY:
            return QuantizedTensor(codes.to(torch.int8), self.scale, zero_point, 0, self.group_size, self.bits)
        flat = None if zero_point is None else zero_point[:, 0]
        return QuantizedTensor(codes.to(torch.int8).reshape(shape), self.scale[:, 0], flat, 0, None, self.bits)


def group_length(matrix: Tensor, scheme: LayerScheme) -> int:
    """Answer how many inputs of ``matrix`` share a scale."""
    return scheme.group_size or max(1, matrix.shape[1])
