"""A directory with models, files and factories, and a way to run the command line in it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from mono_quant.cli import cli
from tests.report.models import network

FACTORIES = """
import torch
from tests.report.models import network

def build():
    return network()

def with_inputs():
    return network(), torch.linspace(-1, 1, 64).reshape(2, 32)

def inputs():
    return {"input": torch.linspace(-1, 1, 96).reshape(3, 32)}

def training():
    return network().train()

def broken():
    raise KeyError("no such weight")

def leaving():
    raise SystemExit(5)

def number():
    return 3

module = network()
"""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answer a directory of files that tests copy."""
    directory = tmp_path_factory.mktemp("cli")
    model = network()
    state = model.state_dict()
    save_file(state, directory / "m.safetensors")
    torch.save(state, directory / "m.pt")
    torch.save(model, directory / "pickled.pt")
    bad = {**state, "3.0.weight": torch.full_like(state["3.0.weight"], torch.nan)}
    save_file(bad, directory / "nan.safetensors")
    (directory / "empty.safetensors").touch()
    (directory / "junk.safetensors").write_bytes(b"junk" * 50)
    np.save(directory / "in.npy", np.linspace(-1, 1, 128, dtype=np.float32).reshape(4, 32))
    save_file({"input": torch.linspace(-1, 1, 128).reshape(4, 32)}, directory / "in.safetensors")
    (directory / "nets.py").write_text(FACTORIES)
    (directory / "unimportable.py").write_text("import a_package_that_is_not_installed\n")
    (directory / "wrong.py").write_text("def build(:\n")
    return directory


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Go to a fresh copy of the files."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in ("nets", "unimportable", "wrong"):
        sys.modules.pop(name, None)


Run = Callable[..., Result]


@pytest.fixture
def run(here: Path) -> Run:
    """Answer a function that runs the command line and checks the exit code."""
    del here

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, arguments, prog_name="monoquant")
        assert result.exit_code == code, f"{result.exit_code}\n{result.output}"
        assert "Traceback" not in result.output
        return result

    return invoke


def document(result: Result) -> dict[str, Any]:
    """Answer the one JSON document on standard output."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found: dict[str, Any] = json.loads(result.stdout, parse_constant=refuse)
    return found
