"""Sums over batches from which the errors of a sensitivity measurement follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from mono_quant.report import decibels, named_tensors
from mono_quant.report.sensitivity import TensorError

# Positions whose divergence is computed at a time.
_ROWS: Final = 256


@dataclass
class ErrorSums:
    """Energies of float values, of what a quantized layer answers instead, and of the difference.

    Values where both are the same infinity (masked logits) count for nothing.
    """

    signal: float = 0.0
    other: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, approximate: Tensor, factor: float = 1.0) -> None:
        """Add two tensors of one shape; ``factor`` scales both."""
        first, second = exact.detach().float(), approximate.detach().float()
        sums = [_energy(first), _energy(second), _energy(first - second)]
        if not all(map(math.isfinite, sums)):
            agree = first == second
            finite = torch.where(first.isinf() & agree, 0.0, first), torch.where(second.isinf() & agree, 0.0, second)
            sums = [_energy(finite[0]), _energy(finite[1]), _energy(finite[0] - finite[1])]
        self.signal += factor**2 * sums[0]
        self.other += factor**2 * sums[1]
        self.noise += factor**2 * sums[2]

    def error(self) -> TensorError:
        if self.signal == 0.0 or self.other == 0.0:
            return TensorError(decibels(self.signal, self.noise), 1.0 if self.signal == self.other else 0.0)
        # The product follows from the noise: a difference of 1e-12 is not lost in it.
        cosine = (self.signal + self.other - self.noise) / 2 / math.sqrt(self.signal) / math.sqrt(self.other)
        return TensorError(decibels(self.signal, self.noise), max(-1.0, min(1.0, cosine)))


def _energy(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


@dataclass
class Outputs:
    """Finds the tensors in a model's answers, and brings them to a common scale.

    Several outputs are taken for one: each is divided by the root mean square that it has in the first batch.

    Attributes:
        logits: Name of the output that holds logits over its last dimension, or ``None``.
        factors: By the output's name, what it is multiplied with; set by the first batch.
    """

    logits: str | None = None
    factors: dict[str, float] = field(default_factory=dict)

    def tensors(self, answer: Any) -> dict[str, Tensor]:
        """Answer the floating-point tensors of a model's answer that hold values."""
        found = {name: t for name, t in named_tensors(answer).items() if t.is_floating_point() and t.numel()}
        if not self.factors:
            self.factors = {name: _scale(tensor) for name, tensor in found.items()}
        return {name: tensor for name, tensor in found.items() if name in self.factors}

    def add_error(self, sums: ErrorSums, exact: dict[str, Tensor], approximate: dict[str, Tensor]) -> None:
        """Add the error of one answer to ``sums``; outputs of other shapes do not count."""
        for name, tensor in exact.items():
            if name in approximate and approximate[name].shape == tensor.shape:
                sums.add(tensor, approximate[name], self.factors[name])

    def divergence(self, exact: dict[str, Tensor], approximate: dict[str, Tensor]) -> tuple[float, int]:
        """Answer the summed divergence of the logits in nats, and the number of positions; zeros without logits."""
        if self.logits is None or self.logits not in exact:
            return 0.0, 0
        pair = [answer[self.logits].detach().flatten(0, -2) for answer in (exact, approximate)]
        total = 0.0
        for rows in zip(*(logits.split(_ROWS) for logits in pair), strict=True):
            # Differences of a millionth of a nat need more digits than float32 has.
            first, second = (row.double().log_softmax(dim=-1) for row in rows)
            # Classes that are masked in both have no probability; infinity less infinity is no number.
            total += float(torch.where(first == -math.inf, 0.0, first.exp() * (first - second)).sum())
        return max(0.0, total), len(pair[0])


def _scale(tensor: Tensor) -> float:
    values = tensor.detach().float()
    energy = _energy(torch.where(values.isfinite(), values, 0.0))
    return math.sqrt(tensor.numel() / energy) if energy > 0 else 1.0
