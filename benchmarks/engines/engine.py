"""What an adapter answers, and how adapters are found."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.environment import installed_version
from benchmarks.minilm import Encoder

#: Module names in this package, in the order of the tables. The first is what the others are divided by.
ADAPTERS = (
    "torch_float32",
    "torch_bfloat16",
    "mono_quant_int8",
    "mono_quant_int8_bfloat16",
    "torchao_int8",
    "quanto_int8",
    "onnxruntime_int8",
    "openvino_int8",
)
BASELINE = ADAPTERS[0]


@dataclass(frozen=True)
class Engine:
    """A model that is ready to run.

    Attributes:
        encode: From token ids and mask to hidden states.
        disk_bytes: Size of the files one would ship, or ``None`` if there is no file format to speak of.
    """

    encode: Encoder
    disk_bytes: int | None


@dataclass(frozen=True)
class Unavailable:
    """An adapter that cannot run here, and why."""

    reason: str


@dataclass(frozen=True)
class BuiltEngine:
    """An engine with its name and the versions it came from."""

    key: str
    name: str
    engine: Engine
    versions: dict[str, str]


def build_engine(key: str, directory: Path) -> BuiltEngine | Unavailable:
    """Build the engine of one adapter.

    Args:
        key: One of :data:`ADAPTERS`.
        directory: An empty folder for the files that it writes.
    """
    # Other libraries print and warn on their way; standard output belongs to the results.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapter = importlib.import_module(f"benchmarks.engines.{key}")
        except ImportError as error:
            return Unavailable(f"cannot be imported: {error}")
        try:
            engine = cast(Engine, adapter.build(directory))
        except Exception as error:  # a peer's failure must not lose the other measurements
            return Unavailable(f"failed to build: {type(error).__name__}: {str(error).splitlines()[:1]}")
    found = {name: installed_version(name) for name in cast(tuple[str, ...], adapter.DISTRIBUTIONS)}
    versions = {name: version for name, version in found.items() if version is not None}
    return BuiltEngine(key, cast(str, adapter.NAME), engine, versions)
