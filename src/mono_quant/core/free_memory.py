"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

# glibc keeps what is freed for the next allocation of a thread. Other C libraries have no such call.
_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back_freed_memory() -> None:
    """Let the C library return the pages that hold nothing any more; does nothing where it cannot be told to."""
    if _trim is not None:
        _trim(0)
