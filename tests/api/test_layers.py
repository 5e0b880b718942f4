"""Quantizing a module by a mapping from layer names to schemes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mono_quant.api.layers import quantize_by_schemes
from mono_quant.api.options import Options
from mono_quant.core import LayerScheme
from mono_quant.errors import ConfigurationError
from mono_quant.modules import QuantizedConv2d, QuantizedLinear, WeightOnlyLinear

INT4 = LayerScheme("weight_only", bits=4, group_size=32)
HALF = LayerScheme("float16", bits=16)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 8)
    ).eval()


def test_each_layer_gets_its_scheme_and_the_others_follow_the_options() -> None:
    schemes = {"2": INT4, "3": None, "4": HALF}
    result = quantize_by_schemes(model(), schemes, Options(), why_float={"3": "too sensitive"})
    kinds = [type(result.model[index]) for index in (0, 2, 3, 4)]
    assert kinds == [QuantizedConv2d, WeightOnlyLinear, nn.Linear, QuantizedLinear]
    assert {name: layer.scheme for name, layer in result.info.layers.items()} == {
        "0": LayerScheme(),
        "2": INT4,
        "4": HALF,
    }
    assert result.info.skip_reasons == {"3": "too sensitive"}


def test_layers_in_float_stay_exact() -> None:
    net = model()
    images = torch.randn(2, 3, 6, 6)
    result = quantize_by_schemes(net, {"0": None, "2": None, "3": None}, Options())
    assert result.info.selected_layers == ["4"]
    assert torch.equal(result.model[:4](images), net[:4](images))


def test_a_scheme_for_a_layer_that_is_not_quantized_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'2'.*skip names '2'"):
        quantize_by_schemes(model(), {"2": INT4}, Options(skip=("2",)))
    with pytest.raises(ConfigurationError, match=r"'nowhere'.*no such layer"):
        quantize_by_schemes(model(), {"nowhere": None}, Options())


def test_a_scheme_that_does_not_fit_a_layer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'0' \(Conv2d\)"):
        quantize_by_schemes(model(), {"0": INT4}, Options())
    with pytest.raises(ConfigurationError, match=r"'4': group_size=48 does not divide its 32 inputs"):
        quantize_by_schemes(model(), {"4": LayerScheme("weight_only", bits=4, group_size=48)}, Options())
