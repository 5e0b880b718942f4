"""PyTorch as it is, eager, in its default memory format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from benchmarks.vision_engines.engine import Classifier

NAME = "torch float32"
DISTRIBUTIONS = ("torch",)


def build(model: nn.Module, calibration: Tensor, directory: Path) -> None:
    """Nothing is prepared."""


def load(make: Callable[[], nn.Module], directory: Path) -> Classifier:
    return make()
