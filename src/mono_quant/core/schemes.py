"""Quantization schemes: how a value range becomes a scale and a zero point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant.core.mappers import channel_range, normalize_axis, require_float_tensor, scale_zp_from_range


class QuantizationScheme(ABC):
    """Turns a tensor's range into quantization parameters."""

    @abstractmethod
    def calculate(self, tensor: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
        """Answer scale and zero point, per tensor or per channel along ``axis``.

        Args:
            tensor: Floating point.
            axis: ``None`` for one pair, shape ``()``; otherwise one pair for each index along it.

        Returns:
            ``scale`` float32 and ``zero_point`` int32.

        Raises:
            InputTypeError: ``tensor`` is not a floating-point tensor.
            InputError: It has no such axis.
            QuantizationError: It holds NaN or infinite values.
        """


@dataclass(frozen=True)
class _RangeScheme(QuantizationScheme):
    qmin: int = -128
    qmax: int = 127

    def _range(self, tensor: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        tensor = require_float_tensor(tensor).detach()
        if axis is not None:
            return channel_range(tensor, normalize_axis(axis, tensor.dim()))
        if tensor.numel() == 0:
            zero = torch.zeros((), device=tensor.device)
            return zero, zero
        low, high = torch.aminmax(tensor)
        return low, high


@dataclass(frozen=True)
class SymmetricScheme(_RangeScheme):
    """Codes centred on zero: ``scale = max|x| / qmax``, zero point 0 (the middle code if codes are unsigned)."""

    def calculate(self, tensor: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
        low, high = self._range(tensor, axis)
        return scale_zp_from_range(low, high, self.qmin, self.qmax, symmetric=True)


@dataclass(frozen=True)
class AsymmetricScheme(_RangeScheme):
    """Codes fitted to the range, widened to hold 0: ``scale = (max - min) / (qmax - qmin)``, zero point rounded."""

    def calculate(self, tensor: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
        low, high = self._range(tensor, axis)
        return scale_zp_from_range(low, high, self.qmin, self.qmax, symmetric=False)
