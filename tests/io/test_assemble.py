"""What does not fit an architecture is named, all of it in one error; what is tolerated is said once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mono_quant import CheckpointError, InputError, InputTypeError
from mono_quant.io import load_model, read_header, save_model
from mono_quant.io.safetensors_file import SafetensorsFile
from tests.io.models import build, quantized, same_bits

Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


def checkpoint(tmp_path: Path, name: str = "tied", edit: Edit | None = None, **options: Any) -> Path:
    """Save a quantized model, and change the tensors and the header of its file."""
    path = tmp_path / "a.safetensors"
    save_model(quantized(name, **options), path)
    if edit is not None:
        file = SafetensorsFile(path)
        header = json.loads(file.metadata["mono_quant"])
        file.close()
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        edit(tensors, header)
        save_file(tensors, path, metadata={"mono_quant": json.dumps(header)})
    return path


def problems(path: Path, architecture: nn.Module, **options: Any) -> str:
    with pytest.raises(CheckpointError, match="does not fit the architecture") as caught:
        load_model(path, architecture, **options)
    assert str(path) in caught.value.message
    assert caught.value.suggestion
    return caught.value.message


def test_all_that_does_not_fit_is_named_in_one_error(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        del tensors["hidden.bias"], tensors["words.weight_scale"], header["tied"]["head.weight_scale"]
        tensors["hidden.weight"] = torch.zeros(16, 17, dtype=torch.int8)
        tensors["hidden.weight_scale"] = torch.ones(16, 1, dtype=torch.float64)
        tensors["words.weight"] = torch.ones(24, 16)
        tensors["extra"] = torch.ones(3)

    message = problems(checkpoint(tmp_path, edit=edit), build("tied"))
    assert "missing: 'hidden.bias', expected float32 [16]" in message
    assert "missing: 'words.weight_scale', expected float32 [24, 1]" in message
    assert "missing: 'head.weight_scale', expected float32 [24, 1]" in message
    assert "wrong shape: 'hidden.weight', found [16, 17], expected [16, 16]" in message
    assert "wrong dtype: 'hidden.weight_scale', found float64, expected float32" in message
    assert "wrong dtype: 'words.weight', found float32, expected int8" in message
    assert "unexpected: 'extra', float32 [3]" in message


class Other(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class MyLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv1d(16, 16, 1), "the architecture has a Conv1d"),
        (nn.Embedding(16, 16), "the architecture has a Embedding"),
        (MyLinear(16, 16), "the architecture has a MyLinear"),
        (nn.LazyLinear(16), "the architecture has a LazyLinear"),
        (None, "the architecture has no such module"),
    ],
)
def test_a_layer_of_another_type_is_named_with_both_types(tmp_path: Path, layer: nn.Module | None, found: str) -> None:
    tied = build("tied")
    layers = {"words": tied.words, "head": tied.head, **({} if layer is None else {"hidden": layer})}
    message = problems(checkpoint(tmp_path), Other(**layers))  # type: ignore[arg-type]
    assert "layer 'hidden': the file holds a quantized Linear (int8 dynamic, symmetric, channels)" in message
    assert found in message
    assert "unexpected" not in message


def test_a_layer_whose_own_forward_was_replaced_cannot_become_a_quantized_one(tmp_path: Path) -> None:
    for given in (build("tied"), quantized("tied")):
        given.hidden.forward = lambda x: x
        assert "layer 'hidden': the file holds a quantized Linear" in (message := problems(checkpoint(tmp_path), given))
        assert "its forward was replaced" in message


def test_a_quantized_convolution_does_not_load_into_a_linear_layer(tmp_path: Path) -> None:
    save_model(quantized("convolutions"), tmp_path / "a.safetensors")
    architecture = build("convolutions")
    architecture[0] = nn.Linear(27, 8)  # type: ignore[operator]
    assert "layer '0': the file holds a quantized Conv2d" in problems(tmp_path / "a.safetensors", architecture)


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_shapes_and_dtypes_are_never_tolerated(tmp_path: Path, strict: bool) -> None:
    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors["hidden.bias"] = torch.zeros(5)
        tensors["words.weight_scale"] = torch.ones(24, 1, dtype=torch.float16)

    message = problems(checkpoint(tmp_path, edit=edit), build("tied"), strict=strict)
    assert "wrong shape: 'hidden.bias', found [5], expected [16]" in message
    assert "wrong dtype: 'words.weight_scale', found float16, expected float32" in message


def test_what_is_tolerated_is_said_once(tmp_path: Path) -> None:
    architecture = build("deep")
    state = architecture.state_dict()
    kept = state.pop("shift") + 1
    architecture.shift.copy_(kept)  # type: ignore[operator, union-attr]
    save_model({**state, "extra": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="tolerated missing: 'shift', unexpected: 'extra'") as caught:
        loaded = load_model(tmp_path / "a.safetensors", architecture, strict=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert isinstance(loaded, nn.Module)
    assert same_bits(loaded.get_buffer("shift"), kept)
    assert loaded.get_buffer("shift") is not architecture.get_buffer("shift")


def test_a_quantized_layer_cannot_do_without_its_tensors(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        del tensors["hidden.weight"]

    assert "missing: 'hidden.weight'" in problems(checkpoint(tmp_path, edit=edit), build("tied"), strict=False)


def test_another_precision_is_the_architectures_or_the_quantized_layers(tmp_path: Path) -> None:
    save_model(build("deep").double(), tmp_path / "a.safetensors")
    message = problems(tmp_path / "a.safetensors", build("deep"))
    assert "wrong dtype: 'first.norm.weight', found float64, expected float32" in message
    load_model(tmp_path / "a.safetensors", build("deep").double())
    path = checkpoint(tmp_path, "deep", compute_dtype=torch.bfloat16)
    loaded = load_model(path, build("deep"))
    assert isinstance(loaded, nn.Module)
    assert loaded.get_parameter("first.norm.weight").dtype == torch.bfloat16


def test_an_architecture_that_ties_what_the_file_does_not_is_refused_if_the_values_differ(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in build("tied").state_dict().items()}
    save_model(state, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", build("tied"))
    assert isinstance(loaded, nn.Module)
    assert loaded.get_parameter("head.weight") is loaded.get_parameter("words.weight")
    state["head.weight"] += 1
    save_model(state, tmp_path / "a.safetensors")
    assert "different values: 'head.weight' and 'words.weight'" in problems(tmp_path / "a.safetensors", build("tied"))


def test_one_name_of_a_tied_weight_is_enough(tmp_path: Path) -> None:
    state = build("tied").state_dict()
    del state["head.weight"]
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", build("tied"))
    assert isinstance(loaded, nn.Module)
    assert same_bits(loaded.get_parameter("head.weight"), state["words.weight"])


def test_an_architecture_that_shares_a_layer_which_is_quantized_only_once_is_refused(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        del header["layers"]["again.up"]

    assert "layer 'again.up': in float in the file" in problems(checkpoint(tmp_path, "deep", edit), build("deep"))


def test_what_no_file_holds_must_have_values_in_the_architecture(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "deep")
    with torch.device("meta"):
        architecture = build("deep")
    with pytest.raises(CheckpointError, match="does not hold 'scratch', and the architecture is on the meta device"):
        load_model(path, architecture)


def test_a_stored_shape_that_is_not_the_layers_is_refused(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors["weight_shape"] = torch.tensor([16, 8])

    path = checkpoint(tmp_path, "bare", edit, bits=4, group_size=8)
    assert "wrong shape: 'weight_shape' says [16, 8], expected [8, 16]" in problems(path, build("bare"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tied": {"head.weight": "nowhere"}}, "ties 'head.weight' to 'nowhere', which the file does not hold"),
        ({"tied": {"hidden.bias": "words.weight"}}, "ties 'hidden.bias' to 'words.weight', and the file holds both"),
        ({"fused": {"act": "hidden"}}, "layer 'hidden' computes the activation 'act', which the architecture does not"),
        ({"format_version": 99}, "format_version 99"),
        ({"future": True}, r"unknown fields \['future'\]"),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(
    tmp_path: Path, changes: Mapping[str, Any], message: str
) -> None:
    path = checkpoint(tmp_path, edit=lambda tensors, header: header.update(changes))
    with pytest.raises(CheckpointError, match=message):
        load_model(path, build("tied"))


def test_a_module_with_state_of_its_own_takes_it_back(tmp_path: Path) -> None:
    class Counter(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.tensor([self.count])

        def set_extra_state(self, state: Tensor) -> None:
            self.count = int(state)

        count = 0

    model = nn.Sequential(Counter(2, 2))
    model[0].count = 7
    save_model(model, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", nn.Sequential(Counter(2, 2)))
    assert isinstance(loaded, nn.Sequential)
    assert loaded[0].count == 7


def test_hidden_references_to_parameters_follow(tmp_path: Path) -> None:
    model = nn.LSTM(4, 4)
    save_model(model, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", nn.LSTM(4, 4))
    assert isinstance(loaded, nn.LSTM)
    x = torch.randn(3, 1, 4)
    assert same_bits(loaded(x)[0], model(x)[0])
    assert all(weight is parameter for weight, parameter in zip(loaded._flat_weights, loaded.parameters(), strict=True))


def test_an_architecture_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> Any:
            raise RuntimeError("one of a kind")

    save_model(nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"Stubborn\) cannot be copied: one of a kind"):
        load_model(tmp_path / "a.safetensors", Stubborn(2, 2))


@pytest.mark.parametrize("architecture", [3, {"a": 1}, nn.Linear])
def test_what_is_no_architecture_is_refused(tmp_path: Path, architecture: Any) -> None:
    with pytest.raises(InputTypeError, match="expected a module or a transformers directory"):
        load_model(checkpoint(tmp_path), architecture)


def test_the_gradient_flags_are_the_architectures(tmp_path: Path) -> None:
    save_model(build("bare"), tmp_path / "a.safetensors")
    architecture = copy.deepcopy(build("bare")).requires_grad_(False)
    loaded = load_model(tmp_path / "a.safetensors", architecture)
    assert isinstance(loaded, nn.Linear)
    assert not loaded.weight.requires_grad
    assert read_header(tmp_path / "a.safetensors").layers == {}
