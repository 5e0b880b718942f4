"""Saves models: one file of plain tensors with a header, or a directory for transformers models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import CheckpointError, ConfigurationError
from mono_quant.io.atomic import atomic_write
from mono_quant.io.checkpoint import SAFETENSORS, TORCH, checkpoint_path, format_by_suffix
from mono_quant.io.contents import Contents, gather, require_module_to_convert, uncompiled, with_standard_layers
from mono_quant.io.directory import save_directory
from mono_quant.io.header import HEADER_KEY, CheckpointHeader
from mono_quant.io.safetensors_file import write_safetensors
from mono_quant.io.torch_file import write_torch


def save_model(
    model: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    quantization_info: QuantizationInfo | None = None,
    original_size_mb: float | None = None,
    quantized_size_mb: float | None = None,
    compression_ratio: float | None = None,
    sqnr_db: float | None = None,
    convert_to_native: bool = False,
) -> None:
    """Save a model, quantized or not, as plain tensors with a header that says how to load it.

    The header of a static graph describes the whole graph, so that it can be loaded without its architecture.

    The file appears as a whole: a full disk or a killed process leaves an older file of that name as it was. Tensors
    that share their memory are stored once. Buffers that are not persistent are not saved.

    Args:
        model: A module (a compiled one stands for the module that it wraps) or a state dict.
        path: A name that ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for a file that ``torch.load`` reads
            as a state dict. For a transformers model also a directory, or a name without suffix for a new one: it
            receives ``model.safetensors``, ``config.json`` with a ``quantization_config`` in the layout of
            compressed-tensors, and the tokenizer's files if the model was loaded from a local directory.
        quantization_info: What the quantization did: the header then holds the reasons for skipped layers, and the
            measurements. For a quantized state dict it is required, since that does not say how it is quantized.
        original_size_mb, quantized_size_mb, compression_ratio: Measurements for the header, in MiB; they replace
            those of ``quantization_info``.
        sqnr_db: The same, in decibels.
        convert_to_native: Save dequantized float weights under the names of standard layers, which any program can
            load without this library. (mono-quant 1.1 does so unless told otherwise.) Static graphs have none.

    Raises:
        CheckpointError: The suffix is unknown, the file cannot be written, or a tensor has no values.
        InputError: ``quantization_info`` is missing for a quantized state dict, or belongs to another model.
        InputTypeError: ``model`` is neither a module nor a state dict.
        ConfigurationError: A state dict is to be converted, or a directory cannot hold one of the layers (quantized
            convolutions have no place in compressed-tensors' layout).
    """
    target, model = checkpoint_path(path), uncompiled(model)
    measurements = {
        "original_size_mb": original_size_mb,
        "quantized_size_mb": quantized_size_mb,
        "compression_ratio": compression_ratio,
        "sqnr_db": sqnr_db,
    }
    if convert_to_native:
        model = with_standard_layers(require_module_to_convert(model))
    if target.is_dir() or not target.suffix:
        save_directory(model, target, quantization_info, measurements)
        return
    file_format = format_by_suffix(target)
    _write(gather(model, quantization_info, measurements), target, file_format)


def save_safetensors(
    model: nn.Module | Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Save a model to a safetensors file of any name; mono-quant 1.1's name of one half of :func:`save_model`.

    Args:
        model: A module or a state dict.
        path: The file.
        metadata: Further entries for the file's metadata; what is not a string is stored as JSON.

    Raises:
        ConfigurationError: ``metadata`` holds a key that the header uses.
        As :func:`save_model`.
    """
    given = metadata or {}
    extra = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    reserved = sorted(extra.keys() & {HEADER_KEY, "format"})
    if reserved:
        raise ConfigurationError(f"metadata holds {reserved}, which the file's header uses itself")
    contents = gather(model)
    _write(Contents(contents.tensors, contents.header, extra), checkpoint_path(path), SAFETENSORS)


def save_pytorch(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Save a model to a file of any name that ``torch.load(path, weights_only=True)`` reads as a state dict.

    Raises:
        As :func:`save_model`.
    """
    _write(gather(model), checkpoint_path(path), TORCH)


def save_tensors(tensors: Mapping[str, Tensor], header: CheckpointHeader, path: str | Path) -> None:
    """Save the tensors of a checkpoint again, with the header that they had.

    Raises:
        CheckpointError: The suffix is unknown, or the file cannot be written.
    """
    target = checkpoint_path(path)
    stored = {name: tensor for name, tensor in tensors.items() if name not in header.tied}
    _write(Contents(stored, header), target, format_by_suffix(target))


def _write(contents: Contents, path: Path, file_format: str) -> None:
    header = contents.header.to_json()
    try:
        with atomic_write(path) as stream:
            if file_format == TORCH:
                write_torch(stream, contents.tensors, contents.header.tied, header)
            else:
                metadata = {"format": "pt", **contents.metadata, HEADER_KEY: header}
                write_safetensors(stream, contents.tensors, metadata)
    except RuntimeError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


__all__ = ["save_model", "save_pytorch", "save_safetensors", "save_tensors"]
