"""Statically quantized networks, made once for all tests that only look at them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import mono_quant
from mono_quant import QuantizationResult
from tests.graph.networks import Decides, Inverted, settled


class Gated(Inverted):
    """A network whose graph is cut: it normalises and looks up in float between 8-bit layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.table = nn.LayerNorm(16), nn.Embedding(3, 16)
        self.last, self.spare = nn.Linear(16, 5), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        kinds = torch.zeros(x.shape[0], dtype=torch.int64)
        features = self.expand(self.stem(x))
        return self.last(self.norm(features[:, :16].mean((2, 3)) + self.table(kinds)))  # type: ignore[no-any-return]


_KINDS: dict[str, tuple[type[nn.Module], int]] = {
    "graph": (Inverted, 24), "cut": (Gated, 16), "layers": (Decides, 12),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A float model, the data that it was calibrated on, and the result; tests do not change any of them."""

    model: nn.Module
    data: Tensor
    result: QuantizationResult

    @property
    def answers(self) -> Tensor:
        answer: Tensor = self.result.model(self.data)
        return answer


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Answer a new network of a name with settled statistics, and data for it."""
    torch.manual_seed(0)
    kinds: dict[str, tuple[type[nn.Module], int]] = {
        "graph": (Inverted, 24),
        "cut": (Gated, 16),
        "layers": (Decides, 12),
    }
    kind, size = kinds[name]
    return settled(kind(), 3, size, size), torch.randn(16, 3, size, size)


@cache
def made(name: str) -> Made:
    """Answer ``graph`` (one graph), ``cut`` (a graph that leaves 8 bits in places) or ``layers`` (layer by layer)."""
    model, data = network(name)
    return Made(model, data, mono_quant.quantize(model, calibration_data=data))


def decibels(exact: Tensor, approximate: Any) -> float:
    """Answer the signal-to-noise ratio of an answer."""
    noise = (exact.detach().double() - approximate.detach().double()).square().sum()
    return float(10 * torch.log10(exact.detach().double().square().sum() / noise))
