"""Histograms that merge without error: bins as wide as a power of two, with an edge at zero."""

from __future__ import annotations

from typing import Final, NamedTuple, Self

import torch
from torch import Tensor

from mono_quant import ops as ops  # registers the operator that counts
from mono_quant.calibration.observers.observer import Observer
from mono_quant.core.mappers import QINT8
from mono_quant.errors import ConfigurationError

# Narrower bins would need the inverse of a width that float32 does not have.
_SMALLEST_EXPONENT: Final = -126


class Counts(NamedTuple):
    """What a histogram observer knows.

    Attributes:
        counts: int64 ``[channels, bins]``. With ``h = bins / 2``, bin ``i`` counts the values in
            ``((i - h) * width, (i - h + 1) * width]``, so that exact zeros of a non-negative tensor have bin
            ``h - 1`` to themselves.
        exponent: int64 ``[channels]``: each channel's width is ``2 ** exponent``.
        low: float32 ``[channels]``, the smallest value.
        high: float32 ``[channels]``, the largest.
    """

    counts: Tensor
    exponent: Tensor
    low: Tensor
    high: Tensor

    def edges(self) -> Tensor:
        """Answer the upper edge of every bin, float64 ``[channels, bins]``."""
        half = self.counts.shape[1] // 2
        steps = torch.arange(1 - half, half + 1, dtype=torch.float64)
        return torch.ldexp(steps, self.exponent.unsqueeze(1).double())


class CountingObserver(Observer):
    """Counts values in bins whose width depends only on the largest magnitude seen.

    The width is the smallest power of two with which all values fit. When a larger value comes, pairs of neighbours
    are added up; since edges are multiples of the width, this gives exactly the counts that the wider bins would have
    given from the start. Counts therefore do not depend on the order of values or on how observers were merged.

    Args:
        bins: A power of two of at least 512 and at most 32,768.
        dtype, symmetric, axis, name: As :class:`Observer`.

    Raises:
        ConfigurationError: ``bins`` is not such a number.
    """

    _state: Counts | None

    def __init__(
        self,
        bins: int = 8192,
        dtype: torch.dtype = QINT8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        name: str = "",
    ) -> None:
        if bins & (bins - 1) or not 512 <= bins <= 32_768:
            raise ConfigurationError(f"bins={bins} is not a power of two between 512 and 32768")
        self.bins = bins
        super().__init__(dtype, symmetric=symmetric, axis=axis, name=name)

    def settings(self) -> dict[str, object]:
        return super().settings() | {"bins": self.bins}

    def reset(self) -> None:
        self._state = None

    @property
    def channels(self) -> int | None:
        return None if self._state is None else len(self._state.counts)

    @property
    def min_val(self) -> Tensor | None:
        """The smallest value, float32 ``()`` or ``[channels]``; ``None`` before anything was seen."""
        return None if self._state is None else (self._state.low if self.axis is not None else self._state.low[0])

    @property
    def max_val(self) -> Tensor | None:
        """The largest value; as :attr:`min_val`."""
        return None if self._state is None else (self._state.high if self.axis is not None else self._state.high[0])

    @property
    def histogram(self) -> Counts | None:
        """The counts so far; ``None`` before anything was seen."""
        return self._state

    def _observe(self, rows: Tensor) -> None:
        low, high = (bound.cpu() for bound in self._finite_range(rows))
        exponent = self._exponent(low, high)
        if self._state is not None:
            exponent = torch.maximum(exponent, self._state.exponent)
        fresh = [self._count(row, int(e)) for row, e in zip(rows, exponent.tolist(), strict=True)]
        self._take(Counts(torch.stack(fresh), exponent, low, high))

    def _exponent(self, low: Tensor, high: Tensor) -> Tensor:
        magnitude = torch.maximum(low.abs(), high.abs()).double()
        exponent = torch.frexp(magnitude).exponent.long() - (self.bins.bit_length() - 2)
        return exponent.clamp(min=_SMALLEST_EXPONENT)

    def _count(self, row: Tensor, exponent: int) -> Tensor:
        counts: Tensor = torch.ops.mono_quant.count_values(row, self.bins, exponent)
        return counts.cpu()

    def _merge(self, other: Self) -> None:
        assert other._state is not None
        self._take(other._state)

    def _take(self, new: Counts) -> None:
        old = self._state
        if old is None:
            self._state = Counts(*(tensor.clone() for tensor in new))
            return
        exponent = torch.maximum(old.exponent, new.exponent)
        self._state = Counts(
            _widen(old.counts, exponent - old.exponent) + _widen(new.counts, exponent - new.exponent),
            exponent,
            torch.minimum(old.low, new.low),
            torch.maximum(old.high, new.high),
        )


def _widen(counts: Tensor, doublings: Tensor) -> Tensor:
    """Answer the counts in bins ``2 ** doublings`` times as wide, per channel."""
    if not bool(doublings.any()):
        return counts
    half = counts.shape[1] // 2
    steps = torch.arange(1 - half, half + 1)
    # Rounding up, as the bins include their upper edge; shifting rounds down. Beyond 62 the shift is undefined.
    wider = -((-steps).unsqueeze(0) >> doublings.clamp(max=62).unsqueeze(1))
    return torch.zeros_like(counts).scatter_add_(1, wider + (half - 1), counts)
