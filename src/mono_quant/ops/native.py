"""Finds and loads the library of native kernels.

The library is built from ``csrc/`` at install time, links PyTorch's stable C interface and no Python, and registers
CPU kernels for the operators of :mod:`mono_quant.ops.library` when it is loaded. It is loaded once, on first question.

Environment:
    MONO_QUANT_NATIVE: ``0`` leaves the library alone.
    MONO_QUANT_ISA: One of :func:`available_instruction_sets`; the best by default.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from mono_quant._version import __version__
from mono_quant.errors import BackendError

LIBRARY = Path(__file__).parent.parent / "_native.so"
SWITCH = "MONO_QUANT_NATIVE"
ISA_VARIABLE = "MONO_QUANT_ISA"

# Which of them it was, an installation does not tell.
_NOT_BUILT = (
    "this installation was built without native kernels (no C++ compiler or no torch at build time, a compiler that "
    "failed, or MONO_QUANT_BUILD=off)"
)

_OPERATORS = frozenset(
    {
        "quantize_rows",
        "linear_dynamic",
        "pack_weight",
        "unpack_weight",
        "linear_dynamic_packed",
        "embedding",
        "linear_weight_only",
        "linear_half",
        "count_values",
        "encoder_layer",
        "hold_encoder_layers",
        "encoder_layers",
        "decoder_layer",
        "decoder_layer_static_cache",
        "hold_decoder_layers",
        "decoder_layers",
        "decoder_layers_static_cache",
        "run_codes",
    }
)


@dataclass(frozen=True)
class _State:
    library: ctypes.CDLL | None
    reason: str


def is_loaded() -> bool:
    """Say whether the native kernels are registered.

    Raises:
        BackendError: The environment asks for an instruction set that this machine does not have.
    """
    return _state().library is not None


def reason_not_loaded() -> str:
    """Say why the native kernels are absent; empty if they are loaded."""
    return _state().reason


def operators() -> frozenset[str]:
    """Answer the names of the operators that the native library implements; none if it is not loaded."""
    return _OPERATORS if is_loaded() else frozenset()


def instruction_set() -> str | None:
    """Answer the name of the instruction set the kernels use, or ``None`` if they are not loaded."""
    library = _state().library
    return None if library is None else _text(library.mono_quant_isa())


def available_instruction_sets() -> tuple[str, ...]:
    """Answer the instruction sets that this processor and build offer, best first; empty if not loaded."""
    library = _state().library
    return () if library is None else tuple(_text(library.mono_quant_available_isas()).split(","))


def set_instruction_set(name: str) -> None:
    """Use the kernels of another instruction set from now on, in the whole process.

    Raises:
        BackendError: The library is not loaded, or this processor or build does not have ``name``.
    """
    library = _state().library
    if library is None:
        raise BackendError(f"the native library is not loaded: {reason_not_loaded()}")
    _choose(library, name)


def release_decoder_layers(number: int) -> None:
    """Forget the layers of a number that the operator ``hold_decoder_layers`` has answered; not loaded, do nothing."""
    library = _state().library
    if library is not None:
        library.mono_quant_release_decoder_layers(number)


def release_encoder_layers(number: int) -> None:
    """Forget the layers of a number that the operator ``hold_encoder_layers`` has answered; not loaded, do nothing."""
    library = _state().library
    if library is not None:
        library.mono_quant_release_encoder_layers(number)


def is_switched_off() -> bool:
    """Say whether the environment keeps the library from being loaded."""
    return os.environ.get(SWITCH) == "0"


@cache
def _state() -> _State:
    if is_switched_off():
        return _State(None, f"switched off by {SWITCH}=0")
    if not LIBRARY.exists():
        return _State(None, _NOT_BUILT)
    try:
        probe = _declare(ctypes.CDLL(str(LIBRARY)))
        found = _text(probe.mono_quant_version())
        # The registrations run when the library is mapped, so a foreign version must still be kept from use.
        if found != __version__:
            return _State(None, f"{LIBRARY} is of version {found}, the package of version {__version__}; reinstall")
        torch.ops.load_library(str(LIBRARY))
    except (OSError, AttributeError) as error:
        return _State(None, f"{LIBRARY} does not load under torch {torch.__version__}: {error}")
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        _choose(probe, wanted)
    return _State(probe, "")


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("mono_quant_version", "mono_quant_isa", "mono_quant_available_isas"):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        function.argtypes = []
    library.mono_quant_set_isa.restype = ctypes.c_int
    library.mono_quant_set_isa.argtypes = [ctypes.c_char_p]
    for release in (library.mono_quant_release_decoder_layers, library.mono_quant_release_encoder_layers):
        release.restype = None
        release.argtypes = [ctypes.c_int64]
    return library


def _choose(library: ctypes.CDLL, name: str) -> None:
    if library.mono_quant_set_isa(name.encode()) != 0:
        have = _text(library.mono_quant_available_isas()).replace(",", ", ")
        raise BackendError(
            f"instruction set {name!r} is not available on this machine; it has {have}",
            suggestion=f"Set {ISA_VARIABLE} to one of these, or leave it unset for the best.",
        )


def _text(value: bytes) -> str:
    return value.decode()
