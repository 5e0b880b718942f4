"""State dicts, and the calls of mono-quant 1.1; what is no tensor, or has no values, is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mono_quant
from mono_quant import ConfigurationError, InputError, InputTypeError
from mono_quant.io import (
    load_model,
    load_pytorch,
    load_safetensors,
    read_header,
    save_model,
    save_pytorch,
    save_safetensors,
)
from tests.io.models import build, same_bits

SUFFIXES = [".safetensors", ".pt"]


def state_result() -> mono_quant.QuantizationResult:
    return mono_quant.quantize(build("deep").state_dict(), bits=4, group_size=8, scheme="asymmetric")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_quantized_state_dict_is_saved_with_its_schemes_and_loads_into_a_module(tmp_path: Path, suffix: str) -> None:
    result, path = state_result(), tmp_path / f"a{suffix}"
    result.save(path)
    header = read_header(path)
    assert {name: record.scheme for name, record in header.layers.items()} == {
        name: layer.scheme for name, layer in result.info.layers.items()
    }
    assert header.layers["first.up"].float_type is None
    module = load_model(path, build("deep"))
    assert isinstance(module, nn.Module)
    loaded = module.state_dict()
    assert loaded.keys() == result.model.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in result.model.items())
    plain = load_model(path)
    assert isinstance(plain, dict)
    assert all(same_bits(plain[name], tensor) for name, tensor in result.model.items())


def test_a_quantized_state_dict_that_does_not_say_how_is_refused(tmp_path: Path) -> None:
    int8 = mono_quant.quantize(build("deep").state_dict())
    with pytest.raises(InputError, match=r"'outer\.0\.0\.up' and does not say how it is quantized"):
        save_model(state_result().model, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"lacks 'outer\.0\.0\.up\.weight_scale'"):
        save_model(build("deep").state_dict(), tmp_path / "a.safetensors", int8.info)
    with pytest.raises(InputError, match=r"quantization_info names the layer 'outer\.0\.0\.up', .* holds neither"):
        save_model({"a": torch.ones(2)}, tmp_path / "a.safetensors", state_result().info)
    assert not list(tmp_path.iterdir())


def test_names_of_version_1_1_read_what_they_write(tmp_path: Path) -> None:
    model = build("tied")
    save_safetensors(model, tmp_path / "weights", metadata={"author": "me", "steps": [1, 2]})
    save_pytorch(model.state_dict(), tmp_path / "weights.bin")
    for tensors in (load_safetensors(tmp_path / "weights"), load_pytorch(tmp_path / "weights.bin")):
        assert tensors.keys() == model.state_dict().keys()
        assert all(same_bits(tensors[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ConfigurationError, match="mono_quant"):
        save_safetensors(model, tmp_path / "weights", metadata={"mono_quant": "x"})
    save_model(model, str(tmp_path / "a.safetensors"))
    tensors = load_model(str(tmp_path / "a.safetensors"), torch.device("cpu"))  # as 1.1 is called
    assert isinstance(tensors, dict)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("value", [3, None, "text", {"a": torch.ones(1)}, [torch.ones(1)]])
def test_a_state_dict_of_other_things_is_refused_by_name(tmp_path: Path, value: object, suffix: str) -> None:
    with pytest.raises(InputTypeError, match="at 'extra'"):
        save_model({"a": torch.ones(2), "extra": value}, tmp_path / f"a{suffix}")  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [3, None, "text", [torch.ones(1)]])
def test_neither_module_nor_state_dict_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(InputTypeError, match=f"cannot save a {type(model).__name__}"):
        save_model(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def tensors_without_values() -> dict[str, Tensor]:
    return {
        "meta device": torch.ones(2, device="meta"),
        "layout": torch.eye(2).to_sparse(),
        "not initialised": nn.LazyLinear(3).weight,
    }


@pytest.mark.parametrize("reason", ["meta device", "layout", "not initialised"])
def test_a_tensor_that_cannot_be_stored_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    with pytest.raises(mono_quant.CheckpointError, match=f"'here' cannot be saved: it .*{reason}"):
        save_model({"here": tensors_without_values()[reason]}, tmp_path / "a.safetensors")
