"""``monoquant compare``: sizes, weights, outputs and latencies of every pair of arguments."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Run, document


@pytest.fixture(autouse=True)
def quantized(run: Run) -> None:
    run("quantize", "m.safetensors", "-o", "q.safetensors")


FAST = ("--repeats", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nets:with_inputs", "q.safetensors"),
        ("nets:build", "q.safetensors", "--inputs", "in.npy"),
        ("nets:build", "q.safetensors", "--inputs", "in.safetensors"),
        ("nets:build", "q.safetensors", "--inputs", "nets:inputs"),
        ("m.safetensors", "q.safetensors", "--architecture", "nets:build", "--inputs", "in.npy"),
        ("m.pt", "nets:build", "--architecture", "nets:build", "--inputs", "in.npy"),
    ],
)
def test_models_with_inputs_are_compared_in_every_respect(run: Run, arguments: tuple[str, ...]) -> None:
    found = document(run("compare", *arguments, *FAST, "--json"))
    assert found["size_ratio"] == found["quantized_bytes"] / found["original_bytes"]
    (output,) = found["outputs"]
    assert output["finite"]
    assert output["cosine"] > 0.99
    assert found["latency"]["repeats"] == 1
    assert found["warnings"] == []
    layers = [layer["layer"] for layer in found["layers"]]
    assert layers == ([] if arguments[1] == "nets:build" else ["0", "3.0", "4"])


def test_two_files_of_tensors_are_compared_by_size_and_weights(run: Run) -> None:
    result = run("compare", "m.safetensors", "q.safetensors", "--json")
    found = document(result)
    assert found["outputs"] == []
    assert found["latency"] is None
    assert 30 < found["weight_sqnr_db"] < 60
    assert [layer["layer"] for layer in found["layers"]] == ["0", "3.0", "4"]
    assert "--inputs and --architecture" in result.stderr


@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_every_number_format_is_compared_from_files_alone(run: Run, bits: str) -> None:
    run("quantize", "m.pt", "-o", "other.pt", "--bits", bits)
    found = document(run("compare", "m.pt", "other.pt", "--json"))
    assert len(found["layers"]) == 3
    assert found["weight_sqnr_db"] > 15


@pytest.mark.parametrize(
    ("metrics", "present"),
    [
        (("size",), {"original_bytes", "quantized_bytes", "size_ratio"}),
        (("sqnr",), {"weight_sqnr_db", "layers"}),
        (("output",), {"outputs"}),
        (("latency", "output"), {"latency", "outputs"}),
    ],
)
def test_metrics_can_be_chosen_as_in_version_1_1(run: Run, metrics: tuple[str, ...], present: set[str]) -> None:
    chosen = [part for metric in metrics for part in ("--metrics", metric)]
    found = document(run("compare", "nets:with_inputs", "q.safetensors", *FAST, *chosen, "--json"))
    assert set(found) == present | {"original", "quantized", "warnings"}


def test_people_get_sizes_errors_and_latencies(run: Run) -> None:
    result = run("compare", "nets:with_inputs", "q.safetensors", *FAST)
    for part in ("size", "SQNR of weights", "latency", "ratio", "output", "cosine", "int8 dynamic"):
        assert part in result.stdout
    assert "Loading" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.pt", "q.safetensors"), "none.pt"),
        (("m.safetensors", "q.safetensors", "--inputs", "in.npy"), "Give --architecture"),
        (("nets:build", "q.safetensors", "--inputs", "none.npy"), "none.npy"),
        (("nets:build", "q.safetensors", "--inputs", "nets.py"), "expected .safetensors or .npy"),
        (("nets:build", "q.safetensors", "--inputs", "nets:broken"), "the loader 'nets:broken' raised KeyError"),
        (("nets:build", "q.safetensors", "--inputs", "nets:number"), "the inputs have the type int"),
        (("nets:build", "junk.safetensors"), "junk.safetensors"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_3(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run("compare", *arguments, code=3)
    assert message in result.stderr
    assert result.stdout == ""


def test_a_checkpoint_that_does_not_fit_the_architecture_says_what_does_not(run: Run) -> None:
    with open("nets.py", "a") as file:
        file.write("\ndef other():\n    return torch.nn.Sequential(torch.nn.Linear(32, 5), torch.nn.ReLU())\n")
    result = run("compare", "nets:other", "q.safetensors", code=3)
    assert "'3.0'" in result.stderr
    assert "0.weight" in result.stderr


def test_inputs_that_do_not_fit_the_model_are_a_users_mistake(run: Run) -> None:
    with open("nets.py", "a") as file:
        file.write("\ndef short():\n    return torch.ones(2, 3)\n")
    result = run("compare", "nets:build", "q.safetensors", "--inputs", "nets:short", code=3)
    assert "cannot run on these inputs" in result.stderr


@pytest.mark.parametrize("arguments", [("m.pt",), ("m.pt", "q.safetensors", "--repeats", "0"), ("a", "b", "c")])
def test_wrong_usage_is_exit_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    run("compare", *arguments, code=2)
