"""Small models for tests of checkpoints, also built by name in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mono_quant


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(self.norm(x))))
        return x + out


class Deep(nn.Module):
    """Blocks inside blocks, one reached under two names; buffers that are saved and one that is not."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.outer = nn.ModuleList(
            [nn.Sequential(Block(width), nn.ModuleDict({"inner": Block(width)})["inner"]) for _ in range(2)]
        )
        self.first, self.again = Block(width), None
        self.again = self.first
        self.register_buffer("shift", torch.arange(width, dtype=torch.float32))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("scratch", torch.ones(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.outer:
            x = block(x)
        assert self.again is not None
        out: Tensor = self.again(self.first(x)) + self.shift * self.scratch
        return out


class Tied(nn.Module):
    """A language model in small: the table of words is also the output layer."""

    def __init__(self, words: int = 24, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.hidden(self.words(x))))
        return out


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def bare() -> nn.Module:
    return nn.Linear(16, 8)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "deep": Deep,
    "tied": Tied,
    "convolutions": convolutions,
    "encoder": encoder,
    "bare": bare,
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "deep": lambda: torch.linspace(-2, 2, 5 * 32).reshape(5, 32),
    "tied": lambda: torch.arange(24).reshape(2, 12),
    "convolutions": lambda: torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8),
    "encoder": lambda: torch.linspace(-1, 1, 2 * 4 * 16).reshape(2, 4, 16),
    "bare": lambda: torch.linspace(-3, 3, 3 * 16).reshape(3, 16),
}


def build(name: str) -> nn.Module:
    """Answer a model in evaluation mode; its weights differ from call to call."""
    return BUILDERS[name]().eval()


def quantized(name: str, **options: object) -> nn.Module:
    result = mono_quant.quantize(build(name), **options)  # type: ignore[arg-type]
    assert isinstance(result.model, nn.Module)
    return result.model


def answer(name: str, model: nn.Module) -> Tensor:
    """Run a model on its input, the same in every process; floats in the dtype that it computes in."""
    x = INPUTS[name]()
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    if x.is_floating_point() and dtypes:
        x = x.to(dtypes[0])
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def answer_of_files(directory: str) -> None:
    """Load each model's checkpoint in a directory and save its answer beside it: what a fresh process does."""
    for name in BUILDERS:
        torch.manual_seed(99)
        path = Path(directory) / f"{name}.safetensors"
        model = mono_quant.load_model(path, build(name))
        assert isinstance(model, nn.Module)
        torch.save(answer(name, model), path.with_suffix(".answer"))


def python(code: str, **options: Any) -> subprocess.Popen[str]:
    """Start a fresh interpreter on ``code``, with warnings as errors and the same import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.Popen(command, env=environment, text=True, **options)


def same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    pair = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*pair)
