"""Observers that choose a range from the distribution of the values."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from mono_quant.calibration.observers.counts import CountingObserver
from mono_quant.calibration.observers.range_search import entropy_range, squared_error_range
from mono_quant.core.mappers import QINT8
from mono_quant.errors import ConfigurationError

RANGE_METHODS: Final = ("entropy", "mse")


class HistogramObserver(CountingObserver):
    """Clips outliers where that helps: by least information lost, or by least mean squared error.

    Args:
        bins: A power of two of at least 512 and at most 32,768.
        dtype: As :class:`Observer`.
        method: ``"entropy"`` (Kullback-Leibler divergence) or ``"mse"`` (mean squared error).
        symmetric, axis, name: As :class:`Observer`.

    Raises:
        ConfigurationError: ``bins`` or ``method`` is not one of these.
    """

    def __init__(
        self,
        bins: int = 8192,
        dtype: torch.dtype = QINT8,
        *,
        method: str = "entropy",
        symmetric: bool = False,
        axis: int | None = None,
        name: str = "",
    ) -> None:
        if method not in RANGE_METHODS:
            raise ConfigurationError(f"method={method!r} is not one of {', '.join(RANGE_METHODS)}")
        self.method = method
        super().__init__(bins, dtype, symmetric=symmetric, axis=axis, name=name)

    def settings(self) -> dict[str, object]:
        return super().settings() | {"method": self.method}

    def _range(self) -> tuple[Tensor, Tensor]:
        assert self._state is not None
        if self.method == "mse":
            return squared_error_range(self._state, self.symmetric)
        return entropy_range(self._state)


class PercentileObserver(CountingObserver):
    """Leaves out the most extreme values, a fixed share of all.

    Args:
        percentile: Percent of the values that the range holds at least, above 50 and at most 100; the rest may be
            cut off, half at each end.
        bins: A power of two of at least 512 and at most 32,768.
        dtype, symmetric, axis, name: As :class:`Observer`.

    Raises:
        ConfigurationError: ``bins`` or ``percentile`` is out of range.
    """

    def __init__(
        self,
        percentile: float = 99.99,
        bins: int = 8192,
        dtype: torch.dtype = QINT8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        name: str = "",
    ) -> None:
        if not 50 < percentile <= 100:
            raise ConfigurationError(f"percentile={percentile} is not above 50 and at most 100")
        self.percentile = percentile
        super().__init__(bins, dtype, symmetric=symmetric, axis=axis, name=name)

    def settings(self) -> dict[str, object]:
        return super().settings() | {"percentile": self.percentile}

    def _range(self) -> tuple[Tensor, Tensor]:
        assert self._state is not None
        counts, _, low, high = self._state
        total = counts.sum(1, keepdim=True)
        cut = (total.double() * (1 - self.percentile / 100) / 2).floor().long()
        edges = self._state.edges()
        # The first bin whose values cannot all be cut off, from either end.
        first = (counts.cumsum(1) > cut).long().argmax(1, keepdim=True)
        last = counts.shape[1] - 1 - (counts.flip(1).cumsum(1) > cut).long().argmax(1, keepdim=True)
        width = edges[:, 1] - edges[:, 0]
        lower = (edges.gather(1, first)[:, 0] - width).float()
        upper = edges.gather(1, last)[:, 0].float()
        return torch.maximum(lower, low), torch.minimum(upper, high)
