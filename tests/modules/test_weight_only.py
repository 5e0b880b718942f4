"""WeightOnlyLinear: packed weights, float arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mono_quant.core import LayerScheme, pack_int32
from mono_quant.core.layer_scheme import WEIGHT_ONLY
from mono_quant.errors import ConfigurationError, InputTypeError
from mono_quant.modules import WeightOnlyLinear, quantize_linear_module_int4
from tests.modules.layers import INT4, INT4_ASYMMETRIC, INT8_WEIGHT_ONLY, SYMMETRIC, case_id, quantize, sqnr

SCHEMES = (INT4, INT4_ASYMMETRIC, INT8_WEIGHT_ONLY)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def weight_only_schemes(draw: st.DrawFn) -> tuple[LayerScheme, int]:
    """A scheme and a number of inputs that it fits."""
    group_size = draw(st.sampled_from([None, 1, 3, 8, 32]))
    inputs = draw(st.integers(1, 50)) if group_size is None else group_size * draw(st.integers(1, 5))
    bits, symmetric = draw(st.sampled_from([4, 8])), draw(st.booleans())
    return LayerScheme(WEIGHT_ONLY, bits=bits, symmetric=symmetric, group_size=group_size), inputs


@given(
    example=weight_only_schemes(), outputs=st.integers(1, 20), leading=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_output_is_the_float_layer_on_the_dequantized_weight(
    example: tuple[LayerScheme, int],
    outputs: int,
    leading: list[int],
    dtype: torch.dtype,
    bias: bool,
    seed: int,
    backend: str,
) -> None:
    scheme, inputs = example
    torch.manual_seed(seed)
    layer = quantize(nn.Linear(inputs, outputs, bias=bias), scheme)
    x = torch.randn(*leading, inputs).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert out.shape == (*leading, outputs)
    expected = layer.to_float().double()(x.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps + 1e-5, atol=1e-5)


@given(example=weight_only_schemes(), outputs=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_every_weight_is_within_half_a_step(example: tuple[LayerScheme, int], outputs: int, seed: int) -> None:
    scheme, inputs = example
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    layer = quantize(linear, scheme)
    assert layer.weight_scale is not None
    error = (layer.weight - linear.weight).abs().unflatten(1, (layer.weight_scale.shape[1], -1))
    steps = 0.5 if scheme.symmetric else 1.0
    assert (error <= layer.weight_scale.unsqueeze(-1) * (steps + 1e-4)).all()


@pytest.mark.parametrize(("scheme", "least"), [(INT4, 18), (INT4_ASYMMETRIC, 19), (INT8_WEIGHT_ONLY, 40)])
def test_the_noise_is_below_the_signal(scheme: LayerScheme, least: float) -> None:
    linear = nn.Linear(128, 64)
    x = torch.randn(16, 128)
    assert sqnr(linear(x), quantize(linear, scheme)(x)) > least


def test_the_buffers_are_those_of_a_checkpoint() -> None:
    layer = WeightOnlyLinear.from_float(nn.Linear(40, 6), INT4_ASYMMETRIC)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.named_buffers()}
    assert found == {
        "weight_packed": ((6, 5), torch.int32),
        "weight_scale": ((6, 5), torch.float32),
        "weight_zero_point": ((6, 5), torch.int8),
        "weight_shape": ((2,), torch.int64),
        "bias": ((6,), torch.float32),
    }
    assert layer.weight_shape.tolist() == [6, 40]
    assert torch.equal(layer.weight_packed, pack_int32(layer._quantized_weight.codes, 4))
    symmetric = WeightOnlyLinear.from_float(nn.Linear(40, 6, bias=False), INT4)
    assert set(symmetric.state_dict()) == {"weight_packed", "weight_scale", "weight_shape"}


def test_int4_takes_less_than_a_sixth_of_the_bytes() -> None:
    linear = nn.Linear(512, 256)
    layer = quantize_linear_module_int4(linear)
    assert layer.scheme == LayerScheme(WEIGHT_ONLY, bits=4, group_size=128)
    assert sum(tensor.nbytes for tensor in layer.buffers()) * 6 < sum(tensor.nbytes for tensor in linear.parameters())


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_id)
def test_an_empty_input_gives_an_empty_output(scheme: LayerScheme, backend: str) -> None:
    layer = quantize(nn.Linear(8, 5), scheme)
    for shape in ((0, 8), (2, 0, 8)):
        assert layer(torch.empty(shape)).shape == (*shape[:-1], 5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_inputs_or_outputs_work(backend: str) -> None:
    scheme = LayerScheme(WEIGHT_ONLY, bits=4)
    assert quantize(nn.Linear(8, 0), scheme)(torch.randn(3, 8)).shape == (3, 0)
    linear = nn.Linear(0, 4)
    nn.init.normal_(linear.bias)
    assert torch.equal(quantize(linear, scheme)(torch.empty(3, 0)), linear.bias.detach().expand(3, 4))


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_id)
def test_a_row_with_a_nan_harms_no_other(scheme: LayerScheme, backend: str) -> None:
    layer = quantize(nn.Linear(16, 5), scheme)
    x = torch.randn(4, 16)
    x[1, 3] = torch.nan
    out = layer(x)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_a_group_size_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="128"):
        quantize_linear_module_int4(nn.Linear(100, 4))


def test_other_schemes_and_modules_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="int8_dynamic"):
        WeightOnlyLinear.like(nn.Linear(2, 2), SYMMETRIC)
    with pytest.raises(InputTypeError, match="Embedding"):
        quantize_linear_module_int4(nn.Embedding(4, 4))  # type: ignore[arg-type]
