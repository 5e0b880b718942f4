"""``monoquant info``: what a file holds, for people and for machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from mono_quant.cli.output import size_text
from tests.cli.conftest import Run, document


def test_a_checkpoint_is_described(run: Run, here: Path) -> None:
    run("quantize", "nets:build", "-o", "q.safetensors", "--skip", "4")
    text = run("info", "q.safetensors").stdout
    assert "2 layers: int8 dynamic, symmetric, channels" in text
    assert "1 layer: skip names '4'" in text
    assert "mono_quant" in text
    assert size_text((here / "q.safetensors").stat().st_size) in text
    assert any(line.split()[:2] == ["int8", "2"] for line in text.splitlines())


def test_every_layer_is_listed_on_demand(run: Run) -> None:
    run("quantize", "nets:build", "-o", "q.safetensors", "--skip", "4")
    rows = [line.split()[:2] for line in run("info", "q.safetensors", "--layers").stdout.splitlines()]
    for row in (["0", "quantized"], ["3.0", "quantized"], ["4", "skipped"], ["2", "skipped"]):
        assert row in rows


@pytest.mark.parametrize("spelling", [("--json",), ("--format", "json"), ("-f", "json")])
def test_json_is_one_document(run: Run, here: Path, spelling: tuple[str, ...]) -> None:
    run("quantize", "nets:build", "-o", "q.safetensors")
    found = document(run("info", "q.safetensors", *spelling))
    assert found["file_bytes"] == (here / "q.safetensors").stat().st_size
    assert list(found["layers"]) == ["0", "3.0", "4"]
    assert list(found["skipped"]) == ["2"]
    assert found["dtypes"]["int8"]["tensors"] == 3
    assert found["format_version"] == 1


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_plain_tensors_are_described(run: Run, name: str) -> None:
    assert "another program" in run("info", name).stdout
    found = document(run("info", name, "--json"))
    assert found["layers"] == {}
    assert found["dtypes"]["float32"]["bytes"] == found["tensor_bytes"] - 8


@pytest.mark.parametrize("name", ["none.safetensors", "junk.safetensors", "empty.safetensors", "nets.py", "."])
def test_what_cannot_be_read_is_exit_code_3(run: Run, name: str) -> None:
    result = run("info", name, code=3)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")


def test_names_with_brackets_are_printed_as_they_are(run: Run, here: Path) -> None:
    (here / "[bold]m.safetensors").write_bytes((here / "m.safetensors").read_bytes())
    assert "[bold]m.safetensors" in run("info", "[bold]m.safetensors").stdout


def test_piped_lines_are_neither_styled_nor_wrapped_nor_padded(run: Run, here: Path) -> None:
    name = "m" * 150 + ".safetensors"
    (here / name).write_bytes((here / "m.safetensors").read_bytes())
    text = run("info", name).stdout
    assert name in text.splitlines()
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_the_system_is_described_in_place_of_a_file(run: Run) -> None:
    text = run("info", "--system").stdout
    assert "kernels" in text
    assert "threads" in text
    assert document(run("info", "--system", "--json"))["backend"] in ("native", "torch", "reference")
    run("info", code=2)
    run("info", "q.safetensors", "--system", code=2)
