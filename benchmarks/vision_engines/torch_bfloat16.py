"""PyTorch eager with everything in bfloat16, channels-last order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.vision_engines.engine import Classifier

NAME = "torch bfloat16, channels last"
DISTRIBUTIONS = ("torch",)


def build(model: nn.Module, calibration: Tensor, directory: Path) -> None:
    """Nothing is prepared."""


def load(make: Callable[[], nn.Module], directory: Path) -> Classifier:
    model = make().to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def classify(images: Tensor) -> Tensor:
        logits: Tensor = model(images.to(torch.bfloat16, memory_format=torch.channels_last))
        return logits.float()

    return classify
