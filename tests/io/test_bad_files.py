"""Whatever a path leads to, reading it gives one clear error of this library that names it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mono_quant
from mono_quant import CheckpointError, InputTypeError
from mono_quant.io import load_model, load_source, read_header, save_model
from mono_quant.report import load_inputs
from mono_quant.report.inspection import inspect_file
from tests.io.models import build, quantized

SUFFIXES = [".safetensors", ".pt", ".pth"]
READERS: dict[str, Callable[[Path], Any]] = {
    "load_model": load_model,
    "load_model with an architecture": lambda path: load_model(path, build("bare")),
    "load_source": load_source,
    "read_header": read_header,
    "quantize": mono_quant.quantize,
}


def whole(path: Path) -> bytes:
    save_model(quantized("bare"), path)
    return path.read_bytes()


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello/readme", "text")


def spoil(path: Path, kind: str) -> None:
    content = {
        "empty": lambda: b"",
        "truncated": lambda: whole(path)[:-40],
        "cut after the start": lambda: whole(path)[:20],
        "random": lambda: bytes(torch.randint(0, 256, (4096,), dtype=torch.uint8).tolist()),
        "json": lambda: json.dumps({"format": "pt"}).encode(),
        "text": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pickle": lambda: pickle.dumps({"a": 1}),
        "pickled nothing": lambda: pickle.dumps(None, protocol=2),
        "zeros": lambda: bytes(512),
        "longer": lambda: whole(path) + b"x" if path.suffix == ".safetensors" else b"x" + whole(path)[:-200],
    }[kind]()
    path.write_bytes(content)


KINDS = [
    "empty", "truncated", "cut after the start", "random", "json", "text", "pickle", "pickled nothing", "zeros",
    "longer",
]  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_file_is_one_clear_error(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    spoil(path, kind)
    for name, read in READERS.items():
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(path) in caught.value.message, name
        assert caught.value.suggestion
        assert len(caught.value.message) < 700


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_foreign_archive_is_one_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    archive(path)
    for read in READERS.values():
        with pytest.raises(CheckpointError, match="is not a"):
            read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_and_a_directory_are_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"directory{suffix}").mkdir()
    for name in ("missing", "directory"):
        for reader, read in READERS.items():
            with pytest.raises(CheckpointError, match=name) as caught:
                read(tmp_path / f"{name}{suffix}")
            assert caught.value.suggestion, reader


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["model.bin", "model.onnx", "model.SAFETENSORS.gz", "model"])
def test_a_suffix_that_is_no_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for read in (load_model, load_source, read_header):
        with pytest.raises(CheckpointError, match=r"suffix.*expected one of \.safetensors, \.pt, \.pth"):
            read(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="suffix"):
        save_model(build("bare"), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize("path", [3, None, b"", ["a"], torch.ones(1)])
def test_what_is_no_path_is_refused(path: Any) -> None:
    for read in (load_source, read_header, load_model):
        with pytest.raises((InputTypeError, CheckpointError)):
            read(path)  # type: ignore[operator]


def test_a_file_of_another_program_has_no_header(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(CheckpointError, match="has no mono_quant header"):
            read_header(tmp_path / name)
        assert isinstance(load_model(tmp_path / name), dict)
        assert mono_quant.io.find_header(tmp_path / name) is None


@given(st.data())
def test_a_flipped_byte_or_a_cut_gives_this_librarys_error_or_a_model(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / f"a{data.draw(st.sampled_from(['.safetensors', '.pt']))}"
    content = bytearray(whole(path))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, min(len(content), 1500) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    for read in (load_model, lambda path: load_model(path, build("bare"))):
        # Any other exception fails the test.
        with contextlib.suppress(mono_quant.MonoQuantError):
            assert isinstance(read(path), dict | torch.nn.Module)


@pytest.mark.parametrize("name", ["a\0b.safetensors", "x" * 5000 + ".pt", "x" * 250 + ".safetensors"])
def test_a_name_that_no_file_can_have_is_one_clear_error(name: str, tmp_path: Path) -> None:
    path, model = f"{tmp_path}/{name}", nn.Linear(4, 4)
    calls: list[Callable[[], object]] = [
        lambda: mono_quant.save_model(model, path),
        lambda: load_model(path),
        lambda: load_model(tmp_path / "m.safetensors", path),
        lambda: mono_quant.quantize(path),
        lambda: inspect_file(path),
        lambda: load_inputs(path),
    ]
    for call in calls:
        with pytest.raises(CheckpointError) as caught:
            call()
        assert len(str(caught.value)) < 700
