"""Observers of the smallest and largest value: over everything seen, or as a moving average over calls."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from mono_quant.calibration.observers.observer import Observer
from mono_quant.core.mappers import QINT8
from mono_quant.errors import ConfigurationError


class MinMaxObserver(Observer):
    """Remembers the smallest and the largest value: no value is ever clipped, one outlier decides the scale."""

    _low: Tensor | None
    _high: Tensor | None

    def reset(self) -> None:
        self._low = self._high = None

    @property
    def channels(self) -> int | None:
        return None if self._low is None else len(self._low)

    @property
    def min_val(self) -> Tensor | None:
        """The smallest value, float32 ``()`` or ``[channels]``; ``None`` before anything was seen."""
        return _shaped(self._low, self.axis)

    @property
    def max_val(self) -> Tensor | None:
        """The largest value; as :attr:`min_val`."""
        return _shaped(self._high, self.axis)

    def _observe(self, rows: Tensor) -> None:
        low, high = self._finite_range(rows)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def _merge(self, other: Self) -> None:
        assert other._low is not None
        assert other._high is not None
        self._low = other._low.clone() if self._low is None else torch.minimum(self._low, other._low)
        self._high = other._high.clone() if self._high is None else torch.maximum(self._high, other._high)

    def _range(self) -> tuple[Tensor, Tensor]:
        assert self._low is not None
        assert self._high is not None
        return self._low, self._high


class MovingAverageMinMaxObserver(Observer):
    """Averages each call's smallest and largest value, later calls counting more.

    ``value = (1 - c) * value + c * new``, starting with the first call's. A single outlier moves the range by little.
    The order of calls matters, so a merge is exact when ``other`` saw what came next.

    Args:
        averaging_constant: ``c``, above 0 and at most 1.
        dtype, symmetric, axis, name: As :class:`Observer`.

    Raises:
        ConfigurationError: ``averaging_constant`` is out of range (a subclass of ``ValueError``).
    """

    _state: tuple[Tensor, Tensor, int] | None

    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = QINT8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        name: str = "",
    ) -> None:
        if not 0 < averaging_constant <= 1:
            raise ConfigurationError(f"averaging_constant={averaging_constant} is not above 0 and at most 1")
        self.averaging_constant = averaging_constant
        super().__init__(dtype, symmetric=symmetric, axis=axis, name=name)

    def settings(self) -> dict[str, object]:
        return super().settings() | {"averaging_constant": self.averaging_constant}

    def reset(self) -> None:
        # Averages and first values, float64 [2, channels] each, and the number of calls.
        self._state = None

    @property
    def channels(self) -> int | None:
        return None if self._state is None else self._state[0].shape[1]

    @property
    def min_val(self) -> Tensor | None:
        """The averaged minimum, float32 ``()`` or ``[channels]``; ``None`` before anything was seen."""
        return None if self._state is None else _shaped(self._state[0][0].float(), self.axis)

    @property
    def max_val(self) -> Tensor | None:
        """The averaged maximum; as :attr:`min_val`."""
        return None if self._state is None else _shaped(self._state[0][1].float(), self.axis)

    def _observe(self, rows: Tensor) -> None:
        bounds = torch.stack(self._finite_range(rows)).double()
        if self._state is None:
            self._state = (bounds, bounds, 1)
        else:
            average, first, calls = self._state
            self._state = (average + self.averaging_constant * (bounds - average), first, calls + 1)

    def _merge(self, other: Self) -> None:
        assert other._state is not None
        if self._state is None:
            self._state = other._state
            return
        average, first, calls = self._state
        other_average, other_first, other_calls = other._state
        # Alone, the other's first value stood in for all that came before it; that share is now this observer's.
        share = (1 - self.averaging_constant) ** other_calls
        self._state = (other_average + share * (average - other_first), first, calls + other_calls)

    def _range(self) -> tuple[Tensor, Tensor]:
        assert self._state is not None
        low, high = self._state[0].float()
        return low, high


def _shaped(bound: Tensor | None, axis: int | None) -> Tensor | None:
    return bound if bound is None or axis is not None else bound[0]
