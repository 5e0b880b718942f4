"""Quantized weights as modules and state dicts hold them, and what is wrong with damaged ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant.core import QuantizedTensor
from mono_quant.errors import InputError
from mono_quant.io import LayerRecord
from mono_quant.report.weights import float_weight, quantized_layers, stored_weight, weight_faults
from tests.report.models import SCHEMES, network, quantized


def records(scheme: str) -> dict[str, LayerRecord]:
    return {layer: LayerRecord(SCHEMES[scheme]) for layer in ("0", "3.0", "4")}


def values(weight: QuantizedTensor | Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_holds_the_same_weights_as_its_module(scheme: str) -> None:
    model = quantized(network(), SCHEMES[scheme])
    state = model.state_dict()
    assert quantized_layers(model) == quantized_layers(state, records(scheme)) == ["0", "3.0", "4"]
    for layer in quantized_layers(model):
        first, second = stored_weight(model, layer), stored_weight(state, layer, records(scheme))
        assert torch.equal(values(first.weight), values(second.weight))
        assert first.scheme == second.scheme


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "float16"])
def test_the_tensors_alone_tell_how_a_layer_is_quantized(scheme: str) -> None:
    model = quantized(network(), SCHEMES[scheme])
    state = model.state_dict()
    assert quantized_layers(state) == quantized_layers(model)
    for layer in quantized_layers(state):
        found = stored_weight(state, layer)
        assert torch.equal(values(found.weight), values(stored_weight(model, layer).weight))
        assert (found.scheme.kind, found.scheme.bits) == (SCHEMES[scheme].kind, SCHEMES[scheme].bits)


def test_a_single_layer_has_the_empty_name() -> None:
    layer = quantized(nn.Linear(4, 2), SCHEMES["int8"])
    assert quantized_layers(layer) == quantized_layers(layer.state_dict()) == [""]
    assert torch.equal(values(stored_weight(layer.state_dict(), "").weight), values(stored_weight(layer, "").weight))


def test_layers_share_memory_exactly_if_they_hold_one_weight() -> None:
    linear = nn.Linear(64, 64)
    model = quantized(nn.Sequential(linear, nn.Linear(64, 64), nn.Linear(64, 64)), SCHEMES["int8"])
    # Having run, layers hold kernel layouts and rebuild their codes at each reading, in memory that is used again.
    model(torch.ones(1, 64))
    assert len({stored_weight(model, layer).memory for layer in quantized_layers(model)}) == 3
    state = model.state_dict()
    state["2.weight"] = state["0.weight"]
    assert stored_weight(state, "0").memory == stored_weight(state, "2").memory != stored_weight(state, "1").memory


@pytest.mark.parametrize(
    ("scheme", "damage", "message"),
    [
        ("int8", lambda state: state.pop("0.weight"), "no tensor 0.weight"),
        ("int8", lambda state: state.update({"0.weight": torch.ones(64, 32)}), "0.weight holds torch.float32"),
        ("int8", lambda state: state.update({"0.weight_scale": torch.ones(3, 1)}), "64 output channels but 3 scales"),
        ("int8 asymmetric", lambda state: state.update({"0.weight_zero_point": state["0.weight"]}), "must agree"),
        ("int4", lambda state: state.pop("0.weight_shape"), "weight_shape"),
        ("int4", lambda state: state.update({"0.weight_shape": torch.tensor([64, 64])}), "words a row|does not fit"),
    ],
)
def test_tensors_that_do_not_fit_together_are_named(
    scheme: str, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(quantized(network(), SCHEMES[scheme]).state_dict())
    damage(state)
    with pytest.raises(InputError, match=message):
        stored_weight(state, "0")


def test_a_layer_that_the_header_names_needs_its_zero_points() -> None:
    state = quantized(network(), SCHEMES["int8"]).state_dict()
    with pytest.raises(InputError, match=r"no tensor 0\.weight_zero_point"):
        stored_weight(state, "0", records("int8 asymmetric"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_original_weight_comes_from_modules_and_state_dicts(scheme: str) -> None:
    model = network()
    twin = quantized(model, SCHEMES[scheme])
    for original in (model, model.state_dict()):
        for layer in quantized_layers(twin):
            module = model.get_submodule(layer)
            assert isinstance(module, nn.Linear)
            assert torch.equal(float_weight(original, twin, stored_weight(twin, layer)), module.weight)


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), r"shape \(64, 32\), the original's is \(3, 3\)"),
        (nn.Sequential(nn.ReLU()), "has no weight"),
        (nn.Sequential(), "no layer '0'"),
        ({}, "no tensor '0.weight'"),
    ],
)
def test_an_original_without_the_layer_is_refused(original: nn.Module, message: str) -> None:
    twin = quantized(network(), SCHEMES["int8"])
    with pytest.raises(InputError, match=message):
        float_weight(original, twin, stored_weight(twin, "0"))


def test_conv1d_of_transformers_is_compared_in_the_layout_it_is_stored_in() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    from mono_quant.integrations.conv1d import CONV1D, QuantizedConv1D

    # Square, so that a transposed weight would not show by its shape.
    layer = conv1d(16, 16)
    twin = QuantizedConv1D.from_float(layer, SCHEMES["int8"])
    header = {"": LayerRecord(SCHEMES["int8"], CONV1D)}
    cases = [(layer, twin, None), (layer.state_dict(), twin, None), (layer.state_dict(), twin.state_dict(), header)]
    for original, stored_in, known in cases:
        stored = stored_weight(stored_in, "", known)
        assert torch.equal(float_weight(original, stored_in, stored), layer.weight.t())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sound_weight_has_no_faults(scheme: str) -> None:
    model = quantized(network(), SCHEMES[scheme])
    assert [weight_faults(stored_weight(model, layer)) for layer in quantized_layers(model)] == [[], [], []]


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0, -1.0, 3e38])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_scale_that_is_not_positive_or_leads_to_infinity_is_a_fault(scheme: str, scale: float) -> None:
    model = quantized(network(), SCHEMES[scheme])
    weight_scale = model.get_submodule("0").weight_scale
    assert isinstance(weight_scale, Tensor)
    weight_scale[3] = scale
    (fault,) = weight_faults(stored_weight(model, "0"))
    assert fault.startswith("layer '0' has 1 scales that are not positive")


@pytest.mark.parametrize(
    ("scheme", "name", "value", "message"),
    [
        ("int8", "0.weight", -128, r"codes reach from -128 to \d+, outside \[-127, 127\]"),
        ("int4 asymmetric", "0.weight_zero_point", 9, r"zero points reach from -?\d+ to 9, outside \[-8, 7\]"),
    ],
)
def test_a_code_or_zero_point_out_of_range_is_a_fault(scheme: str, name: str, value: int, message: str) -> None:
    state = quantized(network(), SCHEMES[scheme]).state_dict()
    state[name][0, 0] = value
    (fault,) = weight_faults(stored_weight(state, "0"))
    assert re.search(message, fault)


def test_a_float16_weight_must_be_finite() -> None:
    model = quantized(network(), SCHEMES["float16"])
    model.state_dict()["0.weight"][1, 1] = math.inf
    assert weight_faults(stored_weight(model, "0")) == ["layer '0' holds 1 NaN or infinite values"]
