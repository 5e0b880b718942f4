"""Loads checkpoints, into an architecture or as plain tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from mono_quant.errors import CheckpointError, InputTypeError
from mono_quant.integrations.transformers import empty_transformers, is_transformers_directory, load_transformers
from mono_quant.io.assemble import Tolerance, assemble
from mono_quant.io.checkpoint import SAFETENSORS, TORCH, Checkpoint, checkpoint_path, find_header, open_checkpoint
from mono_quant.io.contents import uncompiled
from mono_quant.io.static_model import load_graph, with_static_layers


def load_model(
    path: str | Path,
    model: nn.Module | str | Path | torch.device | None = None,
    *,
    allow_pickle: bool = False,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> nn.Module | dict[str, Tensor]:
    """Load a checkpoint: the model that was saved, to the bit, if its architecture is known; else its tensors.

    Args:
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file, or a transformers directory, with a quantized model that
            :func:`mono_quant.save_model` wrote or with a float one.
        model: The architecture: a float module (also compiled, or on the ``meta`` device), which stays as it is, or a
            transformers directory, of which only ``config.json`` is read. A directory as ``path`` has its own. A
            static graph needs none; one that is given must be that which was quantized. (A ``torch.device`` stands
            for ``device``, as in mono-quant 1.1.)
        allow_pickle: Let a ``.pt`` file run the code that it contains. Only for files whose source you trust.
        strict: Refuse tensors that are missing or left over. Otherwise the architecture keeps its own and one
            warning lists them; wrong shapes and dtypes are always refused.
        device: Where the tensors go; by default where the architecture's are, or the CPU.

    Returns:
        With an architecture a new module of that structure and mode (training or evaluation; transformers
        directories: evaluation). Precision is the file's: a model that was quantized with ``compute_dtype`` comes
        back in it. A static graph is answered as a module, with or without. Otherwise the tensors by name, tied ones
        under all their names. A ``.pt`` file that holds the state dict under ``state_dict``, ``model_state_dict`` or
        ``model`` is read as that.

    Raises:
        CheckpointError: The file cannot be read, is not a checkpoint, is of an unknown version, or does not fit the
            architecture: then every tensor and layer that does not is named.
        InputTypeError: ``model`` is no architecture.
        InputError: The architecture cannot be copied.
    """
    source = checkpoint_path(path)
    if isinstance(model, torch.device):
        model, device = None, model
    target = None if device is None else torch.device(device)
    if model is None and is_transformers_directory(source):
        if find_header(source) is None:
            loaded = load_transformers(source)
            return loaded if target is None else loaded.to(target)
        model = source
    with open_checkpoint(source, allow_pickle) as checkpoint:
        static = None if checkpoint.header is None else checkpoint.header.static
        if static is not None and static.is_graph:
            return load_graph(checkpoint, None if model is None else _architecture(model), strict, target)
        if model is None:
            return _plain(checkpoint, target)
        architecture = _architecture(model)
        if static is not None:
            architecture = with_static_layers(checkpoint, architecture)
        # A configuration says nothing of what was cast after loading: the file decides.
        tolerance = Tolerance(names=not strict, float_dtypes=not isinstance(model, nn.Module))
        return assemble(checkpoint, architecture, tolerance, target)


def load_safetensors(path: str | Path, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Answer the tensors of a safetensors file of any name; mono-quant 1.1's name of one half of :func:`load_model`.

    Raises:
        CheckpointError: The file cannot be read.
    """
    return _load_plain(open_checkpoint(checkpoint_path(path), file_format=SAFETENSORS), device)


def load_pytorch(path: str | Path, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Answer the tensors of a file of ``torch.save`` of any name; nothing is unpickled.

    Raises:
        CheckpointError: The file cannot be read, or holds more than plain tensors.
    """
    return _load_plain(open_checkpoint(checkpoint_path(path), file_format=TORCH), device)


def _load_plain(
    opened: AbstractContextManager[Checkpoint], device: torch.device | str | None
) -> dict[str, Tensor]:  # fmt: skip
    with opened as checkpoint:
        return _plain(checkpoint, None if device is None else torch.device(device))


def _architecture(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        return uncompiled(model)
    if not isinstance(model, str | Path):
        raise InputTypeError(f"expected a module or a transformers directory, found a {type(model).__name__}")
    directory = checkpoint_path(model)
    if not is_transformers_directory(directory):
        raise CheckpointError(
            f"{directory} is not a transformers directory: there is no config.json that names an architecture",
            suggestion="Pass the float module, or the directory that holds its config.json.",
        )
    return empty_transformers(directory)


def _plain(checkpoint: Checkpoint, device: torch.device | None) -> dict[str, Tensor]:
    """Answer all tensors in memory of their own, so that the file may change or vanish."""
    stored = {}
    for name in sorted(checkpoint.file.names - checkpoint.tied.keys()):
        tensor = checkpoint.read(name)
        stored[name] = torch.empty_like(tensor, device=device or tensor.device).copy_(tensor)
    return {name: stored[checkpoint.stored_name(name)] for name in checkpoint.names}


__all__ = ["load_model", "load_pytorch", "load_safetensors"]
