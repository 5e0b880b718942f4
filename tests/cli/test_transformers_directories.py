"""Directories of transformers as models, as architectures and as output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, document

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("models") / "bert"
    transformers.BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def bert(saved: Path, here: Path) -> str:
    (here / "bert").symlink_to(saved)
    return "bert"


@pytest.mark.parametrize("output", ["q.safetensors", "q"])
def test_a_directory_is_quantized_validated_and_compared_on_made_tokens(run: Run, bert: str, output: str) -> None:
    layers = len(document(run("quantize", bert, "-o", output, "--json"))["quantized"])
    assert layers > 8
    found = document(run("validate", bert, output, "--length", "8", "--json"))
    assert found["passed"]
    assert found["output_sqnr_db"] is not None
    compared = document(run("compare", bert, output, "--batch", "2", "--length", "8", "--repeats", "1", "--json"))
    shapes = {entry["name"]: entry["shape"] for entry in compared["outputs"]}
    assert shapes == {"last_hidden_state": [2, 8, 32], "pooler_output": [2, 32]}
    assert len(compared["layers"]) == layers
    assert len(document(run("info", output, "--json"))["layers"]) == layers
    assert "passed" in run("validate", output).stdout


def test_it_says_which_layers_run_in_one_call(run: Run, bert: str) -> None:
    found = document(run("quantize", bert, "-o", "q", "--json"))
    assert (found["fused_layers"], found["unfused_layers"]) == (["encoder.layer.0"], [])
    assert "1 of 1 layers of the transformer" in run("quantize", bert, "-o", "q", "--force").stdout
    options = ("--skip", "encoder.layer.0.output.dense", "--force")
    found = document(run("quantize", bert, "-o", "q", *options, "--json"))
    reason = "output.dense is not an int8 linear layer"
    assert (found["fused_layers"], found["unfused_layers"]) == ([], [{"layer": "encoder.layer.0", "reason": reason}])
    text = run("quantize", bert, "-o", "q", *options).stdout
    assert "0 of 1 layers of the transformer" in text
    assert f"(encoder.layer.0: {reason})" in text


def test_a_new_directory_takes_the_place_of_an_old_one_only_by_force(run: Run, bert: str, here: Path) -> None:
    run("quantize", bert, "-o", "q")
    assert (here / "q" / "config.json").is_file()
    assert "exists already" in run("quantize", bert, "-o", "q", code=3).stderr
    run("quantize", bert, "-o", "q", "--force")


def test_a_directory_is_not_overwritten_by_its_own_quantized_model(run: Run, bert: str) -> None:
    assert "is the model itself" in run("quantize", bert, "-o", "bert", "--force", code=3).stderr


def test_a_quantized_directory_is_not_quantized_again(run: Run, bert: str) -> None:
    run("quantize", bert, "-o", "q")
    assert "q is quantized already" in run("quantize", "q", "-o", "qq", code=3).stderr


def test_a_directory_is_an_architecture_for_files(run: Run, bert: str, saved: Path) -> None:
    run("quantize", bert, "-o", "q.safetensors")
    weights = str(saved / "model.safetensors")
    arguments = (weights, "q.safetensors", "--architecture", bert)
    assert document(run("validate", *arguments, "--length", "8", "--json"))["output_cosine"] > 0.9


def test_more_tokens_than_positions_are_refused(run: Run, bert: str) -> None:
    run("quantize", bert, "-o", "q.safetensors")
    result = run("compare", bert, "q.safetensors", "--length", "17", code=3)
    assert "16 positions, found a length of 17" in result.stderr


def test_a_directory_of_something_else_is_refused(run: Run, here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "config.json").write_text("{}")
    assert "other" in run("quantize", "other", "-o", "q.safetensors", code=3).stderr
