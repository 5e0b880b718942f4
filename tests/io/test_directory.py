"""transformers models are saved as directories that hold everything needed to load them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mono_quant
from mono_quant import CheckpointError, ConfigurationError
from mono_quant.core import unpack_int32
from mono_quant.io import load_model, load_source, read_header, save_model
from mono_quant.modules import QuantizedLinear
from tests.io.models import same_bits
from tests.io.transformers_models import bert, gpt2, llama, words

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"scheme": "asymmetric"},
    {"bits": 4, "group_size": 16},
    {"bits": 4, "group_size": 16, "scheme": "asymmetric"},
    {"bits": 8, "group_size": 16, "scheme": "asymmetric"},
    {"bits": 16},
    {"compute_dtype": torch.bfloat16},
]


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=words())[0]
    return out


def loaded_from(path: Path, **options: Any) -> nn.Module:
    model = load_model(path, **options)
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_a_directory_is_its_own_architecture_and_gives_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    result = mono_quant.quantize(bert(), **options)
    result.save(tmp_path / "model")
    loaded = loaded_from(tmp_path / "model")
    assert type(loaded) is type(result.model)
    assert not loaded.training
    assert same_bits(answer(loaded), answer(result.model))
    assert not hasattr(loaded.config, "quantization_config")
    tensors = load_model(tmp_path / "model" / "model.safetensors")
    assert isinstance(tensors, dict)
    assert all(same_bits(tensors[name], tensor) for name, tensor in result.model.state_dict().items())


def test_a_directory_describes_the_architecture_of_a_file(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "float")
    result = mono_quant.quantize(model)
    result.save(tmp_path / "a.safetensors")
    (tmp_path / "float" / "model.safetensors").unlink()  # its weights are not read
    loaded = loaded_from(tmp_path / "a.safetensors", model=tmp_path / "float")
    assert same_bits(answer(loaded), answer(result.model))
    with pytest.raises(CheckpointError, match="is not a transformers directory"):
        load_model(tmp_path / "a.safetensors", tmp_path)


def test_a_float_directory_loads_as_it_is(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    for name in ("theirs", "ours"):
        assert same_bits(answer(loaded_from(tmp_path / name)), answer(model))
        source = load_source(tmp_path / name)
        assert isinstance(source, nn.Module)
        assert same_bits(answer(source), answer(model))


def test_tied_weights_and_the_generation_config_come_along(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 7
    result = mono_quant.quantize(model)
    result.save(tmp_path / "model")
    assert "lm_head.weight" in read_header(tmp_path / "model").tied
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["max_new_tokens"] == 7
    loaded: Any = loaded_from(tmp_path / "model")
    assert same_bits(answer(loaded), answer(result.model))
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes


def test_the_tokenizers_files_come_along_from_a_local_directory(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "float")
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "README.md"):
        (tmp_path / "float" / name).write_text(name)
    mono_quant.quantize(tmp_path / "float").save(tmp_path / "int8")
    assert sorted(os.listdir(tmp_path / "int8")) == [
        "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert (tmp_path / "int8" / "vocab.txt").read_text() == "vocab.txt"


def test_packed_zero_points_lie_as_compressed_tensors_has_them(tmp_path: Path) -> None:
    result = mono_quant.quantize(bert(), bits=4, group_size=16, scheme="asymmetric")
    result.save(tmp_path / "model")
    name = "encoder.layer.0.intermediate.dense.weight_zero_point"
    stored, plain = load_file(tmp_path / "model" / "model.safetensors")[name], result.model.state_dict()[name]
    assert (stored.dtype, plain.dtype) == (torch.int32, torch.int8)
    assert stored.shape == (-(-plain.shape[0] // 8), plain.shape[1])
    assert torch.equal(unpack_int32(stored.t(), 4, plain.shape[0]).t(), plain)


def test_a_quantized_directory_is_not_quantized_again(tmp_path: Path) -> None:
    mono_quant.quantize(bert()).save(tmp_path / "model")
    with pytest.raises(mono_quant.InputError, match="quantized already"):
        mono_quant.quantize(tmp_path / "model")


def test_existing_files_are_replaced_and_others_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "model.v1"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    mono_quant.quantize(bert(), bits=16).save(directory)
    result = mono_quant.quantize(bert())
    result.save(directory)
    assert (directory / "notes.txt").read_text() == "mine"
    assert same_bits(answer(loaded_from(directory)), answer(result.model))
    assert not [name for name in os.listdir(directory) if name.endswith(".tmp")]


def test_a_failure_leaves_no_new_directory_and_an_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    result = mono_quant.quantize(bert())
    result.save(old)
    before = {name: (old / name).read_bytes() for name in os.listdir(old)}

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for directory in (old, new):
        with pytest.raises(CheckpointError, match=f"cannot write {directory}: No space left"):
            result.save(directory)
    assert not new.exists()
    assert {name: (old / name).read_bytes() for name in os.listdir(old)} == before


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "absent" / "model", tmp_path / "file" / "model"):
        with pytest.raises(CheckpointError, match=f"cannot write {place}") as caught:
            save_model(bert(), place)
        assert caught.value.suggestion


def test_only_transformers_models_are_saved_to_directories(tmp_path: Path) -> None:
    for model in (nn.Linear(2, 2), {"a": torch.ones(2)}):
        for place in (tmp_path, tmp_path / "new"):
            with pytest.raises(CheckpointError, match="only transformers models are saved to directories"):
                save_model(model, place)
    assert os.listdir(tmp_path) == []


def test_layers_without_a_place_in_the_layout_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'transformer.h.0.attn.c_attn' is a quantized transformers' Conv1D"):
        mono_quant.quantize(gpt2()).save(tmp_path / "model")
    assert os.listdir(tmp_path) == []
    mono_quant.quantize(gpt2()).save(tmp_path / "a.safetensors")


def test_the_saved_model_is_the_one_that_ran(tmp_path: Path) -> None:
    result = mono_quant.quantize(bert())
    answer(result.model)  # packs the weights for the kernels
    result.save(tmp_path / "model")
    assert same_bits(answer(loaded_from(tmp_path / "model")), answer(result.model))
    assert any(isinstance(module, QuantizedLinear) for module in result.model.modules())
