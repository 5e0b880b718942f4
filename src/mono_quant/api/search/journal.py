"""The file that a search keeps its measurements in, and from which it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.api.search.path import UnitCosts
from mono_quant.calibration import Batch
from mono_quant.calibration.batches import tensors_in
from mono_quant.errors import CheckpointError
from mono_quant.io.atomic import atomic_write

KIND: Final = "mono_quant search"
VERSION: Final = 1

_REMEDY: Final = "Name another file with resume=, or remove this one to start anew."
_CHUNK_BYTES: Final = 1 << 24


@dataclass(frozen=True)
class Measured:
    """The measures of one model.

    Attributes:
        formats: For each unit's name its format.
        value: What ``eval_fn`` answered.
        sqnr_db: Of the model's outputs.
        seconds: What measuring took.
    """

    formats: Mapping[str, str]
    value: float | None
    sqnr_db: float | None
    seconds: float


@dataclass
class Journal:
    """What a search has measured so far; written to its file after every addition.

    Attributes:
        path: The file, or ``None`` to keep nothing.
        fingerprint: What the measurements depend on, as words and the hash or value of each.
        costs: What the units cost and cause, or ``None`` if that was not measured yet.
        measured: By the formats of all units.
        notes: What the user should know of the measurement of the units.
    """

    path: Path | None
    fingerprint: Mapping[str, str]
    costs: dict[str, UnitCosts] | None = None
    measured: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path | None, fingerprint: Mapping[str, str]) -> Journal:
        """Answer the journal in a file, or a new one where there is no file; an unfit file is left as it is.

        Raises:
            CheckpointError: The file is damaged, not a whole one, of another kind, version or search, or cannot be
                written.
        """
        if path is None:
            return cls(None, fingerprint)
        journal = cls(Path(path), fingerprint)
        if Path(path).exists():
            journal._read()
        # Whoever cannot write here should know it before the work.
        journal.write()
        return journal

    def find(self, formats: Mapping[str, str]) -> Measured | None:
        return next((measured for measured in self.measured if measured.formats == formats), None)

    def write(self) -> None:
        """Replace the file as a whole.

        Raises:
            CheckpointError: It cannot be written; the old one is unchanged.
        """
        if self.path is None:
            return
        content = {
            "fingerprint": dict(self.fingerprint),
            "costs": None if self.costs is None else {name: asdict(costs) for name, costs in self.costs.items()},
            "measured": [asdict(measured) for measured in self.measured],
            "notes": self.notes,
        }
        document = {"kind": KIND, "version": VERSION, "checksum": _checksum(content), "content": content}
        with atomic_write(self.path) as stream:
            stream.write(json.dumps(document, indent=1).encode())

    def _read(self) -> None:
        content = self._content()
        found = content["fingerprint"]
        other = [part for part in self.fingerprint if found.get(part) != self.fingerprint[part]]
        if other:
            raise CheckpointError(f"{self.path} belongs to another search: it differs in {', '.join(other)}", _REMEDY)
        costs = content["costs"]
        self.costs = None if costs is None else {name: UnitCosts(**values) for name, values in costs.items()}
        self.measured = [Measured(**values) for values in content["measured"]]
        self.notes = list(content["notes"])

    def _content(self) -> dict[str, Any]:
        assert self.path is not None
        try:
            document = json.loads(self.path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}", _REMEDY) from error
        except ValueError as error:  # neither UTF-8 nor JSON
            raise CheckpointError(f"{self.path} is damaged or not the file of a search: {error}", _REMEDY) from error
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise CheckpointError(f"{self.path} is not the file of a search", _REMEDY)
        if document.get("version") != VERSION:
            raise CheckpointError(
                f"{self.path} has the version {document.get('version')!r}, expected {VERSION}", _REMEDY
            )
        content = document.get("content")
        if not isinstance(content, dict) or document.get("checksum") != _checksum(content):
            raise CheckpointError(f"{self.path} is damaged: its checksum does not fit what it holds", _REMEDY)
        return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_model(model: nn.Module) -> str:
    """Answer a hash of a model's structure and of all its parameters and buffers."""
    digest = hashlib.blake2b(repr(model).encode(), digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} ".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def hash_batches(batches: Sequence[Batch]) -> str:
    """Answer a hash of calibration data."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        digest.update(batch.describe().encode())
        for tensor in tensors_in(batch.args, batch.kwargs):
            _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    for part in flat.split(_CHUNK_BYTES):
        digest.update(part.cpu().numpy())
