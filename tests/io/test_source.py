"""What ``quantize`` takes as a path: float models, whatever program wrote them; quantized ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mono_quant
from mono_quant import CheckpointError, InputError
from mono_quant.io import load_source, save_model
from tests.io.models import build, quantized, same_bits


def test_plain_files_answer_their_state_dict(tmp_path: Path) -> None:
    state = build("deep").state_dict()
    plain = {name: tensor.clone() for name, tensor in state.items()}
    save_file(plain, tmp_path / "a.safetensors")
    torch.save(plain, tmp_path / "a.pt")
    save_model(build("deep"), tmp_path / "ours.safetensors")
    for name in ("a.safetensors", "a.pt"):
        loaded = load_source(tmp_path / name)
        assert isinstance(loaded, dict)
        assert loaded.keys() == state.keys()
        assert all(same_bits(loaded[key], tensor) for key, tensor in state.items())
    ours = load_source(tmp_path / "ours.safetensors")
    assert isinstance(ours, dict)
    assert ours.keys() == state.keys()


def test_tied_tensors_are_one_tensor(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.pt"):
        save_model(build("tied"), tmp_path / name)
        loaded = load_source(tmp_path / name)
        assert isinstance(loaded, dict)
        assert loaded["head.weight"].data_ptr() == loaded["words.weight"].data_ptr()


def test_quantizing_a_path_is_quantizing_its_state_dict(tmp_path: Path) -> None:
    state = build("tied").state_dict()
    save_model(state, tmp_path / "a.safetensors")
    expected = mono_quant.quantize(state).model
    found = mono_quant.quantize(tmp_path / "a.safetensors").model
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_quantized_file_is_refused_with_a_hint(tmp_path: Path, suffix: str) -> None:
    save_model(quantized("tied"), tmp_path / f"a{suffix}")
    with pytest.raises(InputError, match="quantized already: 3 layers, the first is 'words'") as caught:
        load_source(tmp_path / f"a{suffix}")
    assert "load_model()" in (caught.value.suggestion or "")


def test_a_pickled_quantized_module_is_refused(tmp_path: Path) -> None:
    torch.save(quantized("bare"), tmp_path / "a.pt")
    with pytest.raises(InputError, match="quantized already"):
        load_source(tmp_path / "a.pt", allow_pickle=True)


def test_a_directory_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": "something"}')
    with pytest.raises(CheckpointError, match=r"is a directory without a model\.safetensors"):
        load_source(tmp_path)


def test_reading_maps_the_file_and_does_not_copy_it(tmp_path: Path) -> None:
    save_model({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    loaded = load_source(tmp_path / "a.safetensors")
    assert isinstance(loaded, dict)
    with open("/proc/self/maps", encoding="ascii") as maps:
        assert str(tmp_path / "a.safetensors") in maps.read()
