"""What the kernels find on this machine: processor, instruction sets, libraries, threads."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mono_quant._version import __version__
from mono_quant.ops import native
from mono_quant.ops.backend import available_backends, get_backend

_INTERESTING = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class SystemConfig:
    """What quantized models run on.

    Attributes:
        backend: What the CPU operators run on now: ``native``, ``torch`` or ``reference``.
        available_backends: What they could run on, best first.
        instruction_set: The native kernels' instruction set; ``None`` if they are not loaded.
        available_instruction_sets: Those that this processor and build have, best first.
        native_missing: Why the native kernels are not loaded; empty if they are.
        processor: Its name.
        processor_features: Those that matter here, as PyTorch reports them.
        threads: Threads that PyTorch uses inside an operator.
        torch_version: Version of PyTorch.
        version: Version of mono_quant.
    """

    backend: str
    available_backends: tuple[str, ...]
    instruction_set: str | None
    available_instruction_sets: tuple[str, ...]
    native_missing: str
    processor: str
    processor_features: tuple[str, ...]
    threads: int
    torch_version: str
    version: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        kernels = f"native kernels, {self.instruction_set}"
        if self.native_missing:
            kernels = f"no native kernels: {self.native_missing}"
        lines = {
            "mono_quant": self.version,
            "torch": self.torch_version,
            "processor": self.processor,
            "features": ", ".join(self.processor_features) or "none that the kernels use",
            "kernels": kernels,
            "instruction sets": ", ".join(self.available_instruction_sets) or "none",
            "backend": f"{self.backend} (of {', '.join(self.available_backends)})",
            "threads": str(self.threads),
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def system_config() -> SystemConfig:
    """Answer what quantized models run on, here and now.

    Raises:
        BackendError: The environment asks for a backend or an instruction set that this machine does not have.
    """
    capabilities = _capabilities()
    return SystemConfig(
        backend=get_backend(),
        available_backends=available_backends(),
        instruction_set=native.instruction_set(),
        available_instruction_sets=native.available_instruction_sets(),
        native_missing=native.reason_not_loaded(),
        processor=str(capabilities.get("cpu_name") or platform.processor() or platform.machine()),
        processor_features=tuple(name for name in _INTERESTING if capabilities.get(name)),
        threads=torch.get_num_threads(),
        torch_version=str(torch.__version__),
        version=__version__,
    )


def _capabilities() -> dict[str, Any]:
    # Newer than the oldest PyTorch that the package supports.
    query = getattr(torch.cpu, "get_capabilities", None)
    return {} if query is None else dict(query())


def show_config() -> None:
    """Print what quantized models run on: versions, processor, kernels and why if they are missing, threads.

    Raises:
        BackendError: As :func:`system_config`.
    """
    print(system_config())
