"""What a measurement was taken on: without it a figure means nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata

from mono_quant.ops import system_config


@dataclass(frozen=True)
class Environment:
    """Processor, software and date of a measurement.

    Attributes:
        features: What kernels look for in a processor, as PyTorch reports it.
        cores: Those that this process may use.
        threads: Those that PyTorch uses inside an operator.
        backend: What the operators of mono_quant run on.
        kernels: The instruction set of its native kernels, or ``None`` if they are not loaded.
        date: Of the measurement, UTC.
    """

    processor: str
    features: list[str]
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


def describe_environment(distributions: tuple[str, ...] = ()) -> Environment:
    """Answer the environment of this process.

    Args:
        distributions: Whose versions matter too; those not installed are left out.
    """
    config = system_config()
    versions = {"torch": config.torch_version, "mono-quant": config.version}
    found = {name: installed_version(name) for name in distributions}
    versions |= {name: version for name, version in found.items() if version is not None and name not in versions}
    return Environment(
        processor=config.processor,
        features=list(config.processor_features),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=config.threads,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions,
        backend=config.backend,
        kernels=config.instruction_set,
        date=datetime.now(UTC).date().isoformat(),
    )


def installed_version(distribution: str) -> str | None:
    """Answer the version of an installed distribution, or ``None``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
