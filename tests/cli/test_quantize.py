"""``monoquant quantize``: every kind of model, every option, nothing overwritten, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import mono_quant
from mono_quant.io import read_header
from tests.cli.conftest import Run, document
from tests.report.models import network


@pytest.mark.parametrize("model", ["m.safetensors", "m.pt", "nets:build", "nets:with_inputs", "nets:module"])
def test_every_kind_of_model_becomes_a_checkpoint_that_loads(run: Run, model: str) -> None:
    result = run("quantize", model, "--output", "out.safetensors")
    loaded = mono_quant.load_model("out.safetensors", network())
    assert isinstance(loaded, torch.nn.Module)
    expected = mono_quant.quantize(network()).model.state_dict()
    found = loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "3 layers: int8 dynamic, symmetric, channels" in result.stdout
    assert "out.safetensors" in result.stdout
    assert "Quantizing: 3/3" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "m.pt", "--bits", "8", "--dynamic", "--scheme", "symmetric", "--output", "out.safetensors"),
        ("-m", "m.pt", "-b", "8", "-s", "symmetric", "-o", "out.safetensors"),
    ],
)
def test_the_spellings_of_version_1_1_work(run: Run, arguments: tuple[str, ...]) -> None:
    run("quantize", *arguments)
    assert list(read_header("out.safetensors").layers) == ["0", "3.0", "4"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--bits", "4", "--group-size", "32"), {"kind": "weight_only", "bits": 4, "group_size": 32}),
        (("--bits", "16"), {"kind": "float16", "bits": 16}),
        (("--scheme", "asymmetric"), {"kind": "int8_dynamic", "symmetric": False}),
        (("--group-size", "16"), {"kind": "weight_only", "bits": 8, "group_size": 16}),
    ],
)
def test_options_of_the_number_format_arrive(run: Run, arguments: tuple[str, ...], expected: dict[str, Any]) -> None:
    found = document(run("quantize", "nets:build", "-o", "out.safetensors", "--json", *arguments))
    for layer in found["quantized"]:
        assert layer["scheme"] | expected == layer["scheme"]


@pytest.mark.parametrize(
    ("arguments", "quantized"),
    [
        (("--skip", "4"), ["0", "3.0"]),
        (("--skip", "4", "--skip", "3.*"), ["0"]),
        (("--include", "0", "--include", "4"), ["0", "4"]),
        (("--min-parameters", "2048"), ["0", "3.0"]),
    ],
)
def test_options_that_choose_layers_arrive(run: Run, arguments: tuple[str, ...], quantized: list[str]) -> None:
    found = document(run("quantize", "nets:build", "-o", "out.safetensors", "--json", *arguments))
    assert [layer["layer"] for layer in found["quantized"]] == quantized
    reasons = {entry["layer"]: entry["reason"] for entry in found["skipped"]}
    assert set(reasons) == {"0", "2", "3.0", "4"} - set(quantized)
    assert all(reasons.values())


def test_compute_dtype_arrives(run: Run) -> None:
    run("quantize", "nets:build", "-o", "out.safetensors", "--compute-dtype", "bfloat16")
    state = mono_quant.load_model("out.safetensors")
    assert isinstance(state, dict)
    assert state["2.weight"].dtype == torch.bfloat16


def test_an_architecture_makes_layers_of_a_file_of_tensors(run: Run) -> None:
    run("quantize", "m.safetensors", "--architecture", "nets:build", "-o", "out.safetensors")
    header = read_header("out.safetensors")
    assert {record.float_type for record in header.layers.values()} == {"Linear"}
    assert list(header.skipped) == ["2"]


def test_the_default_output_lies_beside_the_model(run: Run, here: Path) -> None:
    (here / "deep").mkdir()
    (here / "m.pt").rename(here / "deep" / "net.v2.pt")
    run("quantize", "deep/net.v2.pt")
    assert (here / "deep" / "net.v2_quantized.safetensors").is_file()
    run("quantize", "nets:build")
    assert (here / "build_quantized.safetensors").is_file()


def test_an_existing_file_is_replaced_only_by_force(run: Run, here: Path) -> None:
    (here / "out.safetensors").write_text("precious")
    result = run("quantize", "m.safetensors", "-o", "out.safetensors", code=3)
    assert "exists already" in result.stderr
    assert "--force" in result.stderr
    # Before any work is done.
    assert "Loading" not in result.stderr
    assert (here / "out.safetensors").read_text() == "precious"
    run("quantize", "m.safetensors", "-o", "out.safetensors", "--force")
    assert read_header("out.safetensors").layers


def test_json_is_one_document_that_adds_up(run: Run, here: Path) -> None:
    result = run("quantize", "nets:build", "-o", "out.safetensors", "--json")
    found = document(result)
    assert found["output_bytes"] == (here / "out.safetensors").stat().st_size
    assert found["ratio"] == found["bytes_after"] / found["bytes_before"] < 0.4
    assert 30 < found["sqnr_db"] < 60
    assert found["bytes_after"] < found["output_bytes"]
    assert [entry["layer"] for entry in found["skipped"]] == ["2"]


def test_a_pickled_module_is_quantized_only_if_unpickling_is_allowed(run: Run) -> None:
    result = run("quantize", "pickled.pt", "-o", "out.safetensors", code=3)
    assert "--allow-pickle" in result.stderr
    run("quantize", "pickled.pt", "-o", "out.safetensors", "--allow-pickle")


def test_a_module_in_training_mode_is_put_into_evaluation_mode(run: Run) -> None:
    assert "mode" not in run("quantize", "nets:training", "-o", "out.safetensors").stderr


def failed(result: Result, here: Path) -> str:
    """Answer the message of a failed run after checking that it left nothing."""
    assert not [path for path in here.iterdir() if "out" in path.name or path.suffix == ".tmp"]
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert any(line.startswith("Error: ") for line in lines), result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.safetensors",), "no file or directory 'none.safetensors'"),
        (("empty.safetensors",), "empty.safetensors is empty"),
        (("junk.safetensors",), "junk.safetensors"),
        (("nets.py",), "nets.py"),
        (("nan.safetensors",), "layer '3.0'"),
        (("m.pt", "--skip", "nothing.*"), "--skip names 'nothing.*'|skip names 'nothing.*'"),
        (("m.pt", "--group-size", "7"), "--group-size 7 does not divide its 32 inputs"),
        (("m.pt", "--static"), "--static asks for static quantization"),
        (("m.pt", "--min-parameters", "100000000"), "nothing to quantize"),
        (("m.pt", "--compute-dtype", "bfloat16"), "state dict computes nothing"),
        (("nets:broken",), "the factory 'nets:broken' raised KeyError: 'no such weight'"),
        (("nets:leaving",), "the factory 'nets:leaving' raised SystemExit: 5"),
        (("nets:number",), "the factory 'nets:number' answered something of type int"),
        (("nets:none",), "cannot find the factory 'nets:none'"),
        (("nowhere.at.all:build",), "cannot import 'nowhere.at.all'"),
        (("unimportable:build",), "'unimportable:build': No module named 'a_package_that_is_not_installed'"),
        (("wrong:build",), "importing the factory 'wrong:build' raised SyntaxError"),
        ((":build",), "package.module:factory"),
        (("m.pt", "--architecture", "m.pt"), "m.pt is a file"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_3(
    run: Run, here: Path, arguments: tuple[str, ...], message: str
) -> None:
    error = failed(run("quantize", *arguments, "-o", "out.safetensors", code=3), here)
    assert any(part in error for part in message.split("|")), error


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/out.safetensors", "no directory nowhere"),
        ("out.bin", "suffix '.bin'"),
        ("m.safetensors", "is the model itself"),
        ("out", "only transformers models are saved as directories"),
    ],
)
def test_an_impossible_output_is_refused(run: Run, here: Path, output: str, message: str) -> None:
    assert message in failed(run("quantize", "m.safetensors", "-o", output, "--force", code=3), here)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("m.pt", "--model", "m.pt"),
        ("m.pt", "--bits", "3"),
        ("m.pt", "--scheme", "other"),
        ("m.pt", "--unknown"),
        ("m.pt", "--group-size", "many"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, here: Path, arguments: tuple[str, ...]) -> None:
    failed(run("quantize", *arguments, code=2), here)


def test_a_quantized_checkpoint_is_not_quantized_again(run: Run) -> None:
    run("quantize", "m.safetensors", "-o", "q.safetensors")
    result = run("quantize", "q.safetensors", "-o", "qq.safetensors", code=3)
    assert "q.safetensors is quantized already (3 layers)" in result.stderr


def test_strict_turns_a_low_ratio_into_a_failure(run: Run, here: Path) -> None:
    torch.manual_seed(0)
    heavy = network().state_dict()
    for name in ("0.weight", "3.0.weight", "4.weight"):
        heavy[name] = torch.randn_like(heavy[name]).pow(3)
    torch.save(heavy, "heavy.pt")
    arguments = ("quantize", "heavy.pt", "--bits", "4", "-o", "out.safetensors")
    error = failed(run(*arguments, "--strict", code=4), here)
    assert "below 20 dB" in error
    assert "Warning: " in run(*arguments).stderr


def test_an_error_is_a_document_too_if_json_was_asked_for(run: Run) -> None:
    result = run("quantize", "nets:broken", "--json", code=3)
    error = document(result)["error"]
    assert error["type"] == "InputError"
    assert "nets:broken" in error["message"]
    assert "Error: " in result.stderr
