"""Half-quadratic quantization: a scale and zero point for each group that fit its weights, without any data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), minimise the sum of
``|w - dequantized(w)| ** p`` by alternating two easy steps: with the parameters fixed, a shrinkage splits off the part
of the error that counts as an outlier (nothing for ``p = 2``); with that part taken out of the weights, the parameters
follow in closed form. The paper fits a real zero point and leaves the scale alone. Zero points are integers here, so
it is the scale that follows in closed form, for each of the neighbouring zero points; and since the sum has many local
minima, several widths of the range are tried first. Round-to-nearest is among them: the fit is never worse.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from mono_quant.algorithms.grid import Grid, group_length
from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.mappers import SMALLEST_SCALE, split_groups
from mono_quant.core.quantized_tensor import QuantizedTensor, row_chunks
from mono_quant.errors import ConfigurationError

# Widths of the range that are tried, as parts of the widest. Few codes gain from cutting off the tails; many do not.
_WIDTHS: Final = {
    4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68),
    8: (1.0, 0.98, 0.95, 0.9),
}
_ROUNDS: Final = 3
# Strength of the paper's shrinkage in units of the scale, and how much it grows from round to round.
_PENALTY: Final = 10.0
_GROWTH: Final = 1.01


def fit_grid(matrix: Tensor, scheme: LayerScheme, importance: Tensor | None = None, norm: float = 2.0) -> Grid:
    """Answer scales and zero points that minimise ``sum(importance * |matrix - dequantized| ** norm)``.

    Args:
        matrix: Floating point ``[out, in]``.
        scheme: An integer scheme.
        importance: Non-negative weights of the inputs, float32 ``[in]``, for example the mean squares of the layer's
            inputs; all equal if left out.
        norm: The exponent ``p``, in (0, 2].

    Returns:
        A grid whose error under this norm, with codes rounded to nearest, is not larger than that of
        :meth:`Grid.from_range`, group by group.

    Raises:
        ConfigurationError: ``norm`` is out of range, or the group size does not divide ``in``.
        QuantizationError: The matrix holds NaN or infinite values.
    """
    if not 0 < norm <= 2:
        raise ConfigurationError(f"norm={norm} is not in (0, 2]")
    start = Grid.from_range(matrix, scheme)
    if not matrix.numel():
        return start
    if not scheme.per_channel:
        return _fit_whole(matrix, scheme, start, importance, norm)
    scale = torch.empty_like(start.scale)
    zero_point = None if start.zero_point is None else torch.empty_like(start.zero_point)
    group_size = group_length(matrix, scheme)
    weight = None if importance is None else importance.float().reshape(1, -1, group_size)
    for chunk in row_chunks(*matrix.shape):
        part = _Part(split_groups(matrix[chunk].detach().float(), group_size), weight, start, norm)
        part.fit(start.scale[chunk], None if start.zero_point is None else start.zero_point[chunk])
        scale[chunk] = part.scale
        if zero_point is not None:
            zero_point[chunk] = part.zero_point
    return Grid(scale, zero_point, group_size, scheme.bits)


def quantize_data_free(weight: Tensor, scheme: LayerScheme, norm: float = 2.0) -> QuantizedTensor:
    """Answer ``weight`` quantized on the grid of :func:`fit_grid` for :func:`presumed_importance`.

    Args:
        weight: Floating point, output channels first, at least two dimensions.
        scheme: An integer scheme.
        norm: See :func:`fit_grid`.

    Returns:
        The codes, nearest on that grid, as the layer of ``scheme`` stores them.

    Raises:
        ConfigurationError, QuantizationError: As :func:`fit_grid`.
    """
    matrix = weight.detach().flatten(1)
    return fit_grid(matrix, scheme, presumed_importance(matrix), norm).quantize(weight, scheme)


def presumed_importance(matrix: Tensor) -> Tensor:
    """Guess from a weight ``[out, in]`` how much each of its inputs matters, float32 ``[in]`` between 0 and 1.

    In SmolLM2 the inputs that are far larger than the others meet weights that stand out too. Treating all inputs
    alike cuts just those weights off, and the model then answers worse than after rounding to nearest, although the
    mean error of the weights is smaller. The square of the largest weight of an input keeps them.
    """
    if not matrix.numel():
        return torch.ones(matrix.shape[1], device=matrix.device)
    largest = matrix.abs().amax(dim=0).float()
    return (largest / largest.max().clamp(min=torch.finfo(torch.float32).tiny)).square()


def _fit_whole(matrix: Tensor, scheme: LayerScheme, start: Grid, importance: Tensor | None, norm: float) -> Grid:
    """Fit one scale for the whole matrix, and write it out for each channel."""
    weight = None if importance is None else importance.float().expand(matrix.shape).reshape(1, 1, -1)
    part = _Part(matrix.detach().float().reshape(1, 1, -1), weight, start, norm)
    part.fit(start.scale[:1], None if start.zero_point is None else start.zero_point[:1])
    zero_point = None if start.zero_point is None else part.zero_point.expand_as(start.zero_point).contiguous()
    return Grid(part.scale.expand_as(start.scale).contiguous(), zero_point, start.group_size, start.bits)


class _Part:
    """The best parameters found so far for some groups ``[rows, groups, group_size]``."""

    def __init__(self, groups: Tensor, weight: Tensor | None, grid: Grid, norm: float) -> None:
        self._groups, self._weight, self._norm = groups, weight, norm
        self._qmin, self._qmax = grid.qmin, grid.qmax
        self._symmetric = grid.zero_point is None
        self._widths = _WIDTHS[grid.bits]

    def fit(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Search from the parameters of round-to-nearest, ``[rows, groups]``."""
        self.scale = scale
        self.zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
        self._error = self._measure(self.scale, self.zero_point)
        low = self._groups.amin(dim=2).clamp_(max=0)
        high = self._groups.amax(dim=2).clamp_(min=0)
        middle, steps = (self._qmax + self._qmin) / 2, self._qmax - self._qmin
        for width in self._widths:
            narrow = (scale * width).clamp_(min=SMALLEST_SCALE)
            if self._symmetric:
                self._try(narrow, self.zero_point, _PENALTY)
            elif steps:
                # A narrower range keeps its middle: that cuts off as much on the left as on the right.
                centred = torch.round(middle - (low / 2 + high / 2) / narrow).clamp_(-128, 127)
                self._try(narrow, centred, _PENALTY)
        penalty = _PENALTY
        for _ in range(_ROUNDS):
            penalty *= _GROWTH
            for step in (0,) if self._symmetric else (0, -1, 1):
                self._try(self.scale, (self.zero_point + step).clamp_(-128, 127), penalty)

    def _try(self, scale: Tensor, zero_point: Tensor, penalty: float) -> None:
        """Fit the scale to the codes of the given parameters, and keep what is better than the best so far."""
        steps = self._codes(scale, zero_point) - zero_point.unsqueeze(-1)
        target = self._groups
        if self._norm < 2:
            target = target - self._outliers(target - steps * scale.unsqueeze(-1), scale, penalty)
        weighted = steps if self._weight is None else steps * self._weight
        energy = (weighted * steps).sum(dim=2)
        fitted = (weighted * target).sum(dim=2) / energy
        fitted = torch.where((energy > 0) & (fitted >= SMALLEST_SCALE), fitted, scale)
        error = self._measure(fitted, zero_point)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, fitted, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)

    def _outliers(self, error: Tensor, scale: Tensor, penalty: float) -> Tensor:
        # The paper's generalized soft threshold, for errors measured in steps of the grid.
        relative = error / scale.unsqueeze(-1)
        magnitude = relative.abs().clamp_(min=torch.finfo(torch.float32).tiny)
        kept = (magnitude - magnitude.pow(self._norm - 1) / penalty).clamp_(min=0)
        return torch.sign(relative) * kept * scale.unsqueeze(-1)

    def _codes(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        scaled = self._groups * scale.unsqueeze(-1).reciprocal()
        return scaled.add_(zero_point.unsqueeze(-1)).round_().clamp_(self._qmin, self._qmax)

    def _measure(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        values = self._codes(scale, zero_point).sub_(zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
        error = values.sub_(self._groups)
        error = error.square_() if self._norm == 2 else error.abs_().pow_(self._norm)
        if self._weight is not None:
            error = error.mul_(self._weight)
        return error.sum(dim=2)
