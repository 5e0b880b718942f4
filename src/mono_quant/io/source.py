"""Loads what ``quantize`` takes as a path: float models."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from mono_quant.errors import CheckpointError, InputError
from mono_quant.graph import is_static
from mono_quant.integrations.transformers import is_transformers_directory, load_transformers
from mono_quant.io.checkpoint import Checkpoint, checkpoint_path, open_checkpoint
from mono_quant.io.torch_file import TorchFile
from mono_quant.modules import QuantizedModule


def load_source(path: str | Path | os.PathLike[str], *, allow_pickle: bool = False) -> nn.Module | dict[str, Tensor]:
    """Load a float model.

    Args:
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file of plain tensors (also under ``state_dict``,
            ``model_state_dict`` or ``model``), or a transformers directory.
        allow_pickle: Let a ``.pt`` file run the code that it contains.

    Returns:
        A state dict, whose tensors are mapped from the file where its format allows that; for a transformers
        directory, or a ``.pt`` file that holds one, a module.

    Raises:
        CheckpointError: The path cannot be read as a model.
        InputError: The model is quantized already.
    """
    source = checkpoint_path(path)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist", suggestion="Check the path.")
    if is_transformers_directory(source):
        return load_transformers(source)
    with open_checkpoint(source, allow_pickle) as checkpoint:
        _require_float(checkpoint)
        if isinstance(checkpoint.file, TorchFile) and checkpoint.file.module is not None:
            module = checkpoint.file.module
            if is_static(module) or any(isinstance(part, QuantizedModule) for part in module.modules()):
                raise InputError(f"{source} holds a model that is quantized already")
            return module
        stored = {name: checkpoint.read(name) for name in checkpoint.file.names - checkpoint.tied.keys()}
        return {name: stored[checkpoint.stored_name(name)] for name in checkpoint.names}


def _require_float(checkpoint: Checkpoint) -> None:
    layers = [] if checkpoint.header is None else list(checkpoint.header.layers)
    if layers:
        raise InputError(
            f"{checkpoint.path} holds a model that is quantized already: {len(layers)} layers, the first is "
            f"{layers[0]!r}",
            suggestion="Use load_model() to run it, or quantize the float model that it was made from.",
        )


__all__ = ["load_source"]
