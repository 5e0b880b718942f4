"""The kernels without torch: the driver that the sanitizers run, here built without them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_every_kernel_agrees_with_naive_loops_and_stays_within_its_buffers() -> None:
    done = subprocess.run(
        [str(ROOT / "tools" / "sanitize.sh"), "-O1"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert names[-1] == "generic"
    # The tiles of AMX run in emulation wherever the rest of their unit can.
    assert ("amx_emulated" in names) == ("avx512vnni" in names)
