"""``monoquant sensitivity``, and ``monoquant quantize`` under a budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mono_quant.io import read_header
from tests.cli.conftest import Run, document

MEASURES = """
import torch
from tests.report.models import network

X = torch.linspace(-1, 1, 128).reshape(4, 32)
with torch.no_grad():
    EXACT = network()(X)

def closeness(model):
    with torch.no_grad():
        return -float((model(X) - EXACT).abs().mean())

def tensor(model):
    return torch.tensor(1.0)

constant = 3
"""


@pytest.fixture(autouse=True)
def measures(here: Path) -> None:
    (here / "measures.py").write_text(MEASURES)


def test_a_table_of_layers_the_worst_first(run: Run) -> None:
    result = run("sensitivity", "nets:build", "--calibrate", "in.npy", "--formats", "int8,float16")
    lines = result.stdout.splitlines()
    assert any(line.startswith("every layer in") and "SQNR" in line for line in lines)
    (header,) = [index for index, line in enumerate(lines) if line.startswith("layer alone in")]
    assert "int8" in lines[header]
    assert "int4" not in lines[header]
    names = [line.split()[0] for line in lines[header + 1 :]]
    found = document(run("sensitivity", "nets:build", "--calibrate", "in.npy", "--formats", "int8,float16", "--json"))
    assert names == [layer["name"] for layer in found["layers"]]
    ratios = [layer["formats"]["int8"]["model"]["sqnr_db"] for layer in found["layers"]]
    assert ratios == sorted(ratios)
    assert set(found["uniform"]) == {"int8", "float16"}


def test_the_report_is_saved_as_a_whole(run: Run, here: Path) -> None:
    run("sensitivity", "nets:build", "--calibrate", "nets:inputs", "--output", "report.json", "--logits", "output")
    found = json.loads((here / "report.json").read_text())
    assert found["logits"] == "output"
    assert found["sorted_by"] == "int8"


def test_mistakes_of_sensitivity(run: Run) -> None:
    assert "--calibrate" in run("sensitivity", "nets:build", code=2).stderr
    result = run("sensitivity", "m.safetensors", "--calibrate", "in.npy", code=3)
    assert "without an architecture" in result.stderr
    assert "int5" in run("sensitivity", "nets:build", "--calibrate", "in.npy", "--formats", "int5", code=3).stderr
    command = ("sensitivity", "nets:build", "--calibrate", "in.npy", "--formats", "int8", "--by", "int4")
    assert "--by int4 is not one of" in run(*command, code=3).stderr


def test_a_drop_is_kept(run: Run, here: Path) -> None:
    command = ("quantize", "nets:build", "--calibrate", "in.npy", "--eval", "measures:closeness", "--max-drop", "0.01")
    result = run(*command, "--output", "q.safetensors", "--resume", "search.json", "--seed", "3")
    assert "kept" in result.stdout
    assert "chosen" in result.stdout
    assert "s left" in result.stderr
    header = read_header(here / "q.safetensors")
    assert header is not None
    again = document(run(*command, "--output", "r.safetensors", "--resume", "search.json", "--seed", "3", "--json"))
    search = again["search"]
    assert search["met"]
    assert search["evaluations"] == 0
    best = search["points"][search["chosen"]]
    assert best["drop"] <= 0.01
    assert best["bytes"] == again["bytes_after"]


@pytest.mark.parametrize(("size", "expected"), [("6K", 6144), ("6000", 6000), ("0.006M", 6291)])
def test_sizes(run: Run, size: str, expected: int) -> None:
    command = ("quantize", "nets:build", "--calibrate", "in.npy", "--max-bytes", size, "--output", "q.safetensors")
    found = document(run(*command, "--json"))
    assert found["search"]["target"] == f"max_bytes={expected}"
    assert found["bytes_after"] <= expected


def test_a_ratio_is_kept(run: Run) -> None:
    command = ("quantize", "nets:build", "--calibrate", "in.npy", "--min-sqnr-db", "30", "--objective", "bytes")
    found = document(run(*command, "--formats", "int8,float16", "--output", "q.safetensors", "--json"))
    assert found["search"]["points"][found["search"]["chosen"]]["sqnr_db"] >= 30


def test_what_cannot_be_reached_is_said_in_options_of_the_command_line(run: Run, here: Path) -> None:
    command = ("quantize", "nets:build", "--calibrate", "in.npy", "--eval", "measures:closeness", "--max-drop", "0")
    result = run(*command, "--output", "q.safetensors", "--resume", "search.json", code=3)
    assert "no choice of formats keeps to --max-drop 0" in result.stderr
    assert "max_drop" not in result.stderr
    assert not (here / "q.safetensors").exists()
    assert (here / "search.json").exists()


def test_mistakes_of_a_search(run: Run, here: Path) -> None:
    command = ("quantize", "nets:build", "--calibrate", "in.npy", "--output", "q.safetensors")
    assert "--eval" in run(*command, "--max-drop", "0.1", code=3).stderr
    text = run(*command, "--max-drop", "0.1", "--eval", "measures:tensor", code=3).stderr
    assert "--eval answered a tensor" in text
    assert ".item()" in text
    assert "expected a function" in run(*command, "--max-drop", "1", "--eval", "measures:constant", code=3).stderr
    assert "no_such" in run(*command, "--max-drop", "0.1", "--eval", "measures:no_such", code=3).stderr
    assert "is not a size" in run(*command, "--max-bytes", "many", code=2).stderr
    assert "needs --calibrate" in run(
        "quantize", "nets:build", "--output", "q.safetensors", "--max-bytes", "6K", code=3
    ).stderr  # fmt: skip
    (here / "notes.json").write_text("{}")
    text = run(*command, "--max-bytes", "6K", "--resume", "notes.json", code=3).stderr
    assert "notes.json is not the file of a search" in text
    assert "--resume" in text
    assert (here / "notes.json").read_text() == "{}"
