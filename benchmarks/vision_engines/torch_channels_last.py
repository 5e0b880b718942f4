"""PyTorch eager with weights and images in channels-last order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.vision_engines.engine import Classifier

NAME = "torch float32, channels last"
DISTRIBUTIONS = ("torch",)


def build(model: nn.Module, calibration: Tensor, directory: Path) -> None:
    """Nothing is prepared."""


def load(make: Callable[[], nn.Module], directory: Path) -> Classifier:
    model = make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def classify(images: Tensor) -> Tensor:
        logits: Tensor = model(images.contiguous(memory_format=torch.channels_last))
        return logits

    return classify
