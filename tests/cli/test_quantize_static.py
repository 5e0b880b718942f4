"""``monoquant quantize --calibrate`` and what the other commands say of static checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mono_quant import load_model
from mono_quant.cli.main import _in_options
from mono_quant.graph import StaticGraph
from mono_quant.io import read_header
from tests.cli.conftest import Run, document

FACTORIES = """
import torch
from tests.static_models import network

def build():
    return network("cut")[0]

def with_inputs():
    return build(), torch.randn(2, 3, 16, 16)

def decides():
    return network("layers")[0]

def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 16, 16, generator=generator), torch.zeros(8)) for _ in range(3)]

def endless():
    while True:
        yield torch.randn(8, 3, 12, 12)

def number():
    return 3

def broken():
    raise OSError("no disk")

def empty():
    return []

def nan():
    return [torch.randn(4, 3, 16, 16), torch.full((4, 3, 16, 16), torch.nan)]

def wrong():
    return torch.randn(4, 5, 16, 16)

def interrupted():
    yield torch.randn(8, 3, 16, 16)
    raise KeyboardInterrupt
"""


@pytest.fixture(autouse=True)
def factories(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "static_nets.py").write_text(FACTORIES)
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    np.save(here / "images.npy", images.numpy())
    save_file({"x": images}, here / "images.safetensors")
    monkeypatch.delitem(__import__("sys").modules, "static_nets", raising=False)


def quantize(run: Run, *arguments: str, model: str = "static_nets:build", code: int = 0) -> Any:
    return run("quantize", model, "--output", "q.safetensors", *arguments, code=code)


@pytest.mark.parametrize("data", ["images.npy", "images.safetensors", "static_nets:batches"])
def test_files_and_loaders_calibrate(run: Run, data: str) -> None:
    result = quantize(run, "--calibrate", data)
    assert "24/24" in result.stderr
    assert "one graph" in result.stdout
    assert "24 samples" in result.stdout
    assert "it has no 8-bit form" in result.stdout
    loaded = load_model("q.safetensors")
    assert isinstance(loaded, StaticGraph)
    assert loaded(torch.randn(1, 3, 16, 16)).shape == (1, 5)


def test_json_says_what_was_done(run: Run) -> None:
    found = document(quantize(run, "--calibrate", "images.npy", "--calibration-samples", "10", "--json"))
    assert found["calibration_samples"] == 10
    assert found["not_captured"] is None
    assert found["output_sqnr_db"] > 20
    assert {cut["name"] for cut in found["cuts"]} >= {"norm"}
    assert found["quantized"][0]["scheme"]["kind"] == "int8_static"


def test_options_arrive(run: Run) -> None:
    contents = set()
    for options in ((), ("--observer", "minmax"), ("--equalize",), ("--no-correct-bias",), ("--skip", "2")):
        quantize(run, "--calibrate", "images.npy", "--force", *options, model="tests.graph.networks:small")
        contents.add(Path("q.safetensors").read_bytes())
    assert len(contents) == 5
    assert read_header("q.safetensors").skipped["2"] == "skip names '2'"


def test_a_model_that_cannot_be_captured_says_why(run: Run) -> None:
    result = quantize(run, "--calibrate", "static_nets:endless", model="static_nets:decides")
    assert "depends on the values of tensors" in result.stderr
    assert "layer by layer" in result.stdout
    assert "150 samples" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--static",), "--static asks for static quantization, which needs --calibrate"),
        (("--observer", "mse"), "--observer is an option of static quantization"),
        (("--calibration-samples", "3"), "--calibration-samples was given without --calibrate"),
        (("--calibrate", "missing.npy"), "no file 'missing.npy'"),
        (("--calibrate", "static_nets.py"), "suffix '.py'"),
        (("--calibrate", "static_nets:missing"), "static_nets:missing"),
        (("--calibrate", "static_nets:number"), "answered something of type int"),
        (("--calibrate", "static_nets:broken"), "no disk"),
        (("--calibrate", "static_nets:empty"), "the calibration data is empty"),
        (("--calibrate", "static_nets:nan"), "calibration batch 1 holds NaN"),
        (("--calibrate", "static_nets:wrong"), "calibration batch 0"),
        (("--calibrate", "images.npy", "--scheme", "asymmetric"), "(--calibrate) exclude each other"),
        (("--calibrate", "images.npy", "--compute-dtype", "bfloat16"), "--compute-dtype torch.bfloat16 and static"),
        (("--calibrate", "images.npy", "--dynamic"), "--dynamic and --calibrate contradict each other"),
        (("--calibrate", "images.npy", "--bits", "16"), "--bits 16 and --calibrate contradict"),
    ],
)
def test_a_users_mistake_is_one_message(run: Run, here: Path, arguments: tuple[str, ...], message: str) -> None:
    before = sorted(here.iterdir())
    result = quantize(run, *arguments, code=3)
    assert message in result.stderr
    assert sorted(path for path in here.iterdir() if path.name != "__pycache__") == before


def test_wrong_usage_is_exit_code_2(run: Run) -> None:
    for arguments in (("--calibration-samples", "0"), ("--observer", "best")):
        quantize(run, "--calibrate", "images.npy", *arguments, code=2)


def test_tensors_without_an_architecture_cannot_be_calibrated(run: Run) -> None:
    result = quantize(run, "--calibrate", "in.npy", model="m.safetensors", code=3)
    assert "--architecture package.module:factory" in result.stderr
    quantize(run, "--calibrate", "in.npy", "--architecture", "nets:build", model="m.safetensors")


def test_an_interrupted_calibration_leaves_no_file(run: Run, here: Path) -> None:
    (here / "q.safetensors").write_bytes(b"older")
    result = quantize(run, "--calibrate", "static_nets:interrupted", "--force", code=130)
    assert "Interrupted" in result.stderr
    assert (here / "q.safetensors").read_bytes() == b"older"
    assert not list(here.glob(".*"))


def test_info_shows_form_cuts_and_ranges(run: Run) -> None:
    quantize(run, "--calibrate", "images.npy")
    short = run("info", "q.safetensors").stdout
    assert "one graph" in short
    assert "norm (aten.layer_norm.default)" in short
    long = run("info", "q.safetensors", "--layers").stdout
    assert "range of inputs" in long
    assert "it has no 8-bit form" in long
    found = document(run("info", "q.safetensors", "--json"))
    assert found["format_version"] == 2
    assert found["static"]["kind"] == "graph"
    low, high = found["static"]["ranges"]["stem.0"]["input"]
    assert low < 0 < high
    assert found["layers"]["stem.0"]["scheme"]["kind"] == "int8_static"


def test_validate_and_compare_understand_a_graph(run: Run) -> None:
    quantize(run, "--calibrate", "images.npy")
    assert "passed" in run("validate", "q.safetensors").stdout
    assert "passed" in run("validate", "static_nets:with_inputs", "q.safetensors", "--strict").stdout
    found = document(run("compare", "static_nets:with_inputs", "q.safetensors", "--repeats", "1", "--json"))
    assert found["outputs"][0]["sqnr_db"] > 20
    assert found["weight_sqnr_db"] is None
    assert any("norms are folded" in warning for warning in found["warnings"])


def test_validate_and_compare_understand_static_layers(run: Run) -> None:
    quantize(run, "--calibrate", "static_nets:endless", model="static_nets:decides")
    assert "passed" in run("validate", "q.safetensors").stdout
    assert "passed" in run("validate", "static_nets:decides", "q.safetensors").stdout
    found = document(run("compare", "static_nets:decides", "q.safetensors", "--json"))
    assert found["weight_sqnr_db"] > 30
    assert {layer["layer"] for layer in found["layers"]} == {"conv", "head"}


def test_compare_takes_the_inputs_of_the_architectures_factory(run: Run) -> None:
    run("quantize", "nets:build", "--output", "q.safetensors")
    arguments = ("m.safetensors", "q.safetensors", "--architecture", "nets:with_inputs", "--repeats", "1", "--json")
    assert document(run("compare", *arguments))["outputs"][0]["sqnr_db"] > 20


def test_validating_a_float_file_says_what_was_not_checked(run: Run) -> None:
    result = run("validate", "m.safetensors", code=4)
    assert result.stdout.count("not checked") == 2
    assert "no layer of the model is quantized" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("leave dynamic out, or set dynamic=True.", "leave dynamic out, or set --dynamic."),
        ("use observer='mse', or equalize=False", "use --observer 'mse', or --no-equalize"),
        ("calibration_data and num_calibration_samples=3.", "--calibrate and --calibration-samples 3."),
        ("with skip=.", "with --skip."),
        ('skip=["a"] and my_bits=4', 'skip=["a"] and my_bits=4'),
    ],
)
def test_options_of_the_library_are_spelled_as_the_command_line_does(text: str, expected: str) -> None:
    assert _in_options(text) == expected
