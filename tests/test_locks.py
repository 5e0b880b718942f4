"""Locks exclude, and a forked child finds them free."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mono_quant.locks import ForkSafeLock


def test_one_thread_at_a_time_is_inside() -> None:
    lock, inside, most = ForkSafeLock(), 0, 0

    def enter(_: int) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(40)))
    assert most == 1


def test_an_error_inside_leaves_it_free() -> None:
    lock = ForkSafeLock()
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.__enter__).result(timeout=20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_it_is_free_in_a_child_forked_while_it_was_held() -> None:
    lock = ForkSafeLock()
    with lock:
        process = os.fork()
        if process == 0:
            signal.alarm(20)
            with lock:
                os._exit(0)
        assert os.waitpid(process, 0)[1] == 0
