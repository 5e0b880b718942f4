"""optimum-quanto: int8 weights, activations in float32, eager."""

from __future__ import annotations

from pathlib import Path

from optimum.quanto import freeze, qint8, quantize
from safetensors.torch import save_file

from benchmarks.engines.engine import Engine
from benchmarks.minilm import encoder, load_model

NAME = "optimum-quanto int8 weights"
DISTRIBUTIONS = ("optimum-quanto", "torch", "transformers")


def build(directory: Path) -> Engine:
    model = load_model()
    quantize(model, weights=qint8)
    freeze(model)
    path = directory / "model.safetensors"
    save_file(model.state_dict(), str(path))
    return Engine(encoder(model), path.stat().st_size)
