"""PyTorch with all parameters in bfloat16, eager."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_model

from benchmarks.engines.engine import Engine
from benchmarks.minilm import encoder, load_model

NAME = "torch bfloat16"
DISTRIBUTIONS = ("torch", "transformers")


def build(directory: Path) -> Engine:
    model = load_model().to(torch.bfloat16)
    path = directory / "model.safetensors"
    save_model(model, str(path))
    return Engine(encoder(model), path.stat().st_size)
