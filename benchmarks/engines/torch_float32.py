"""PyTorch as it is, eager: the baseline."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines.engine import Engine
from benchmarks.minilm import encoder, load_model, weights_file

NAME = "torch float32"
DISTRIBUTIONS = ("torch", "transformers")


def build(directory: Path) -> Engine:
    return Engine(encoder(load_model()), weights_file().stat().st_size)
