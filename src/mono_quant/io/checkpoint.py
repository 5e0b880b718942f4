"""Opens a checkpoint of either format: its header, the names, shapes and dtypes of its tensors, and the tensors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from mono_quant.core.layer_scheme import WEIGHT_ONLY
from mono_quant.core.packing import unpack_int32
from mono_quant.errors import CheckpointError, InputTypeError
from mono_quant.io.header import HEADER_KEY, CheckpointHeader, parse_header
from mono_quant.io.safetensors_file import SafetensorsFile
from mono_quant.io.torch_file import TorchFile

SAFETENSORS: Final = "safetensors"
TORCH: Final = "torch"
#: The weights' file in a directory of transformers.
DIRECTORY_FILE: Final = "model.safetensors"

_FORMATS: Final = {".safetensors": SAFETENSORS, ".pt": TORCH, ".pth": TORCH}


class TensorFile(Protocol):
    """An open file of tensors."""

    @property
    def names(self) -> frozenset[str]: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]: ...

    def read(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _PackedZeroPoint:
    channels: int
    groups: int
    bits: int


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: The file.
        file: Its tensors under the names that they are stored under.
        header: What mono_quant wrote about it; ``None`` in a file of another program.
    """

    path: Path
    file: TensorFile
    header: CheckpointHeader | None

    @property
    def tied(self) -> dict[str, str]:
        return {} if self.header is None else dict(self.header.tied)

    @property
    def names(self) -> list[str]:
        """All names of tensors, those of tied ones included."""
        return sorted(self.file.names | self.tied.keys())

    def stored_name(self, name: str) -> str:
        """Answer the name that a tensor is stored under."""
        return self.tied.get(name, name)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Answer shape and dtype of a tensor without reading it."""
        packed = self._packed_zero_point(name)
        if packed is not None:
            return (packed.channels, packed.groups), torch.int8
        return self.file.describe(self.stored_name(name))

    def read(self, name: str) -> Tensor:
        """Answer a tensor that may be mapped from the file."""
        tensor = self.file.read(self.stored_name(name))
        packed = self._packed_zero_point(name)
        return tensor if packed is None else unpack_int32(tensor.t(), packed.bits, packed.channels).t()

    def _packed_zero_point(self, name: str) -> _PackedZeroPoint | None:
        """Answer how a zero point is packed along the output channels, as compressed-tensors does in directories."""
        layer, _, local = name.rpartition(".")
        record = None if self.header is None else self.header.layers.get(layer)
        if local != "weight_zero_point" or record is None or record.scheme.kind != WEIGHT_ONLY:
            return None
        scale = self.stored_name(f"{layer}.weight_scale" if layer else "weight_scale")
        shape, dtype = self.file.describe(self.stored_name(name))
        of_scale = self.file.describe(scale)[0] if scale in self.file.names else ()
        bits = record.scheme.bits
        if dtype != torch.int32 or len(of_scale) != 2 or shape != (-(-of_scale[0] * bits // 32), of_scale[1]):
            return None
        return _PackedZeroPoint(*of_scale, bits)


def checkpoint_path(path: object) -> Path:
    """Answer ``path`` as a :class:`~pathlib.Path`; there need not be anything.

    Raises:
        InputTypeError: It is no path.
        CheckpointError: No file can have that name.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(f"expected a path, found a {type(path).__name__}")
    name = os.fsdecode(path)
    try:
        os.lstat(name)
    except ValueError as error:
        raise CheckpointError(f"no file can be named {name!r}: {error}", suggestion="Check the path.") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shortened = name if len(name) <= 80 else f"{name[:40]}...{name[-40:]}"
            raise CheckpointError(
                f"no file can be named {shortened!r}: {error.strerror}", suggestion="Choose a shorter path."
            ) from error
    return Path(name)


def format_by_suffix(path: Path) -> str:
    """Answer the format that the suffix of ``path`` names.

    Raises:
        CheckpointError: It names none.
    """
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        found = f"has the suffix {path.suffix!r}" if path.suffix else "has no suffix"
        raise CheckpointError(
            f"{path} {found}, expected one of {', '.join(_FORMATS)}",
            suggestion="Use .safetensors; directories are for transformers models.",
        )
    return _FORMATS[suffix]


@contextmanager
def open_checkpoint(path: Path, allow_pickle: bool = False, file_format: str | None = None) -> Iterator[Checkpoint]:
    """Open a checkpoint file, or the one inside a directory of transformers.

    Args:
        path: The file or directory.
        allow_pickle: Whether a ``.pt`` file may be unpickled, which runs code that it contains.
        file_format: Where the suffix is not to decide.

    Raises:
        CheckpointError: There is no such file, it cannot be read, its header is damaged or of an unknown version.
    """
    if path.is_dir():
        path = _file_of_directory(path)
    file_format = file_format or format_by_suffix(path)
    _require_readable(path)
    file: TensorFile = SafetensorsFile(path) if file_format == SAFETENSORS else TorchFile(path, allow_pickle)
    try:
        text = file.metadata.get(HEADER_KEY)
        header = None if text is None else parse_header(text, path)
        if header is not None:
            _require_consistent(path, header, file.names, file_format)
        yield Checkpoint(path, file, header)
    finally:
        file.close()


def _file_of_directory(directory: Path) -> Path:
    path = directory / DIRECTORY_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is a directory without a {DIRECTORY_FILE}",
            suggestion="Name a file, or a directory that save_model wrote.",
        )
    return path


def _require_readable(path: Path) -> None:
    try:
        if path.exists() and not path.is_file():
            # Reading a pipe or a device may never end.
            raise CheckpointError(f"{path} is not a regular file", suggestion="Check the path.")
        with path.open("rb") as stream:
            if not stream.read(1):
                raise CheckpointError(f"{path} is empty", suggestion="Copy, download or save it again.")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}",
            suggestion="Check the path." if missing else "Check the path and your permissions.",
        ) from error


def _require_consistent(path: Path, header: CheckpointHeader, names: frozenset[str], file_format: str) -> None:
    for alias, stored in header.tied.items():
        if stored not in names:
            raise CheckpointError(f"{path}: the header ties {alias!r} to {stored!r}, which the file does not hold")
        # The dict of a .pt file holds every name, so that it remains a state dict for other programs.
        if file_format == SAFETENSORS and alias in names:
            raise CheckpointError(f"{path}: the header ties {alias!r} to {stored!r}, and the file holds both")


def find_header(path: str | Path, allow_pickle: bool = False) -> CheckpointHeader | None:
    """Answer what mono_quant wrote about a checkpoint, without reading its tensors; ``None`` if it wrote nothing.

    Args:
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file, or a directory (without ``model.safetensors`` there can
            be no header).
        allow_pickle: Let a ``.pt`` file run the code that it contains.

    Raises:
        CheckpointError: The file cannot be read, or its header is damaged or of an unknown version.
    """
    source = checkpoint_path(path)
    if source.is_dir() and not (source / DIRECTORY_FILE).is_file():
        return None
    with open_checkpoint(source, allow_pickle) as checkpoint:
        return checkpoint.header


def read_header(path: str | Path) -> CheckpointHeader:
    """Answer what mono_quant wrote about a checkpoint, without reading its tensors.

    Args:
        path: As for :func:`find_header`.

    Raises:
        CheckpointError: The file cannot be read, was written by another program, or has an unknown version.
    """
    header = find_header(path)
    if header is None:
        raise CheckpointError(
            f"{path} has no {HEADER_KEY} header: it was not written by this library",
            suggestion="quantize() takes such a file; load_model() answers its tensors.",
        )
    return header
