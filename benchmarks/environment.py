"""What a measurement was taken on: without it a figure means nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from mono_quant import ops
from mono_quant._version import __version__
from mono_quant.ops import native

# What int8 kernels look for.
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")


@dataclass(frozen=True)
class Environment:
    """Processor, software and date of a measurement.

    Attributes:
        backend: What the operators of mono_quant run on.
        kernels: The instruction set of its native kernels, or ``None`` if they are not loaded.
        date: Of the measurement, UTC.
    """

    processor: str
    instruction_sets: list[str]
    cores: int
    threads: int
    system: str
    python: str
    versions: dict[str, str]
    backend: str
    kernels: str | None
    date: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        """Answer one line for people: processor and what the operators run on."""
        kernels = f"{self.backend} ({self.kernels})" if self.backend == "native" else self.backend
        return f"{self.processor}, {self.cores} cores, {self.threads} threads; operators run on: {kernels}"


def describe_environment(peers: tuple[str, ...] = ()) -> Environment:
    """Answer the environment of this process.

    Args:
        peers: Distributions whose versions matter too; those not installed are left out.
    """
    model, flags = _processor()
    versions = {"torch": torch.__version__, "mono_quant": __version__}
    for peer in peers:
        version = installed_version(peer)
        if version is not None:
            versions[peer] = version
    return Environment(
        processor=model,
        instruction_sets=[name for name in _INSTRUCTION_SETS if name in flags],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions,
        backend=ops.get_backend(),
        kernels=native.instruction_set(),
        date=datetime.now(UTC).date().isoformat(),
    )


def installed_version(distribution: str) -> str | None:
    """Answer the version of an installed distribution, or ``None``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, frozenset[str]]:
    """Answer the processor's name and its feature flags, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.machine(), frozenset(flags.split())
