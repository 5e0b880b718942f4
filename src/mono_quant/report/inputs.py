"""Inputs to run models on: read from a file, or made for transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mono_quant.errors import InputError
from mono_quant.io.checkpoint import checkpoint_path


def load_inputs(path: str | Path) -> Tensor | dict[str, Tensor]:
    """Read inputs from a file.

    Args:
        path: ``.safetensors`` with one tensor for each keyword argument, or ``.npy`` with the one positional argument.

    Raises:
        InputError: The file has another suffix or cannot be read as what its suffix says.
        CheckpointError: No file can have that name.
        FileNotFoundError: There is no such file.
    """
    path = checkpoint_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} with inputs")
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
        if not tensors:
            raise InputError(f"{path} holds no tensors; expected one for each argument of the model")
        return tensors
    if path.suffix == ".npy":
        try:
            # A mapped file may be read-only, which torch.from_numpy warns about: copy.
            return torch.from_numpy(np.array(np.load(path, allow_pickle=False)))
        except (ValueError, EOFError, TypeError) as error:
            raise InputError(f"{path} is not a numpy file of plain numbers: {error}") from error
    raise InputError(
        f"{path} has the suffix {path.suffix!r}; expected .safetensors or .npy",
        suggestion="Save a tensor for each argument with safetensors.torch.save_file, or one array with numpy.save.",
    )


def example_inputs(model: nn.Module, batch: int = 1, length: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Make inputs for a transformers model: random tokens without padding, or random pixels.

    Args:
        model: A module with transformers' ``config`` and ``main_input_name``.
        batch: Rows.
        length: Tokens in a row; images have the size that the configuration says.
        seed: Of the random numbers: the same seed makes the same inputs.

    Raises:
        InputError: The model is not of transformers, takes something else, or fewer positions than ``length``.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(seed)
    if name == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and length > positions:
            raise InputError(f"the model has {positions} positions, found a length of {length} tokens")
        tokens = torch.randint(config.vocab_size, (batch, length), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    raise InputError(
        f"cannot make inputs for a {type(model).__name__}: only for transformers models of tokens or images",
        suggestion="Give the inputs yourself.",
    )


__all__ = ["example_inputs", "load_inputs"]
