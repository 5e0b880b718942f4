"""``.pt`` and ``.pth`` files: PyTorch's own format, holding plain tensors; nothing is unpickled unless asked for."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn

from mono_quant.errors import CheckpointError
from mono_quant.io.header import HEADER_KEY

# How torch.save began its files before it wrote zip archives: a pickled number.
_LEGACY_MAGIC: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
#: Keys under which training scripts keep the state dict beside other things.
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model")


def write_torch(stream: BinaryIO, tensors: Mapping[str, Tensor], tied: Mapping[str, str], header: str) -> None:
    """Write a dict of plain tensors that ``torch.load(weights_only=True)`` reads; the header is its attribute.

    Args:
        stream: A binary file.
        tensors: What to store.
        tied: Further names of stored tensors, which the dict holds too, as the same tensors.
        header: The document, kept out of the dict so that the dict remains a state dict.

    Raises:
        OSError: The stream cannot be written.
    """
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        # torch.save writes whole storages: a slice would bring along all that it was cut from.
        state[name] = plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain
    state.update({alias: state[name] for alias, name in tied.items()})
    setattr(state, HEADER_KEY, header)
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        # The writer complains about its own bookkeeping after the disk did.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class TorchFile:
    """The tensors of a ``.pt`` file, mapped from it where its format allows that.

    A dict that holds the state dict under ``state_dict``, ``model_state_dict`` or ``model`` stands for that one.

    Attributes:
        module: The module, if the file holds one instead of tensors (only with ``allow_pickle``).

    Raises:
        CheckpointError: The file is not readable as such, needs unpickling, or holds something else.
    """

    module: nn.Module | None

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self.path = path
        content = _load(path, allow_pickle)
        self.module = content if isinstance(content, nn.Module) else None
        self._tensors = _plain_tensors(path, content)
        header = getattr(content, HEADER_KEY, None) if isinstance(content, dict) else None
        self.metadata = {HEADER_KEY: header} if isinstance(header, str) else {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._tensors[name].shape), self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors = {}


def _load(path: Path, allow_pickle: bool) -> Any:
    """Answer what the file holds.

    Raises:
        CheckpointError: It cannot be read, or not without unpickling.
    """
    is_archive = _is_archive(path)
    if not is_archive and not _is_legacy(path):
        raise CheckpointError(
            f"{path} is not a file of torch.save, or is truncated or damaged",
            suggestion="Copy or download it again, and check that its suffix fits its contents.",
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=is_archive)
    except pickle.UnpicklingError as error:
        # An archive vouches for its bytes with checksums; an old file that does not get as far as a name is damaged.
        found = re.search(r"GLOBAL (\S+)", str(error))
        if allow_pickle or not (is_archive or found):
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path} holds more than plain tensors{f' ({found[1]})' if found else ''}, and unpickling it can run code",
            suggestion="If you trust its source, pass allow_pickle=True; better, save the state dict alone.",
        ) from None
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} needs the module {error.name!r}, which cannot be imported",
            suggestion="Install it or put it on PYTHONPATH; better, save the state dict alone.",
        ) from error
    except Exception as error:
        # Damaged archives and pickles fail in as many ways as there are bytes to damage.
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"{path} cannot be read: it is truncated or damaged ({reason})", suggestion="Copy or download it again."
    )


def _is_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _is_legacy(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC


def _plain_tensors(path: Path, content: object) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a dict of tensors", suggestion="Save a state dict."
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} at {name!r}, expected tensors by name",
                suggestion="Save a state dict, alone or under the key 'state_dict'.",
            )
    return dict(content)


__all__ = ["TorchFile", "write_torch"]
