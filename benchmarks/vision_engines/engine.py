"""How adapters of convolutional networks are found and called."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from benchmarks.engines import Unavailable
from benchmarks.environment import installed_version
from benchmarks.report import VISION_BASELINES

#: From images float32 ``[B, 3, H, W]`` to logits.
Classifier = Callable[[Tensor], Tensor]

#: Module names in this package, in the order of the tables.
ADAPTERS = ("torch_float32", "torch_channels_last", "torch_bfloat16", "mono_quant_static", "openvino_int8")
#: The two memory formats of float32; ratios are to the faster one.
BASELINES = VISION_BASELINES


@dataclass(frozen=True)
class VisionEngine:
    """An adapter that has prepared a model.

    Attributes:
        seconds: What preparing took; ``None`` for engines that only copy the model.
    """

    key: str
    name: str
    seconds: float | None
    versions: dict[str, str]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Other libraries print and warn on their way; standard output belongs to the results.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _adapter(key: str) -> Any:
    return importlib.import_module(f"benchmarks.vision_engines.{key}")


def prepare_engine(key: str, model: nn.Module, calibration: Tensor, directory: Path) -> VisionEngine | Unavailable:
    """Let one adapter prepare ``model`` and keep the outcome in ``directory``."""
    with _quiet():
        try:
            adapter = _adapter(key)
        except ImportError as error:
            return Unavailable(f"cannot be imported: {error}")
        try:
            seconds = cast("float | None", adapter.build(model, calibration, directory))
        except Exception as error:  # a peer's failure must not lose the other measurements
            return Unavailable(f"failed to build: {type(error).__name__}: {str(error).splitlines()[:1]}")
    found = {name: installed_version(name) for name in cast("tuple[str, ...]", adapter.DISTRIBUTIONS)}
    versions = {name: version for name, version in found.items() if version is not None}
    return VisionEngine(key, cast(str, adapter.NAME), seconds, versions)


def load_engine(key: str, make: Callable[[], nn.Module], directory: Path) -> Classifier:
    """Answer what :func:`prepare_engine` kept, ready to run.

    Args:
        key: One of :data:`ADAPTERS`.
        make: Makes the float model anew; only engines that run it call this.
        directory: Where it was kept.
    """
    with _quiet():
        return cast(Classifier, _adapter(key).load(make, directory))
