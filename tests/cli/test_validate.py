"""``monoquant validate``: exit code 0 for sound models, 4 for others, and every failure named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.cli.conftest import Run, document


@pytest.fixture(autouse=True)
def quantized(run: Run) -> None:
    run("quantize", "m.safetensors", "-o", "q.safetensors")


def damage(name: str) -> None:
    """Make one scale of the checkpoint negative and leave the rest as it is."""
    with safe_open("q.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors[name][0] = -1.0
    save_file(tensors, "damaged.safetensors", metadata)


@pytest.mark.parametrize(
    "arguments",
    [
        ("q.safetensors",),
        ("m.safetensors", "q.safetensors"),
        ("nets:build", "q.safetensors"),
        ("nets:build", "q.safetensors", "--inputs", "in.npy"),
        ("m.pt", "q.safetensors", "--architecture", "nets:build", "--inputs", "nets:inputs"),
        ("q.safetensors", "--strict"),
    ],
)
def test_a_sound_model_passes(run: Run, arguments: tuple[str, ...]) -> None:
    assert "passed" in run("validate", *arguments).stdout
    found = document(run("validate", *arguments, "--json"))
    assert found["passed"]
    assert found["errors"] == []
    assert (found["output_sqnr_db"] is not None) == ("--inputs" in arguments)


@pytest.mark.parametrize("original", [(), ("m.safetensors",), ("nets:build",)])
def test_damage_fails_and_is_named(run: Run, original: tuple[str, ...]) -> None:
    damage("3.0.weight_scale")
    result = run("validate", *original, "damaged.safetensors", code=4)
    assert "failed" in result.stdout
    assert "Error: layer '3.0' has 1 scales that are not positive" in result.stderr
    found = document(run("validate", *original, "damaged.safetensors", "--json", code=4))
    assert not found["passed"]
    assert any("'3.0'" in error for error in found["errors"])


def test_another_original_fails(run: Run) -> None:
    torch.manual_seed(1)
    save_file({name: torch.randn(shape) for name, shape in SHAPES.items()}, "other.safetensors")
    result = run("validate", "other.safetensors", "q.safetensors", code=4)
    assert "signal-to-quantization-noise ratio" in result.stderr


SHAPES = {"0.weight": (64, 32), "3.0.weight": (64, 64), "4.weight": (8, 64)}


def test_the_threshold_is_the_users(run: Run) -> None:
    run("validate", "m.safetensors", "q.safetensors", "--min-sqnr", "30")
    assert (
        "expected at least 90 dB"
        in run("validate", "m.safetensors", "q.safetensors", "--min-sqnr", "90", code=4).stderr
    )


@pytest.mark.parametrize("name", ["m.safetensors", "junk.safetensors", "empty.safetensors"])
def test_a_file_that_is_no_checkpoint_fails(run: Run, name: str) -> None:
    assert name in run("validate", name, code=4).stderr


def test_a_truncated_checkpoint_fails(run: Run, here: Path) -> None:
    (here / "short.safetensors").write_bytes((here / "q.safetensors").read_bytes()[:-10])
    assert "short.safetensors" in run("validate", "short.safetensors", code=4).stderr


def test_a_missing_file_is_a_users_mistake(run: Run) -> None:
    assert "none.safetensors" in run("validate", "none.safetensors", code=3).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a", "b", "c"),
        ("nets:build",),
        ("q.safetensors", "--inputs", "in.npy"),
        ("q.safetensors", "--architecture", "nets:build"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    run("validate", *arguments, code=2)
