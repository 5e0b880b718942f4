"""``.pt`` files are state dicts for every other program, and nothing in one is run."""

from __future__ import annotations

import os
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mono_quant
from mono_quant import CheckpointError
from mono_quant.io import load_model, load_source, read_header, save_model
from tests.io.models import Tied, build, quantized, same_bits


class Bomb:
    """Removes the file that it was told of when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.remove, (str(self.victim),)


def test_torch_load_answers_a_plain_state_dict(tmp_path: Path) -> None:
    model = build("tied")
    save_model(model, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(state) == list(model.state_dict())
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    fresh = Tied()
    fresh.load_state_dict(state)
    assert same_bits(fresh.hidden.weight, model.hidden.weight)  # type: ignore[union-attr, arg-type]


def test_a_slice_does_not_bring_along_the_whole(tmp_path: Path) -> None:
    save_model({"a": torch.zeros(1_000_000)[:4]}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_nothing_is_unpickled_unless_asked_for(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a.pt"
    victim.write_bytes(b"")
    torch.save({"a": torch.ones(2), "b": Bomb(victim)}, path)
    for read in (load_model, load_source, read_header, mono_quant.quantize):
        with pytest.raises(CheckpointError, match="unpickling it can run code") as caught:
            read(path)  # type: ignore[operator]
        assert "allow_pickle=True" in (caught.value.suggestion or "")
    assert victim.exists()
    with pytest.raises(CheckpointError, match="NoneType at 'b'"):
        load_model(path, allow_pickle=True)
    assert not victim.exists()


def test_a_class_that_cannot_be_imported_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("gone")
    module.Net = type("Net", (nn.Linear,), {"__module__": "gone", "__qualname__": "Net"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gone", module)
    path = tmp_path / "a.pt"
    torch.save(module.Net(2, 2), path)
    monkeypatch.delitem(sys.modules, "gone")
    with pytest.raises(CheckpointError, match="needs the module 'gone', which cannot be imported") as caught:
        load_source(path, allow_pickle=True)
    assert "damaged" not in str(caught.value)


def test_a_pickled_module_is_named_and_loads_when_allowed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    torch.save(model, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"torch.nn.modules.container.Sequential"):
        load_source(tmp_path / "a.pt")
    loaded = load_source(tmp_path / "a.pt", allow_pickle=True)
    assert isinstance(loaded, nn.Sequential)
    tensors = load_model(tmp_path / "a.pt", allow_pickle=True)
    assert isinstance(tensors, dict)
    assert same_bits(tensors["0.weight"], model[0].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path: Path, key: str) -> None:
    state = OrderedDict(a=torch.randn(3))
    torch.save({key: state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pth")
    loaded = load_source(tmp_path / "a.pth")
    assert isinstance(loaded, dict)
    assert list(loaded) == ["a"]
    assert same_bits(loaded["a"], state["a"])


def test_files_from_before_zip_archives_are_read(tmp_path: Path) -> None:
    state = {"a": torch.randn(3)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    loaded = load_source(tmp_path / "a.pt")
    assert isinstance(loaded, dict)
    assert same_bits(loaded["a"], state["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds a Tensor, expected a dict of tensors"),
        ([torch.ones(2)], "holds a list, expected a dict of tensors"),
        ({"a": torch.ones(2), "epoch": 3}, "holds a int at 'epoch'"),
        ({1: torch.ones(2)}, "holds a Tensor at 1"),
    ],
)
def test_other_contents_are_refused_by_name(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a.pt")


def test_a_quantized_model_loads_with_its_ties(tmp_path: Path) -> None:
    model = quantized("tied")
    save_model(model, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", build("tied"))
    assert isinstance(loaded, nn.Module)
    state = loaded.state_dict(keep_vars=True)
    assert state["words.weight"] is state["head.weight"]
    assert read_header(tmp_path / "a.pth").tied["head.weight"] == "words.weight"
