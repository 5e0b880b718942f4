"""Inputs: read as they were saved, made the same each time, refused with the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mono_quant.errors import InputError
from mono_quant.report import example_inputs, load_inputs


def test_named_and_positional_inputs_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.arange(3)}, tmp_path / "x.safetensors")
    named = load_inputs(tmp_path / "x.safetensors")
    assert isinstance(named, dict)
    assert {name: tensor.tolist() for name, tensor in named.items()} == {"a": [1.0, 1.0], "b": [0, 1, 2]}
    np.save(tmp_path / "x.npy", np.ones((2, 3), dtype=np.float32))
    one = load_inputs(str(tmp_path / "x.npy"))
    assert isinstance(one, Tensor)
    assert one.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.safetensors", b"nonsense"), ("x.npy", b""), ("x.npy", b"nonsense"), ("x.txt", b"1 2 3")],
)
def test_a_file_that_is_no_inputs_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_inputs(tmp_path / name)


def test_a_file_of_python_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="plain numbers"):
        load_inputs(tmp_path / "x.npy")


def test_an_empty_file_of_tensors_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no tensors"):
        load_inputs(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="none"):
        load_inputs(tmp_path / "none.npy")


class Pretrained(nn.Module):
    def __init__(self, main_input_name: str, **config: int) -> None:
        super().__init__()
        self.main_input_name, self.config = main_input_name, SimpleNamespace(**config)


def test_made_tokens_have_the_asked_shape_lie_in_the_vocabulary_and_repeat() -> None:
    model = Pretrained("input_ids", vocab_size=50, max_position_embeddings=16)
    first, second = example_inputs(model, 3, 16), example_inputs(model, 3, 16)
    assert first["input_ids"].shape == first["attention_mask"].shape == (3, 16)
    assert 0 <= int(first["input_ids"].min()) <= int(first["input_ids"].max()) < 50
    assert bool((first["attention_mask"] == 1).all())
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["input_ids"], example_inputs(model, 3, 16, seed=1)["input_ids"])


def test_made_pixels_have_the_size_of_the_configuration() -> None:
    model = Pretrained("pixel_values", image_size=8, num_channels=1)
    assert example_inputs(model, 2)["pixel_values"].shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear"),
        (Pretrained("input_values"), "cannot make inputs"),
        (Pretrained("input_ids", vocab_size=5, max_position_embeddings=4), "4 positions, found a length of 5"),
    ],
)
def test_inputs_are_not_made_where_they_cannot_be_known(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        example_inputs(model, 1, 5)
