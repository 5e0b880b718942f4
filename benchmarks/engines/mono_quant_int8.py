"""This library with its defaults: linear layers and embeddings in int8, everything else in float32."""

from __future__ import annotations

from pathlib import Path

import mono_quant
from benchmarks.engines.engine import Engine
from benchmarks.minilm import encoder, load_model

NAME = "mono_quant int8"
DISTRIBUTIONS = ("mono-quant", "torch", "transformers")


def build(directory: Path) -> Engine:
    result = mono_quant.quantize(load_model())
    path = directory / "model.safetensors"
    result.save(path)
    return Engine(encoder(result.model), path.stat().st_size)
