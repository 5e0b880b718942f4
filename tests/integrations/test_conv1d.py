"""transformers' Conv1D: a linear layer whose weight is stored the other way round."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from mono_quant.core import LayerScheme
from mono_quant.errors import InputTypeError, QuantizationError
from mono_quant.integrations import QuantizedConv1D
from mono_quant.modules import QuantizedLinear, counterpart, quantize_linear_module
from tests.modules.layers import ASYMMETRIC, HALF, PER_TENSOR, SYMMETRIC, case_id, quantize, sqnr

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

every_scheme = pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, PER_TENSOR, HALF], ids=case_id)


def make() -> nn.Module:
    layer: nn.Module = Conv1D(10, 24)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return layer


def as_linear(conv: nn.Module) -> nn.Linear:
    linear = nn.Linear(24, 10)
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous())  # type: ignore[operator]
    linear.bias = nn.Parameter(conv.bias.detach().clone())  # type: ignore[operator, arg-type]
    return linear


def test_it_is_found_by_name_without_importing_transformers() -> None:
    assert counterpart(make()) is QuantizedConv1D
    program = (
        "import sys, mono_quant.integrations, mono_quant.modules.registry as registry;"
        "assert 'transformers.pytorch_utils.Conv1D' in registry._BY_NAME;"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@every_scheme
def test_it_computes_what_the_linear_layer_with_the_same_weight_computes(scheme: LayerScheme, backend: str) -> None:
    conv = make()
    layer, linear = quantize(conv, scheme), quantize(as_linear(conv), scheme)
    assert isinstance(layer, QuantizedConv1D)
    assert torch.equal(layer.codes, linear.codes)
    assert layer.codes.is_contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 24).to(dtype)
        assert layer(x).dtype == dtype
        assert torch.equal(layer(x), linear(x))
    x = torch.randn(2, 3, 24)
    assert sqnr(conv(x), layer(x)) > 33


@every_scheme
def test_it_reads_as_the_original(scheme: LayerScheme) -> None:
    conv = make()
    layer = quantize(conv, scheme)
    assert isinstance(layer, QuantizedConv1D)
    assert (layer.nf, layer.nx) == (conv.nf, conv.nx) == (10, 24)
    assert layer.weight.shape == conv.weight.shape
    assert (layer.weight - conv.weight).abs().max() < 0.002
    assert layer.weight_scale is None or layer.weight_scale.shape == (10, 1)


@every_scheme
def test_the_original_is_not_modified_and_shares_no_memory(scheme: LayerScheme) -> None:
    conv = make().half()
    before = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    layer = quantize(conv, scheme)
    assert all(torch.equal(tensor, before[name]) for name, tensor in conv.state_dict().items())
    theirs = {tensor.untyped_storage().data_ptr() for tensor in conv.parameters()}
    assert theirs.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in layer.buffers())


@every_scheme
def test_the_way_back_is_transformers_own_layer(scheme: LayerScheme) -> None:
    conv = make().eval()
    layer = quantize(conv, scheme)
    back = layer.to_float()
    assert type(back) is Conv1D
    assert repr(back) == repr(conv)
    assert not back.training
    assert torch.equal(back.weight, layer.weight)
    assert torch.equal(back.bias, conv.bias)
    assert back.weight.is_contiguous()
    x = torch.randn(2, 24)
    assert sqnr(layer(x), back(x)) > 33


@every_scheme
def test_state_dicts_copies_and_pickles_keep_the_bits(scheme: LayerScheme, backend: str) -> None:
    layer, other = quantize(make(), scheme), quantize(make(), scheme)
    x = torch.randn(2, 24)
    expected = layer(x)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    empty = QuantizedConv1D.like(make().to("meta"), scheme)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), expected)


def test_from_conv1d_takes_a_dtype() -> None:
    assert QuantizedConv1D.from_conv1d(make(), symmetric=True).scheme == SYMMETRIC
    assert QuantizedConv1D.from_conv1d(make(), torch.float16).scheme == HALF


def test_only_conv1d_is_taken() -> None:
    for other in (nn.Linear(2, 2), nn.Conv1d(2, 2, 1)):
        with pytest.raises(InputTypeError, match=r"replaces transformers\.pytorch_utils\.Conv1D, found"):
            QuantizedConv1D.from_conv1d(other)
    with pytest.raises(InputTypeError, match="expected a torch"):
        quantize_linear_module(make())  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="QuantizedLinear replaces Linear"):
        QuantizedLinear.from_float(make(), SYMMETRIC)


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    conv = make()
    with torch.no_grad():
        conv.weight[2, 3] = torch.nan  # type: ignore[operator]
    with pytest.raises(QuantizationError, match="NaN"):
        quantize(conv, SYMMETRIC)
