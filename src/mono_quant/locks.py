"""Locks of the whole process, and what becomes of them when it forks."""

from __future__ import annotations

import os
from threading import Lock
from types import TracebackType


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it in the parent.

    A thread that holds a lock while another forks does not exist in the child, where nobody would release it. What
    such a lock guards must therefore be whole at every moment, as a single assignment is.

    Meant for modules and other things that live as long as the process, since it is never forgotten.
    """

    _lock: Lock

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
