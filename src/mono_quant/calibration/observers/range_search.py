"""Which part of a histogram's range 256 codes should cover."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mono_quant.calibration.observers.counts import Counts

Floats = npt.NDArray[np.float64]

_LEVELS: Final = 256

# Candidates for each bound. The finest step, 1/96 of the range, moves the scale by one percent.
_CANDIDATES: Final = 96


def squared_error_range(histogram: Counts, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Answer the range with the least mean squared error of quantization.

    Values inside the range are off by the variance of rounding, ``scale ** 2 / 12`` (exact zeros by nothing), values
    outside by their distance from it. All pairs of bounds on a grid are compared.

    Args:
        histogram: What was seen.
        symmetric: Use ``[-bound, bound]``; the range still does not go beyond what was seen.

    Returns:
        float32 lower and upper bounds ``[channels]``.
    """
    lows, highs = [], []
    for channel in range(len(histogram.counts)):
        low, high = _least_squared_error(_channel(histogram, channel), symmetric)
        lows.append(low)
        highs.append(high)
    return torch.stack(lows).float(), torch.stack(highs).float()


def entropy_range(histogram: Counts) -> tuple[Tensor, Tensor]:
    """Answer the range that loses the least information: minimal Kullback-Leibler divergence.

    The distribution clipped to ``[-bound, bound]`` is compared with the same distribution after 256 codes (Migacz,
    "8-bit Inference with TensorRT", 2017). Exact zeros of non-negative values are left out: they have a code.

    Args:
        histogram: What was seen.

    Returns:
        float32 lower and upper bounds ``[channels]``.
    """
    lows, highs = [], []
    for channel in range(len(histogram.counts)):
        low, high = _least_divergence(_channel(histogram, channel))
        lows.append(low)
        highs.append(high)
    return torch.stack(lows).float(), torch.stack(highs).float()


class _Channel:
    """One channel's histogram without its exact zeros, in float64."""

    def __init__(self, counts: Tensor, edges: Tensor, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low.double(), high.double()
        self.width = edges[1] - edges[0]
        self.edges = edges
        self.centres = (edges - self.width / 2).clamp(float(low), float(high))
        self.counts = counts.double()
        if float(low) >= 0:
            self.counts[len(counts) // 2 - 1] = 0
        ones = torch.zeros(1, dtype=torch.float64)
        # Sums of 1, x and x ** 2 over the bins below each bin.
        self.moments = [
            torch.cat([ones, (self.counts * self.centres**power).cumsum(0)]) for power in range(3)
        ]  # fmt: skip

    def excess(self, bounds: Tensor, above: bool) -> Tensor:
        """Answer the summed squared distance of the values beyond each of ``bounds``."""
        bins = torch.searchsorted(self.centres, bounds, right=above)
        sums = [total[-1] - total[bins] if above else total[bins] for total in self.moments]
        return sums[2] - 2 * bounds * sums[1] + bounds**2 * sums[0]

    def below(self, bounds: Tensor, including: bool) -> Tensor:
        """Answer how many values lie below each of ``bounds``."""
        return self.moments[0][torch.searchsorted(self.centres, bounds, right=including)]


def _channel(histogram: Counts, channel: int) -> _Channel:
    one = Counts(*(tensor[channel : channel + 1] for tensor in histogram))
    return _Channel(one.counts[0], one.edges()[0], one.low[0], one.high[0])


def _least_squared_error(channel: _Channel, symmetric: bool) -> tuple[Tensor, Tensor]:
    fractions = torch.arange(1, _CANDIDATES + 1, dtype=torch.float64) / _CANDIDATES
    if symmetric:
        highs = fractions * torch.maximum(channel.low.abs(), channel.high.abs())
        lows = -highs
    else:
        lows = channel.low.clamp(max=0) * (fractions if float(channel.low) < 0 else fractions[-1:])
        highs = channel.high.clamp(min=0) * (fractions if float(channel.high) > 0 else fractions[-1:])
    error_low, error_high = channel.excess(lows, above=False), channel.excess(highs, above=True)
    count_low, count_high = channel.below(lows, including=False), channel.below(highs, including=True)
    if not symmetric:
        # Every lower bound with every upper one.
        lows, error_low, count_low = (column.unsqueeze(1) for column in (lows, error_low, count_low))
    scale = (highs - lows) / (_LEVELS - 1)
    error = (count_high - count_low) * scale**2 / 12 + error_low + error_high
    row, column = divmod(int(error.argmin()), len(highs))
    low = lows[column] if symmetric else lows[row, 0]
    return torch.maximum(low, channel.low), torch.minimum(highs[column], channel.high)


def _least_divergence(channel: _Channel) -> tuple[Tensor, Tensor]:
    whole = torch.maximum(channel.low.abs(), channel.high.abs())
    # A hundred small steps a channel: NumPy's calls cost a fraction of PyTorch's.
    counts, centres = channel.counts.numpy(), channel.centres.numpy()
    best = (channel.low, channel.high)
    least = np.inf
    for step in range(_CANDIDATES, 0, -1):
        bound = whole * step / _CANDIDATES
        low, high = torch.maximum(channel.low, -bound), torch.minimum(channel.high, bound)
        divergence = _divergence(counts, centres, min(float(low), 0.0), max(float(high), 0.0))
        if divergence < least:
            least, best = divergence, (low, high)
    return best


def _divergence(counts: Floats, centres: Floats, low: float, high: float) -> float:
    first, last = np.searchsorted(centres, low), np.searchsorted(centres, high, side="right")
    kept = counts[first:last]
    if not kept.any():
        return np.inf
    clipped = kept.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    scale = (high - low) / (_LEVELS - 1)
    codes = np.rint((centres[first:last] - low) / scale).clip(0, _LEVELS - 1).astype(np.int64)
    occupied = kept > 0
    total = np.bincount(codes, weights=kept, minlength=_LEVELS)
    share = np.bincount(codes, weights=occupied, minlength=_LEVELS)
    coded = (total / share.clip(min=1))[codes] * occupied
    seen = clipped > 0
    p, q = clipped[seen] / clipped.sum(), coded[seen] / coded.sum()
    if not q.all():
        # Outliers were moved to a bin that holds nothing itself: an infinite divergence, unless smoothed.
        q = q + 1e-9
    return float((p * np.log(p / q)).sum())
