"""Saves transformers models as directories that transformers and other engines know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn

from mono_quant.core.layer_scheme import WEIGHT_ONLY
from mono_quant.core.packing import pack_int32
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import CheckpointError, ConfigurationError
from mono_quant.graph import is_static
from mono_quant.integrations.transformers import is_transformers_model, model_config, quantization_config
from mono_quant.io.atomic import PendingFile, write_error
from mono_quant.io.checkpoint import DIRECTORY_FILE
from mono_quant.io.contents import Contents, gather
from mono_quant.io.header import HEADER_KEY
from mono_quant.io.safetensors_file import write_safetensors

#: What belongs to the inputs of a model and not to its weights, as it lies beside them in its directory.
_COMPANIONS: Final = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)


def save_directory(
    model: nn.Module | Mapping[str, Tensor],
    directory: Path,
    info: QuantizationInfo | None,
    measurements: Mapping[str, float | None],
) -> None:
    """Write a transformers model as a directory; the files in it are replaced together, when all are written.

    Raises:
        CheckpointError: ``model`` is not a transformers model, or the directory cannot be written.
        ConfigurationError: A layer has no place in compressed-tensors' layout; named.
    """
    if isinstance(model, nn.Module) and is_static(model):
        raise ConfigurationError(
            f"{directory} is a directory or has no suffix, and static layers have no place in the layout of "
            "transformers directories",
            suggestion="Name a file that ends in .safetensors.",
        )
    if not isinstance(model, nn.Module) or not is_transformers_model(model):
        raise CheckpointError(
            f"{directory} is a directory or has no suffix, and only transformers models are saved to directories; "
            f"found a {type(model).__name__}",
            suggestion="Name a file that ends in .safetensors.",
        )
    config = model_config(model)
    quantization = quantization_config(model)
    if quantization is not None:
        config["quantization_config"] = quantization
    contents = gather(model, info, measurements)
    texts = {"config.json": json.dumps(config, indent=2, sort_keys=True) + "\n"}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        texts["generation_config.json"] = generation.to_json_string()
    is_new = not directory.exists()
    try:
        if is_new:
            directory.mkdir()
        _write_files(directory, contents, texts, _companions(model, directory))
    except BaseException as error:
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError):
            raise write_error(directory, error) from error
        raise


def _write_files(directory: Path, contents: Contents, texts: Mapping[str, str], companions: list[Path]) -> None:
    pending: list[PendingFile] = []

    def start(name: str) -> BinaryIO:
        pending.append(PendingFile(directory / name))
        return pending[-1].stream

    try:
        # The weights first: with an old config.json beside it the file still says itself what it holds.
        metadata = {"format": "pt", HEADER_KEY: contents.header.to_json()}
        write_safetensors(start(DIRECTORY_FILE), _with_packed_zero_points(contents), metadata)
        for name, text in texts.items():
            start(name).write(text.encode())
        for source in companions:
            with source.open("rb") as stream:
                shutil.copyfileobj(stream, start(source.name))
        for file in pending:
            file.finish()
        for file in pending:
            file.commit()
    finally:
        for file in pending:
            file.discard()


def _with_packed_zero_points(contents: Contents) -> dict[str, Tensor]:
    """Pack the zero points of packed weights along the output channels, as compressed-tensors has them."""
    tensors = dict(contents.tensors)
    for name, record in contents.header.layers.items():
        key = f"{name}.weight_zero_point" if name else "weight_zero_point"
        if record.scheme.kind == WEIGHT_ONLY and key in tensors and tensors[key].dtype == torch.int8:
            tensors[key] = pack_int32(tensors[key].t(), record.scheme.bits).t().contiguous()
    return tensors


def _companions(model: nn.Module, directory: Path) -> list[Path]:
    config: Any = model.config
    source = getattr(config, "_name_or_path", None)
    # A name of a model hub may also be that of a directory here; then it has a config.json.
    if not source or not (Path(source) / "config.json").is_file() or Path(source).resolve() == directory.resolve():
        return []
    found = {path for pattern in _COMPANIONS for path in Path(source).glob(pattern) if path.is_file()}
    return sorted(found)


__all__ = ["save_directory"]
