"""A full disk or a killed process while saving leaves the old file whole."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mono_quant.io import load_model, save_model
from tests.io.models import python, same_bits

FULL_DISK = """
import resource, sys, torch, mono_quant
# A limit on the size of files fails in the same call, with the same kind of error, as a disk that is full.
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for path in sys.stdin.read().split():
    try:
        mono_quant.save_model({"a": torch.ones(1_000_000)}, path)
    except mono_quant.CheckpointError as error:
        print(error.message, error.suggestion is not None)
"""

KILLED = """
import os, signal, sys, torch, mono_quant
from mono_quant.io import atomic
path, moment = sys.stdin.read().split()
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "writing":
    from mono_quant.io import save
    write = save.write_safetensors
    def half(stream, *rest):
        write(stream, *rest)
        stream.truncate(stream.tell() // 2)
        die()
    save.write_safetensors = half
else:
    atomic.os.replace = die
mono_quant.save_model({"a": torch.zeros(100_000)}, path)
"""


def temporary_files(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".tmp")]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "a.pt"]
    old = {"a": torch.randn(8)}
    for path in paths:
        save_model(old, path)
    before = [path.read_bytes() for path in paths]
    process = python(FULL_DISK, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = process.communicate("\n".join(map(str, paths)))
    assert process.returncode == 0
    assert out.splitlines() == [f"cannot write {path}: File too large True" for path in paths]
    assert [path.read_bytes() for path in paths] == before
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_killed_process_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path, old = tmp_path / "a.safetensors", {"a": torch.randn(8)}
    save_model(old, path)
    process = python(KILLED, stdin=subprocess.PIPE)
    process.communicate(f"{path} {moment}")
    assert process.returncode == -signal.SIGKILL
    loaded = load_model(path)
    assert isinstance(loaded, dict)
    assert same_bits(loaded["a"], old["a"])
    # Nobody is left to remove what a killed process was writing; it is in nobody's way either.
    assert len(temporary_files(tmp_path)) == 1
    save_model({"a": torch.ones(2)}, path)
    again = load_model(path)
    assert isinstance(again, dict)
    assert torch.equal(again["a"], torch.ones(2))
