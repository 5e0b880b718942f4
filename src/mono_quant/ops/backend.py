"""Which implementation runs on the CPU: the native kernels, PyTorch's own, or the specification."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.library import Library

from mono_quant.errors import BackendError
from mono_quant.locks import ForkSafeLock
from mono_quant.ops import native, torch_cpu
from mono_quant.ops.library import NAMESPACE, REFERENCE, SCHEMAS

BACKENDS = ("native", "torch", "reference")
ENVIRONMENT_VARIABLE = "MONO_QUANT_BACKEND"

# What PyTorch has no integer kernel for runs the specification, block by block.
_TORCH: dict[str, Callable[..., Any]] = REFERENCE | {
    "quantize_rows": torch_cpu.quantize_rows,
    "linear_dynamic": torch_cpu.linear_dynamic,
    "linear_dynamic_packed": torch_cpu.linear_dynamic_packed,
    "conv_dynamic": torch_cpu.conv_dynamic,
}

_lock = ForkSafeLock()
_override: Library | None = None
_current = "reference"
# Why no backend runs: the environment asks for one that is not there.
_refusal: BackendError | None = None


def available_backends() -> tuple[str, ...]:
    """Answer the names that :func:`set_backend` takes on this machine, best first."""
    return tuple(name for name in BACKENDS if name != "native" or native.is_loaded())


def get_backend() -> str:
    """Answer the name of the backend that the CPU operators run on.

    Raises:
        BackendError: The environment asks for what this machine does not have, and nothing else was chosen since.
    """
    if _refusal is not None:
        raise BackendError(_refusal.message, _refusal.suggestion)
    return _current


def set_backend(name: str) -> None:
    """Choose what the CPU operators run on, for the whole process.

    Args:
        name: ``native`` (the C++ kernels), ``torch`` (what PyTorch ships) or ``reference`` (the specification).

    Raises:
        BackendError: There is no such backend, or the native library is not loaded; says why. Or the environment asks
            for an instruction set that this machine does not have.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    # Asked whatever the name is: a library that is loaded later would put its kernels over the ones registered below.
    loaded = native.is_loaded()
    if name == "native" and not loaded:
        remedy = "Install with a C++ compiler and torch present"
        if native.is_switched_off():
            remedy = f"Unset {native.SWITCH}"
        raise BackendError(
            f"the native library is not loaded: {native.reason_not_loaded()}",
            suggestion=f"{remedy}, or choose the backend 'torch'.",
        )
    if name == "native":
        # What has no native kernel runs on PyTorch's.
        _override_kernels({k: v for k, v in _TORCH.items() if k not in native.operators()}, name, None)
    else:
        _override_kernels(_TORCH if name == "torch" else REFERENCE, name, None)


def _override_kernels(
    implementations: Mapping[str, Callable[..., Any]], name: str, refusal: BackendError | None
) -> None:
    """Register the CPU kernels of a backend in the place of those before, or what refuses to run."""
    global _override, _current, _refusal
    with _lock:
        if _override is not None:
            _override._destroy()
            _override = None
        _override = _register(implementations)
        _current, _refusal = name, refusal


def _register(implementations: Mapping[str, Callable[..., Any]]) -> Library:
    library = Library(NAMESPACE, "IMPL")
    # PyTorch warns that kernels are overridden, which is the purpose here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, implementation in implementations.items():
            library.impl(name, implementation, "CPU")
    return library


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose a backend for a ``with`` block, then go back to the one before (for the whole process).

    Raises:
        BackendError: As :func:`get_backend` and :func:`set_backend`.
    """
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def choose_default_backend() -> None:
    """Take the backend that the environment names, or the best one there is.

    An environment that asks for what this machine does not have is an error where a backend is first used, not here:
    importing the package calls this, and who imports it should be able to say it in their own way, as the command line
    does. Until :func:`set_backend` chooses another, the operators run nowhere on the CPU.
    """
    try:
        _take_environment()
    except BackendError as error:
        _override_kernels(dict.fromkeys(SCHEMAS, _refuse), _current, error)


def _refuse(*_args: Any, **_kwargs: Any) -> None:
    get_backend()


def _take_environment() -> None:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    available = available_backends()
    try:
        set_backend(wanted or available[0])
    except BackendError as error:
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={wanted}: {error.message}",
            suggestion=error.suggestion
            or f"Set {ENVIRONMENT_VARIABLE} to one of these, or leave it unset for the best.",
        ) from error
    if not wanted and not native.is_loaded() and not native.is_switched_off():
        # Said when a layer first runs: importing the package to read a checkpoint concerns nobody.
        torch_cpu.announce_on_first_use(
            f"mono_quant runs on PyTorch's own int8 kernels: {native.reason_not_loaded()}. They are slower; install "
            "with a C++ compiler and torch present to build the native ones (python -m pip install "
            "--no-build-isolation), or set MONO_QUANT_BACKEND=torch to silence this."
        )
