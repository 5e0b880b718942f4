"""This library with bfloat16 for everything that is not int8."""

from __future__ import annotations

from pathlib import Path

import torch

import mono_quant
from benchmarks.engines.engine import Engine
from benchmarks.minilm import encoder, load_model

NAME = "mono_quant int8, rest bfloat16"
DISTRIBUTIONS = ("mono-quant", "torch", "transformers")


def build(directory: Path) -> Engine:
    result = mono_quant.quantize(load_model(), compute_dtype=torch.bfloat16)
    path = directory / "model.safetensors"
    result.save(path)
    return Engine(encoder(result.model), path.stat().st_size)
