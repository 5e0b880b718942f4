"""The configuration object of mono-quant 1.1, kept for its users: the options that concern numbers, in one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from mono_quant.core.mappers import QINT8, QUINT8
from mono_quant.errors import ConfigurationError


@dataclass(frozen=True)
class QuantizationConfig:
    """Number format of quantized weights.

    Attributes:
        dtype: ``torch.qint8``, ``torch.quint8`` (8 bits, asymmetric) or ``torch.float16`` (16 bits).
        symmetric: Whether weights have no zero points; ``None`` leaves it to ``scheme`` of the call.
        per_channel: One scale per output channel; ``False`` for one per tensor.
        bits: 4, 8 or 16.

    Raises:
        ConfigurationError: A value is impossible, or two contradict each other (a subclass of ``ValueError``).
    """

    dtype: torch.dtype = QINT8
    symmetric: bool | None = None
    per_channel: bool = True
    bits: int = 8

    def __post_init__(self) -> None:
        if self.dtype not in (QINT8, QUINT8, torch.float16):
            raise ConfigurationError(f"dtype={self.dtype} is not one of torch.qint8, torch.quint8, torch.float16")
        if self.bits not in (4, 8, 16):
            raise ConfigurationError(f"bits={self.bits} is not one of 4, 8, 16")
        if self.bits == 4 and self.dtype != QINT8:
            raise ConfigurationError(f"4-bit codes are signed; expected dtype=torch.qint8, found {self.dtype}")
        if self.bits == 16 and self.dtype != torch.float16:
            raise ConfigurationError(f"bits={self.bits} and dtype={self.dtype} contradict each other")

    @classmethod
    def from_kwargs(
        cls,
        config: QuantizationConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        symmetric: bool | None = None,
        per_channel: bool | None = None,
        bits: int | None = None,
    ) -> Self:
        """Answer ``config`` (or the defaults) with the given values in place of its own."""
        base = cls() if config is None else config
        given = {"dtype": dtype, "symmetric": symmetric, "per_channel": per_channel, "bits": bits}
        merged = {**vars(base), **{name: value for name, value in given.items() if value is not None}}
        return replace(cls(), **merged)
