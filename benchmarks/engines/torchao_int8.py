"""torchao: int8 weights per channel, activations per row on the fly, eager."""

from __future__ import annotations

from pathlib import Path

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from benchmarks.engines.engine import Engine
from benchmarks.minilm import encoder, load_model

NAME = "torchao int8 dynamic"
DISTRIBUTIONS = ("torchao", "torch", "transformers")


def build(directory: Path) -> Engine:
    model = load_model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    path = directory / "model.pt"
    torch.save(model.state_dict(), path)
    return Engine(encoder(model), path.stat().st_size)
