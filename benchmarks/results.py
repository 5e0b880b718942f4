"""Keeping measurements: one JSON document for each benchmark, replaced by the next run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "results"

#: Raised when the meaning of a field changes.
FORMAT = 1

Document = dict[str, Any]


def result_path(benchmark: str) -> Path:
    """Answer where the results of ``benchmark`` (``models`` or ``linear``) are kept."""
    return DIRECTORY / f"{benchmark}.json"


def dump(document: Document) -> str:
    """Answer ``document`` as JSON text."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def write(document: Document, path: Path) -> None:
    """Replace the results at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(document), encoding="utf-8")


def read(path: Path) -> Document | None:
    """Answer the results at ``path``, or ``None`` if nothing was measured yet.

    Raises:
        ValueError: They are of another format.
    """
    if not path.exists():
        return None
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} has format {document.get('format')!r}, expected {FORMAT}: measure again")
    return document
