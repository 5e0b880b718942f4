"""Quantized convolutions: still PyTorch's types, computed as integers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant.core import LayerScheme, QuantizedTensor
from mono_quant.errors import InputError, InputTypeError, QuantizationError
from mono_quant.modules import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedModule,
    counterpart,
    quantize_conv1d_module,
    quantize_conv2d_module,
    quantize_conv3d_module,
)
from tests.modules.layers import (
    ASYMMETRIC,
    HALF,
    PER_TENSOR,
    SYMMETRIC,
    assert_same_numbers,
    case_id,
    float64_twin,
    quantize,
    rounded_samples,
    sqnr,
)

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FACTORIES: tuple[Any, ...] = (quantize_conv1d_module, quantize_conv2d_module, quantize_conv3d_module)
QUANTIZED = (QuantizedConv1d, QuantizedConv2d, QuantizedConv3d)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# PyTorch's own layers warn about it; the quantized ones pad by themselves.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

each_dimension = pytest.mark.parametrize("spatial", [1, 2, 3])


def conv_and_input(spatial: int, *batch: int) -> tuple[nn.Module, Tensor]:
    return CONVS[spatial - 1](4, 6, 3), torch.randn(*batch, 4, *(7, 6, 5)[:spatial])


@st.composite
def geometries(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any geometry that PyTorch takes, and an input of any dtype and strides."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    spatial = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel, dilation = each(1, 4), each(1, 2)
    padding: Any = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    stride = (1,) * spatial if padding == "same" else each(1, 3)
    if padding == "numbers":
        padding = each(0, 2)
    conv = CONVS[spatial - 1](
        groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), kernel, stride, padding, dilation, groups,
        draw(st.booleans()), padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )  # fmt: skip
    # Large enough for every kernel and for reflection.
    sizes = [draw(st.integers(2 * k * d + 1, 2 * k * d + 4)) for k, d in zip(kernel, dilation, strict=True)]
    batch = draw(st.sampled_from([(), (0,), (1,), (3,)]))
    x = torch.randn(*batch, conv.in_channels, *sizes) + draw(st.sampled_from([0.0, 2.0]))
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    if layout == "channels_last" and x.dim() in (4, 5) and batch:
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    elif layout == "strided":
        x = torch.stack([x, -x], dim=-1)[..., 0]
    return conv, x


@given(example=geometries(), scheme=st.sampled_from([SYMMETRIC, ASYMMETRIC, PER_TENSOR]))
def test_the_output_is_what_exact_arithmetic_gives_for_the_rounded_input_and_weight(
    example: tuple[nn.Module, Tensor], scheme: LayerScheme, backend: str
) -> None:
    conv, x = example
    layer = quantize(conv, scheme)
    out = layer(x)
    assert out.dtype == x.dtype
    batched = x.dim() == conv.weight.dim()
    rounded = rounded_samples(x) if batched else rounded_samples(x.unsqueeze(0))[0]
    # Rounded before it is padded: what padding adds are zeros or copies, which the rounding does not move.
    assert_same_numbers(out, float64_twin(layer)(rounded).detach())


@given(example=geometries())
def test_half_precision_weights_compute_in_float32(example: tuple[nn.Module, Tensor]) -> None:
    conv, x = example
    layer = quantize(conv, HALF)
    out = layer(x)
    assert out.dtype == x.dtype
    twin = copy.deepcopy(conv).half().float()
    assert layer.bias is None or torch.equal(layer.bias, conv.bias)
    if conv.bias is not None:
        twin.bias = conv.bias
    assert_same_numbers(out, twin(x.float()).detach())


@each_dimension
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_is_within_the_bound_of_two_roundings(spatial: int, symmetric: bool, backend: str) -> None:
    conv, x = conv_and_input(spatial, 3)
    layer = FACTORIES[spatial - 1](conv, symmetric=symmetric)
    assert isinstance(layer._quantized_weight, QuantizedTensor)
    weight = conv.weight.detach().double()
    per_sample, per_channel = (-1, 1, *[1] * spatial), (1, -1, *[1] * spatial)
    x_error = torch.ops.mono_quant.quantize_rows(x.flatten(1))[1].double().reshape(per_sample)
    w_error = layer._quantized_weight.scale.double() * (0.5 if symmetric else 1.0)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spatial - 1]
    bound = convolve(x.abs().double(), torch.ones_like(weight)) * w_error.reshape(per_channel)
    bound = bound + x_error * weight.abs().flatten(1).sum(1).reshape(per_channel)
    bound = bound + x_error * w_error.reshape(per_channel) * weight[0].numel()
    exact = conv.double()(x.double())
    assert ((layer(x).double() - exact).abs() <= bound * 1.001 + 1e-6).all()


@each_dimension
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, HALF], ids=case_id)
def test_the_noise_is_far_below_the_signal(spatial: int, scheme: LayerScheme, backend: str) -> None:
    conv = CONVS[spatial - 1](16, 8, 3, padding=1)
    x = torch.randn(2, 16, *(9, 8, 7)[:spatial])
    assert sqnr(conv(x), quantize(conv, scheme)(x)) > 36


@each_dimension
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sample_does_not_depend_on_the_other_samples(spatial: int, symmetric: bool, backend: str) -> None:
    conv, x = conv_and_input(spatial, 5)
    layer = FACTORIES[spatial - 1](conv, symmetric=symmetric)
    x = x * torch.logspace(-3, 3, 5).reshape(-1, 1, *[1] * spatial)
    together = layer(x)
    for sample in range(5):
        assert torch.equal(layer(x[sample : sample + 1])[0], together[sample])
        assert torch.equal(layer(x[sample]), together[sample])


@each_dimension
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sample_that_is_not_finite_comes_out_nan_and_harms_no_other(
    spatial: int, symmetric: bool, value: float, backend: str
) -> None:
    conv, clean = conv_and_input(spatial, 3)
    layer = FACTORIES[spatial - 1](conv, symmetric=symmetric)
    x = clean.clone()
    x[1].view(-1)[7] = value
    out, expected = layer(x), layer(clean)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@each_dimension
@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_of_every_size_come_out_right(spatial: int, symmetric: bool, backend: str) -> None:
    conv, x = conv_and_input(spatial, 2)
    with torch.no_grad():
        conv.weight[0] = 0.0
        conv.weight[1] = 0.25
        conv.weight[2] *= 1e-41
        conv.weight[3] *= 1e-30
        conv.weight[4] = conv.weight[4].sign() * 1e30
        conv.weight[5].abs_()
    layer = FACTORIES[spatial - 1](conv, symmetric=symmetric)
    out = layer(x)
    assert torch.equal(out[:, 0], layer.bias[0].expand_as(out[:, 0]))
    expected = float64_twin(layer)(rounded_samples(x)).detach()
    # Channel by channel: the largest must not hide the others.
    for channel in range(6):
        assert_same_numbers(out[:, channel], expected[:, channel])


@each_dimension
def test_a_state_of_channels_last_changes_nothing(spatial: int, backend: str) -> None:
    conv, x = conv_and_input(spatial, 2)
    layer = FACTORIES[spatial - 1](conv)
    expected = layer(x)
    if spatial > 1:
        layer.to(memory_format=torch.channels_last if spatial == 2 else torch.channels_last_3d)
    assert torch.equal(layer(x), expected)
    assert layer(x).is_contiguous()


@each_dimension
def test_the_result_is_still_pytorchs_type_and_reads_as_one(spatial: int) -> None:
    conv = CONVS[spatial - 1](4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular")
    layer = FACTORIES[spatial - 1](conv)
    assert type(layer) is QUANTIZED[spatial - 1]
    assert isinstance(layer, CONVS[spatial - 1])
    assert isinstance(layer, QuantizedModule)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "padding_mode", "transposed", "output_padding"):  # fmt: skip
        assert getattr(layer, name) == getattr(conv, name)
    assert layer.weight.dtype == torch.float32
    assert layer.codes.dtype == torch.int8
    assert layer.weight_scale is not None
    assert layer.weight_scale.shape == (6, *[1] * (spatial + 1))
    assert repr(layer).startswith(f"QuantizedConv{spatial}d(4, 6, kernel_size=")
    assert repr(layer).endswith("int8 dynamic, asymmetric, channels)")


@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_the_way_back_keeps_the_geometry(padding: int | str, padding_mode: Any) -> None:
    conv = nn.Conv2d(2, 4, (3, 2), padding=padding, padding_mode=padding_mode, groups=2, bias=False)
    layer = quantize_conv2d_module(conv)
    back = layer.to_float()
    assert type(back) is nn.Conv2d
    x = torch.randn(1, 2, 8, 9)
    assert back(x).shape == conv(x).shape
    assert sqnr(conv(x), back(x)) > 30
    assert repr(back) == repr(conv)


@each_dimension
def test_the_constructor_makes_a_layer_of_zeros(spatial: int) -> None:
    _, x = conv_and_input(spatial, 2)
    layer = QUANTIZED[spatial - 1](4, 6, 3, stride=2, padding=1, groups=2, symmetric=True)
    assert layer.scheme == SYMMETRIC
    assert torch.equal(layer.weight, torch.zeros(6, 2, *[3] * spatial))
    twin = CONVS[spatial - 1](4, 6, 3, stride=2, padding=1, groups=2)
    assert torch.equal(layer(x), torch.zeros_like(twin(x)))
    source = FACTORIES[spatial - 1](twin, symmetric=True)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
    assert QUANTIZED[spatial - 1](4, 6, 3, dtype=torch.float16, bias=False).codes.dtype == torch.float16


@each_dimension
def test_inputs_that_do_not_fit_are_named(spatial: int, backend: str) -> None:
    conv, x = conv_and_input(spatial, 2)
    for scheme in (SYMMETRIC, HALF):
        layer = quantize(conv, scheme)
        with pytest.raises(InputError, match=rf"QuantizedConv{spatial}d expects \[batch, 4"):
            layer(x[:, :3])
        with pytest.raises(InputError, match="found"):
            layer(x[0, 0])
        with pytest.raises(InputError, match="found"):
            layer(x.unsqueeze(0).unsqueeze(0))
        with pytest.raises(InputError, match="reaches over 3 positions"):
            layer(x[..., :2])


def test_transposed_convolutions_are_left_alone() -> None:
    for transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        assert counterpart(transposed(2, 2, 2)) is None
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Conv2d, found ConvTranspose2d"):
        quantize_conv2d_module(nn.ConvTranspose2d(2, 2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("lazy", [nn.LazyConv1d, nn.LazyConv2d, nn.LazyConv3d])
def test_lazy_convolutions_are_an_error_until_they_have_run(lazy: Any) -> None:
    layer = lazy(4, 3)
    assert counterpart(layer) is None
    with pytest.raises(QuantizationError, match="not initialised"):
        FACTORIES[CONVS.index(layer.cls_to_become)](layer)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0)])
def test_an_empty_weight_is_an_error_as_in_pytorch(inputs: int, outputs: int) -> None:
    conv = nn.Conv2d(inputs, outputs, 3)
    reason = QuantizedConv2d.unsupported_reason(conv)
    assert reason is not None
    assert "empty" in reason
    with pytest.raises(QuantizationError, match="its weight is empty"):
        quantize_conv2d_module(conv)


def test_other_modules_and_dtypes_are_refused() -> None:
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Conv2d, found Linear"):
        quantize_conv2d_module(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Conv1d, found Conv2d"):
        quantize_conv1d_module(nn.Conv2d(2, 2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="bfloat16"):
        quantize_conv3d_module(nn.Conv3d(2, 2, 2), dtype=torch.bfloat16)
