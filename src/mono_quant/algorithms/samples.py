"""What a layer's inputs look like: their mean and an even sample of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mono_quant.algorithms.targets import Target


class InputSamples:
    """Watches the inputs of one layer.

    The sample holds every ``k``-th row of all that was seen, with ``k`` doubled whenever it grows beyond twice its
    limit; the same data always leaves the same sample.

    Args:
        target: The layer.
        limit: Rows of the sample: at least this many if as many were seen, and less than twice as many.
    """

    def __init__(self, target: Target, limit: int = 256) -> None:
        self._target, self._limit = target, limit
        self._stride = 1
        self._pieces: list[Tensor] = []
        self._kept = self.count = 0
        self._sum: Tensor | None = None

    def __call__(self, tensor: Tensor) -> None:
        for rows in self._target.rows(tensor):
            total = rows.sum(dim=0, dtype=torch.float64)
            self._sum = total if self._sum is None else self._sum + total
            # The first row that continues the pattern of those before.
            kept = rows[-self.count % self._stride :: self._stride].clone()
            self.count += len(rows)
            self._pieces.append(kept)
            self._kept += len(kept)
            while self._limit and self._kept >= 2 * self._limit:
                self._pieces = [torch.cat(self._pieces)[::2].clone()]
                self._kept = len(self._pieces[0])
                self._stride *= 2

    @property
    def rows(self) -> Tensor:
        """The sample, float32 ``[n, in]``; nothing may have been seen."""
        return torch.cat(self._pieces) if self._pieces else torch.empty(0, self._target.matrix.shape[1])

    @property
    def mean(self) -> Tensor | None:
        """The mean of all rows seen, float32 ``[in]``, or ``None`` before the first."""
        return None if self._sum is None else (self._sum / max(1, self.count)).float()


class InputMean(InputSamples):
    """Watches the inputs of one layer and keeps nothing but their mean."""

    def __call__(self, tensor: Tensor) -> None:
        for rows in self._target.rows(tensor):
            total = rows.sum(dim=0, dtype=torch.float64)
            self._sum = total if self._sum is None else self._sum + total
            self.count += len(rows)
