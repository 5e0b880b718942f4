"""QuantizedLinear: integer products between float inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant.core import LayerScheme, QuantizedTensor
from mono_quant.errors import InputTypeError, QuantizationError
from mono_quant.modules import QuantizedLinear, counterpart_for_scheme, quantize_linear_module
from mono_quant.modules.bfloat16 import linear_bfloat16
from mono_quant.report import sqnr_db
from tests.modules.layers import (
    ASYMMETRIC,
    HALF,
    PER_TENSOR,
    SYMMETRIC,
    assert_same_numbers,
    case_id,
    float64_twin,
    quantize,
    rounded_rows,
    sqnr,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


def as_layout(x: Tensor, layout: str) -> Tensor:
    """Answer values like those of ``x`` with other strides."""
    match layout:
        case "transposed":
            return x.transpose(-1, 0).contiguous().transpose(-1, 0)
        case "strided":
            return torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]
        case "expanded":
            return x[:1].expand(3, *x.shape[1:]) if x.shape[0] else x
        case _:
            return x


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Linear, Tensor]:
    """A float layer and an input of any rank, dtype and strides."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    in_features, out_features = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    leading = draw(st.lists(st.integers(0, 4), max_size=3))
    layer = nn.Linear(in_features, out_features, bias=draw(st.booleans()))
    x = torch.randn(*leading, in_features) * draw(st.sampled_from([1e-3, 1.0, 100.0])) + draw(st.sampled_from([0, 5]))
    layout = draw(st.sampled_from(LAYOUTS)) if leading else "contiguous"
    return layer, as_layout(x.to(draw(st.sampled_from(DTYPES))), layout)


@given(example=linears(), symmetric=st.booleans())
def test_the_output_is_what_exact_arithmetic_gives_for_the_rounded_input_and_weight(
    example: tuple[nn.Linear, Tensor], symmetric: bool, backend: str
) -> None:
    linear, x = example
    layer = quantize_linear_module(linear, symmetric=symmetric)
    out = layer(x)
    assert out.dtype == x.dtype
    assert out.shape == (*x.shape[:-1], layer.out_features)
    assert_same_numbers(out, float64_twin(layer)(rounded_rows(x)))


@given(example=linears(), symmetric=st.booleans())
def test_the_output_is_within_the_bound_of_two_roundings(
    example: tuple[nn.Linear, Tensor], symmetric: bool, backend: str
) -> None:
    linear, x = example
    layer = quantize_linear_module(linear, symmetric=symmetric)
    assert isinstance(layer._quantized_weight, QuantizedTensor)
    rows = x.double()
    # Half a step for the value, and half a step more where a rounded zero point pushes the range's end out.
    weight_error = layer._quantized_weight.scale.double() * (0.5 if symmetric else 1.0)
    row_error = torch.ops.mono_quant.quantize_rows(x)[1].double().unsqueeze(-1)
    bound = rows.abs().sum(-1, keepdim=True) * weight_error
    bound = bound + row_error * linear.weight.double().abs().sum(1)
    bound = bound + layer.in_features * row_error * weight_error
    exact = linear.double()(rows)
    rounding = exact.abs() * 2 * torch.finfo(x.dtype).eps + 1e-6 * bound
    assert ((layer(x).double() - exact).abs() <= bound * 1.001 + rounding).all()


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, PER_TENSOR], ids=case_id)
def test_the_noise_is_far_below_the_signal(scheme: LayerScheme, backend: str) -> None:
    linear = nn.Linear(384, 256)
    x = torch.randn(32, 384)
    assert sqnr(linear(x), quantize(linear, scheme)(x)) > 38


def test_half_precision_weights_compute_in_float32() -> None:
    linear = nn.Linear(300, 40)
    layer = quantize(linear, HALF)
    x = torch.randn(6, 300)
    expected = nn.functional.linear(x, linear.weight.half().float(), linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@given(seed=st.integers(0, 2**31), symmetric=st.booleans(), batch=st.integers(2, 40), dtype=st.sampled_from(DTYPES))
def test_a_row_does_not_depend_on_the_other_rows(
    seed: int, symmetric: bool, batch: int, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(seed)
    layer = quantize_linear_module(nn.Linear(130, 50), symmetric=symmetric)
    x = (torch.randn(batch, 130) * torch.logspace(-3, 3, batch).unsqueeze(1)).to(dtype)
    together = layer(x)
    for row in (0, batch // 2, batch - 1):
        assert torch.equal(layer(x[row]), together[row])
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    order = torch.randperm(batch)
    assert torch.equal(layer(x[order]), together[order])


def test_the_number_of_threads_changes_nothing(backend: str) -> None:
    layer = quantize_linear_module(nn.Linear(256, 300))
    x = torch.randn(90, 256)
    expected = layer(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_comes_out_nan_and_harms_no_other(
    value: float, dtype: torch.dtype, backend: str
) -> None:
    layer = quantize_linear_module(nn.Linear(70, 33))
    clean = torch.randn(5, 70).to(dtype)
    x = clean.clone()
    x[2, 40] = value
    out, expected = layer(x), layer(clean)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_of_every_size_come_out_right(symmetric: bool, backend: str) -> None:
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight[0] = 0.0
        linear.weight[1] = 0.25
        linear.weight[2] = -0.25
        linear.weight[3] *= 1e-41
        linear.weight[4] *= 1e-30
        linear.weight[5] = linear.weight[5].sign() * 1e30
        linear.weight[6].abs_()
        linear.weight[7] = 0.0
        linear.weight[7, 3] = 1.0
    layer = quantize_linear_module(linear, symmetric=symmetric)
    x = torch.randn(7, 64)
    out = layer(x)
    assert out.isfinite().all()
    assert torch.equal(out[:, 0], linear.bias[:1].detach().expand(7))
    assert_same_numbers(out, float64_twin(layer)(rounded_rows(x)))
    for channel in (1, 2, 5, 6, 7):
        assert sqnr(linear(x)[:, channel], out[:, channel]) > 25


def test_inputs_of_every_size_come_out_right(backend: str) -> None:
    layer = quantize_linear_module(nn.Linear(64, 8), symmetric=True)
    rows = [torch.zeros(64), torch.ones(64), -torch.ones(64), torch.randn(64) * 1e-41, torch.randn(64).sign() * 1e30]
    x = torch.stack(rows)
    out = layer(x)
    assert torch.equal(out[0], layer.bias)
    assert_same_numbers(out, float64_twin(layer)(rounded_rows(x)))


@pytest.mark.parametrize("length", [66_400, 140_000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_beyond_32_bits_are_exact(length: int, symmetric: bool, backend: str) -> None:
    linear = nn.Linear(length, 2, bias=False)
    with torch.no_grad():
        # All products of one sign and as large as they can be: the sum is near 255 * 127 * length.
        linear.weight[0] = 1.0
        linear.weight[1] = -1.0
    layer = quantize_linear_module(linear, symmetric=symmetric)
    x = torch.ones(2, length)
    x[1] = torch.randn(length)
    out = layer(x)
    assert_same_numbers(out, float64_twin(layer)(rounded_rows(x)))
    torch.testing.assert_close(out[0], torch.tensor([float(length), -float(length)]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)])
def test_an_empty_input_gives_an_empty_output(shape: tuple[int, ...], backend: str) -> None:
    for scheme in (SYMMETRIC, ASYMMETRIC, HALF):
        assert quantize(nn.Linear(8, 5), scheme)(torch.empty(shape)).shape == (*shape[:-1], 5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, HALF], ids=case_id)
def test_layers_without_inputs_or_outputs_work(scheme: LayerScheme, backend: str) -> None:
    without_outputs = quantize(nn.Linear(8, 0), scheme)
    assert without_outputs(torch.randn(3, 8)).shape == (3, 0)
    linear = nn.Linear(0, 4)
    nn.init.normal_(linear.bias)
    without_inputs = quantize(linear, scheme)
    assert torch.equal(without_inputs(torch.empty(3, 0)), linear.bias.detach().expand(3, 4))
    assert without_inputs.to_float()(torch.empty(3, 0)).shape == (3, 4)


def test_an_input_of_the_wrong_width_is_an_error(backend: str) -> None:
    for scheme in (SYMMETRIC, ASYMMETRIC, HALF):
        layer = quantize(nn.Linear(8, 5), scheme)
        for shape in ((3, 7), (7,), (2, 4, 16)):
            with pytest.raises((RuntimeError, ValueError)):
                layer(torch.randn(shape))


def test_the_seeds_constructor_makes_a_layer_of_zeros() -> None:
    layer = QuantizedLinear(6, 4)
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert layer.scheme == ASYMMETRIC
    assert torch.equal(layer.weight, torch.zeros(4, 6))
    assert torch.equal(layer(torch.randn(3, 6)), torch.zeros(3, 4))
    assert QuantizedLinear(6, 4, bias=False).bias is None
    assert QuantizedLinear(6, 4, dtype=torch.float16).codes.dtype == torch.float16
    other = QuantizedLinear(6, 4, symmetric=True)
    source = QuantizedLinear.from_linear(nn.Linear(6, 4), symmetric=True)
    other.load_state_dict(source.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(other(x), source(x))


def test_the_bias_stays_in_float() -> None:
    linear = nn.Linear(6, 4)
    layer = QuantizedLinear.from_linear(linear)
    assert torch.equal(layer.bias, linear.bias.detach())
    assert QuantizedLinear.from_linear(linear.bfloat16()).bias.dtype == torch.bfloat16


def test_the_quantized_weight_is_cached() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(6, 4))
    quantized = layer._quantized_weight
    assert isinstance(quantized, QuantizedTensor)
    assert quantized.codes is layer._buffers["weight"]
    assert torch.equal(torch.dequantize(quantized), layer.weight)


def test_other_modules_and_dtypes_are_refused() -> None:
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Linear, found Conv1d"):
        quantize_linear_module(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="float32"):
        quantize_linear_module(nn.Linear(2, 2), dtype=torch.float32)
    with pytest.raises(QuantizationError, match="not initialised"):
        quantize_linear_module(nn.LazyLinear(3))


def test_the_representation_names_the_scheme() -> None:
    text = repr(QuantizedLinear.from_linear(nn.Linear(6, 4), symmetric=True))
    assert text == ("QuantizedLinear(in_features=6, out_features=4, bias=True, int8 dynamic, symmetric, channels)")


def test_a_bfloat16_layer_stores_and_multiplies_bfloat16() -> None:
    linear = nn.Linear(24, 10)
    layer = QuantizedLinear.from_float(linear, LayerScheme("bfloat16", bits=16))
    x = torch.randn(5, 24)
    assert layer.codes.dtype == layer.dtype == torch.bfloat16
    expected = torch.nn.functional.linear(x.bfloat16(), linear.weight.bfloat16(), linear.bias.bfloat16())
    assert torch.equal(layer(x), expected.float())
    for dtype in DTYPES:
        assert layer(x.to(dtype)).dtype == dtype
    restored = layer.to_float()
    assert torch.equal(restored.weight, linear.weight.bfloat16().float())


def test_a_weight_beyond_bfloat16_is_refused() -> None:
    linear = nn.Linear(2, 2)
    linear.weight.data[0, 0] = torch.finfo(torch.float32).max
    with pytest.raises(QuantizationError, match="bfloat16"):
        QuantizedLinear.from_float(linear, LayerScheme("bfloat16", bits=16))


@pytest.mark.parametrize("module", [nn.Conv2d(2, 2, 1), nn.Embedding(4, 4)])
def test_only_linear_layers_have_bfloat16(module: nn.Module) -> None:
    assert counterpart_for_scheme(module, LayerScheme("bfloat16", bits=16)) is None


@given(
    rows=st.sampled_from([1, 31, 700]),
    activation=st.sampled_from(["none", "relu", "gelu", "gelu_tanh", "silu"]),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_of_a_bfloat16_layer_may_come_in_pieces(rows: int, activation: str, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(1024, 8).bfloat16(), torch.randn(1024)
    x = torch.randn(2, rows, 8).to(dtype)
    functions = {
        "none": lambda y: y, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    }  # fmt: skip
    exact = functions[activation](x.float() @ weight.float().T + bias)
    found = linear_bfloat16(x, weight, bias, activation)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert sqnr_db(exact, found) > 40
