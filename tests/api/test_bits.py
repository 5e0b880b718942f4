"""Bits for single layers: which rule holds, what is refused, and that the mixture survives saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mono_quant
from mono_quant.api.bits import BitRules
from mono_quant.config import QuantizationConfig
from mono_quant.core import LayerScheme
from mono_quant.errors import ConfigurationError

INT4 = LayerScheme("weight_only", bits=4, group_size=32)
INT8 = LayerScheme()
HALF = LayerScheme("float16", bits=16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": nn.Linear(32, 32), "mlp": nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))})
            for _ in range(2)
        )
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["attention"](x)
            x = x + block["mlp"](x)
        logits: torch.Tensor = self.head(x)
        return logits


def net() -> Net:
    return Net().eval()


def found(result: mono_quant.QuantizationResult) -> dict[str, LayerScheme]:
    return {name: layer.scheme for name, layer in result.info.layers.items()}


def test_rules_reach_the_layers_they_name() -> None:
    result = mono_quant.quantize(net(), bits={"*.mlp.*": 4, "head": 16, "embed": 32, "*": 8})
    assert found(result) == {
        "blocks.0.attention": INT8,
        "blocks.0.mlp.0": INT4,
        "blocks.0.mlp.1": LayerScheme("weight_only", bits=4, group_size=64),
        "blocks.1.attention": INT8,
        "blocks.1.mlp.0": INT4,
        "blocks.1.mlp.1": LayerScheme("weight_only", bits=4, group_size=64),
        "head": HALF,
    }
    assert result.info.skip_reasons == {"embed": "bits says 32 for 'embed': float"}
    assert result.model(torch.arange(6)[None]).shape == (1, 6, 50)


@pytest.mark.parametrize(
    ("rules", "layer", "expected"),
    [
        ({"a.b": 4, "a": 16, "*b": 32, "*": 8}, "a.b", ("a.b", 4)),
        ({"a": 16, "*b": 32, "*": 8}, "a.b", ("a", 16)),
        ({"a": 16, "a.b": 4}, "a.b.c", ("a.b", 4)),
        ({"*": 8, "*b": 32}, "a.b", ("*b", 32)),
        ({"*b": 4, "a.*": 4}, "a.b", ("*b", 4)),
        ({"*": 16}, "a.b", ("*", 16)),
        ({"c": 4}, "a.b", (None, 8)),
        ({"a.*": 4, "a.b.*": 16, "a.b.c": 8}, "a.b.c", ("a.b.c", 8)),
    ],
)
def test_a_name_beats_a_glob_and_a_glob_beats_everything(
    rules: dict[str, int], layer: str, expected: tuple[str | None, int]
) -> None:
    assert BitRules.from_mapping(rules).find(layer) == expected


def test_layers_without_a_rule_have_eight_bits() -> None:
    assert found(mono_quant.quantize(net(), bits={"head": 16}))["blocks.0.mlp.0"] == INT8


def test_globs_that_contradict_each_other_are_an_error_that_names_all_three() -> None:
    with pytest.raises(ConfigurationError, match=r"'blocks.0.mlp.0'.*'\*.mlp.\*' with 4.*'blocks.0.\*' with 16"):
        mono_quant.quantize(net(), bits={"*.mlp.*": 4, "blocks.0.*": 16})


def test_layers_that_are_skipped_have_no_contradictions() -> None:
    result = mono_quant.quantize(net(), bits={"*.mlp.*": 4, "blocks.0.*": 16}, skip="blocks.0.mlp")
    assert found(result)["blocks.0.attention"] == HALF


def test_a_rule_that_names_nothing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"bits names 'haed', which matches nothing"):
        mono_quant.quantize(net(), bits={"haed": 16})
    with pytest.raises(ConfigurationError, match=r"bits names 'haed', which matches nothing"):
        mono_quant.quantize(net().state_dict(), bits={"haed": 16})


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({}, "without any rule"),
        ({"head": 5}, r"bits\['head'\]=5"),
        ({"head": True}, r"bits\['head'\]=True"),
        ({"head": "4"}, r"bits\['head'\]='4'"),
        ({nn.Linear: 4}, "found the key"),
        ({"": 4}, "found the key ''"),
    ],
)
def test_rules_that_make_no_sense_are_refused(bits: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        mono_quant.quantize(net(), bits=bits)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'head' twice, with 4 and 8"):
        BitRules((("head", 4), ("head", 8)))


def test_rules_and_options_for_all_layers_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="config gives all layers"):
        mono_quant.quantize(net(), bits={"head": 16}, config=QuantizationConfig(bits=4))
    with pytest.raises(ConfigurationError, match="float16 gives all layers"):
        mono_quant.quantize(net(), bits={"head": 16}, dtype=torch.float16)


def test_the_group_size_is_that_of_four_bit_layers() -> None:
    result = mono_quant.quantize(net(), bits={"*.mlp.*": 4}, group_size=16)
    assert found(result)["blocks.0.mlp.0"] == LayerScheme("weight_only", bits=4, group_size=16)
    assert found(result)["blocks.0.attention"] == INT8
    with pytest.raises(ConfigurationError, match="no rule of bits asks for 4"):
        mono_quant.quantize(net(), bits={"head": 16}, group_size=16)


def test_layers_that_cannot_have_four_bits_are_named() -> None:
    result = mono_quant.quantize(net(), bits={"embed": 4, "head": 4})
    assert found(result)["embed"] == INT8
    assert any("1 layer is stored in 8 bits" in w and "embed" in w for w in result.warnings)


def test_state_dicts_follow_the_same_rules() -> None:
    rules = {"*.mlp.*": 4, "head": 16, "embed": 32, "*": 8}
    from_state = mono_quant.quantize(net().state_dict(), bits=rules)
    assert found(from_state) == found(mono_quant.quantize(net(), bits=rules))
    assert from_state.info.skip_reasons["embed"] == "bits says 32 for 'embed': float"


def test_a_mixture_survives_saving(tmp_path: Path) -> None:
    result = mono_quant.quantize(net(), bits={"*.mlp.*": 4, "head": 16, "embed": 32, "*": 8}, scheme="asymmetric")
    result.save(tmp_path / "mixed.safetensors")
    loaded = mono_quant.load_model(tmp_path / "mixed.safetensors", net())
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids), result.model(ids))


def test_a_tied_weight_may_be_stored_in_two_formats(tmp_path: Path) -> None:
    model = net()
    model.head.weight = model.embed.weight
    result = mono_quant.quantize(model, bits={"head": 16, "*": 8})
    assert any("'embed'" in warning and "'head'" in warning for warning in result.warnings)
    result.save(tmp_path / "mixed.safetensors")
    fresh = net()
    fresh.head.weight = fresh.embed.weight
    loaded = mono_quant.load_model(tmp_path / "mixed.safetensors", fresh)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids), result.model(ids))
