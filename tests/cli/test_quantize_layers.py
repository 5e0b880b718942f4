"""``monoquant quantize`` with an algorithm, and with bits for single layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from mono_quant.io import read_header
from tests.cli.conftest import Run, document


def kinds() -> dict[str, int]:
    return {name: record.scheme.bits for name, record in read_header("out.safetensors").layers.items()}


def test_bits_of_single_layers_arrive(run: Run) -> None:
    run("quantize", "nets:build", "-o", "out.safetensors", "--bits", "0=4", "--bits", "3.*=16", "--bits", "*=8")
    assert kinds() == {"0": 4, "3.0": 16, "4": 8}


def test_a_single_rule_leaves_the_others_at_eight_bits(run: Run) -> None:
    run("quantize", "m.safetensors", "-o", "out.safetensors", "-b", "4=32")
    assert kinds() == {"0": 8, "3.0": 8}


def test_an_algorithm_without_data_arrives(run: Run) -> None:
    plain = document(run("quantize", "m.safetensors", "-o", "plain.safetensors", "--bits", "4", "--json"))
    found = document(
        run("quantize", "m.safetensors", "-o", "out.safetensors", "--bits", "4", "--algorithm", "hqq", "--json")
    )
    assert found["sqnr_db"] > plain["sqnr_db"]


def test_an_algorithm_reads_what_calibrate_names(run: Run) -> None:
    result = run(
        "quantize", "nets:build", "-o", "out.safetensors", "--bits", "4", "--algorithm", "gptq", "--calibrate",
        "nets:inputs",
    )  # fmt: skip
    assert kinds() == {"0": 4, "3.0": 4, "4": 4}
    assert "Quantizing: 3/3" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algorithm", "gptqq"), "is not one of smoothquant, awq, hqq, gptq, bias_correction"),
        (("--algorithm", "gptq"), "needs"),
        (("--bits", "nowhere=4"), "matches nothing"),
        (("--bits", "3.*=4", "--bits", "*.0=16"), "contradict each other"),
    ],
)
def test_mistakes_are_one_message(run: Run, here: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("quantize", "nets:build", "-o", "out.safetensors", *arguments, code=3)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (here / "out.safetensors").exists()


@pytest.mark.parametrize("values", [("4", "0=8"), ("0=4", "0=8"), ("0=5",), ("0",), ("=",)])
def test_bits_that_make_no_sense_are_wrong_usage(run: Run, values: tuple[str, ...]) -> None:
    options = [word for value in values for word in ("--bits", value)]
    run("quantize", "nets:build", "-o", "out.safetensors", *options, code=2)
