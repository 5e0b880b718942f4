"""Quantized networks, made once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant.graph import StaticReport, quantize_static
from tests.graph.networks import Branches, Decides, Inverted, Residuals, Signals, Volumes, settled


@dataclass(frozen=True)
class Example:
    """A float network, its quantized form, and how to make inputs of a batch size."""

    model: nn.Module
    quantized: nn.Module
    report: StaticReport
    inputs: Callable[[int], tuple[Tensor, ...]]


def image(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


def signal(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 2, 32), torch.rand(batch, 8, 16)


_MAKERS: dict[str, tuple[type[nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "residuals": (Residuals, image(3, 32, 32)),
    "inverted": (Inverted, image(3, 24, 24)),
    "branches": (Branches, image(3, 16, 16)),
    "volumes": (Volumes, image(2, 8, 8, 8)),
    "signals": (Signals, signal),
    "decides": (Decides, image(3, 12, 12)),
}

NETWORKS = tuple(_MAKERS)
GRAPHS = tuple(name for name in NETWORKS if name != "decides")


@cache
def example_of(name: str) -> Example:
    torch.manual_seed(0)
    kind, inputs = _MAKERS[name]
    model = kind()
    if len(inputs(1)) == 1:
        settled(model, *inputs(1)[0].shape[1:])
    model.eval()
    quantized, report = quantize_static(model, [inputs(16) for _ in range(3)])
    return Example(model, quantized, report, inputs)


@pytest.fixture(params=NETWORKS)
def example(request: pytest.FixtureRequest) -> Example:
    return example_of(request.param)


@pytest.fixture(params=GRAPHS)
def graph_example(request: pytest.FixtureRequest) -> Example:
    return example_of(request.param)


def leaves(value: Any) -> list[Tensor]:
    """Answer the tensors of an answer, in order, without their history."""
    if isinstance(value, Tensor):
        return [value.detach()]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in leaves(item)]


def decibels(exact: Any, approximate: Any) -> float:
    """Answer the signal-to-noise ratio over all tensors of an answer."""
    pairs = list(zip(leaves(exact), leaves(approximate), strict=True))
    signal_power = sum(float(a.double().square().sum()) for a, _ in pairs)
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return 10 * float(torch.log10(torch.tensor(signal_power / max(noise, 1e-30))))
