"""Finds and loads the library of native kernels."""

from __future__ import annotations


def is_loaded() -> bool:
    """Say whether the native kernels are registered."""
    return False


def reason_not_loaded() -> str:
    """Say why the native kernels are absent; empty if they are loaded."""
    return "this installation was built without a C++ compiler"


def operators() -> frozenset[str]:
    """Answer the names of the operators that the native library implements."""
    return frozenset()
