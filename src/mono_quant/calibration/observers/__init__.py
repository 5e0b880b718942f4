"""Observers: running statistics of activations, and the quantization parameters that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mono_quant.calibration.observers.histogram import RANGE_METHODS, HistogramObserver, PercentileObserver
from mono_quant.calibration.observers.min_max import MinMaxObserver, MovingAverageMinMaxObserver
from mono_quant.calibration.observers.observer import Observer
from mono_quant.errors import ConfigurationError


def _squared_error_observer(**settings: Any) -> HistogramObserver:
    return HistogramObserver(method="mse", **settings)


_KINDS: Final[dict[str, Callable[..., Observer]]] = {
    "minmax": MinMaxObserver,
    "movingaverage": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
    "entropy": HistogramObserver,
    "mse": _squared_error_observer,
    "percentile": PercentileObserver,
}

# Further spellings of mono-quant 1.1, which ignores case, underscores and hyphens.
_SYNONYMS: Final = {
    "minmaxobserver": "minmax",
    "movingaverageminmax": "movingaverage",
    "movingaverageminmaxobserver": "movingaverage",
    "ema": "movingaverage",
    "histogramobserver": "histogram",
    "kl": "entropy",
    "percentileobserver": "percentile",
}

OBSERVERS: Final = tuple(_KINDS)


def create_observer(observer_type: str, **settings: Any) -> Observer:
    """Answer an observer by name.

    Args:
        observer_type: ``minmax``, ``movingaverage`` (or ``ema``), ``histogram`` (the entropy choice, also ``entropy``
            or ``kl``), ``mse`` (a histogram's choice by mean squared error) or ``percentile``. Case, underscores and
            hyphens do not matter.
        settings: The observer's arguments.

    Raises:
        ConfigurationError: There is no such observer (a subclass of ``ValueError``), or a setting is impossible.
    """
    normalized = observer_type.lower().replace("_", "").replace("-", "")
    kind = _KINDS.get(_SYNONYMS.get(normalized, normalized))
    if kind is None:
        raise ConfigurationError(f"observer {observer_type!r} is not one of {', '.join(OBSERVERS)}")
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigurationError(f"observer {observer_type!r}: {error}") from error


__all__ = [
    "OBSERVERS",
    "RANGE_METHODS",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PercentileObserver",
    "create_observer",
]
