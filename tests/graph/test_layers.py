"""Every layer of a static graph against its specification: fast and slow give the same codes."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.errors import CheckpointError, InputError
from mono_quant.graph.arithmetic import Activation, QParams, dequantize, memory_format, quantize
from mono_quant.graph.layers import KINDS
from mono_quant.graph.layers.aten import Call, CallSpec
from mono_quant.graph.layers.conv import ConvSpec, QuantizedConvolution
from mono_quant.graph.layers.elementwise import (
    Add,
    Dequantize,
    InputSpec,
    Multiply,
    OutputSpec,
    Quantize,
    TwoInputSpec,
    table_of,
)
from mono_quant.graph.layers.layer import Layer, build_layer
from mono_quant.graph.layers.linear import LinearSpec, StaticLinear
from mono_quant.graph.layers.spatial import (
    AveragePool,
    AveragePoolSpec,
    GlobalAverage,
    GlobalAverageSpec,
    MaxPool,
    MaxPoolSpec,
    Pad,
    PadSpec,
)
from mono_quant.ops.torch_cpu import integer_products_are_exact

SCALES = st.floats(1e-3, 1.0).map(lambda value: float(torch.tensor(value)))
QPARAMS = st.builds(QParams, SCALES, st.sampled_from([0, 1, 37, 128, 255]))
ACTIVATIONS = st.sampled_from(
    [Activation(), Activation("relu"), Activation("clamp", 0.0, 6.0), Activation("clamp", -1.0, 1.0),
     Activation("hardswish"), Activation("silu")]
)  # fmt: skip
CLAMPING = st.sampled_from([Activation(), Activation("relu"), Activation("clamp", 0.0, 6.0)])
SEEDS = st.integers(0, 2**31)


def codes(generator: torch.Generator, *shape: int) -> Tensor:
    drawn = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return drawn.contiguous(memory_format=memory_format(len(shape)))


def close_codes(found: Tensor, expected: Tensor) -> None:
    """Equal, but for values that lie between two codes up to the rounding of float32."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.dtype == torch.uint8:
        difference = (found.int() - expected.int()).abs()
        assert int(difference.max()) <= 1
        assert float((difference > 0).float().mean()) < 0.01 or int((difference > 0).sum()) <= 1
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[QuantizedConvolution, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    inputs = groups * draw(st.integers(1, 3))
    outputs = groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        inputs = outputs = groups  # depthwise
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride, padding, dilation = ([draw(st.integers(low, 2)) for _ in range(dims)] for low in (1, 0, 1))
    output = draw(st.none() | QPARAMS)
    adds = dims == 2 and output is not None and draw(st.booleans())
    other = draw(QPARAMS) if adds else None
    activation = draw(CLAMPING if adds else ACTIVATIONS)
    spec = ConvSpec(stride, padding, dilation, groups, draw(QPARAMS), output, other, activation)
    weight = torch.randint(-127, 128, (outputs, inputs // groups, *kernel), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator) * 0.02 + 1e-4
    bias = torch.randn(outputs, generator=generator) if draw(st.booleans()) else None
    x = codes(generator, draw(st.integers(1, 3)), inputs, *[draw(st.integers(5, 9)) for _ in range(dims)])
    layer = QuantizedConvolution(spec, weight, scale, bias)
    added = codes(generator, *layer.reference(x, None).shape) if adds and spec.other is not None else None
    return layer, x, added


@given(drawn=convolutions())
def test_convolutions_agree_with_their_specification(drawn: tuple[QuantizedConvolution, Tensor, Tensor | None]) -> None:
    layer, x, other = drawn
    expected = layer.reference(x, other)
    for _ in range(2):  # packing, and packed
        kept = None if other is None else other.clone()
        close_codes(layer(x, other), expected)
        if other is not None and kept is not None:
            assert torch.equal(other, kept), "what is added was written to without leave"
    assert layer(x[:0], None if other is None else other[:0]).shape[0] == 0


def test_a_convolution_may_write_into_what_it_adds_if_told_so() -> None:
    generator = torch.Generator().manual_seed(1)
    spec = ConvSpec([1, 1], [0, 0], [1, 1], 1, QParams(0.1, 3), QParams(0.0731, 0), QParams(0.1, 9), overwrite=True)
    layer = QuantizedConvolution(spec, torch.ones(4, 4, 1, 1, dtype=torch.int8), torch.full((4,), 0.1))
    x, other = codes(generator, 2, 4, 5, 5), codes(generator, 2, 4, 5, 5)
    expected = layer.reference(x, other)
    close_codes(layer(x, other), expected)


@given(seed=SEEDS, output=st.none() | QPARAMS, given_scale=QPARAMS, activation=ACTIVATIONS, bias=st.booleans())
def test_linears_agree_with_their_specification(
    seed: int, output: QParams | None, given_scale: QParams, activation: Activation, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (7, 20), generator=generator, dtype=torch.int8)
    scale = torch.rand(7, generator=generator) * 0.02 + 1e-4
    layer = StaticLinear(
        LinearSpec(given_scale, output, activation),
        weight,
        scale,
        torch.randn(7, generator=generator) if bias else None,
    )
    for shape in ((5, 20), (2, 3, 20), (1, 20)):
        x = codes(generator, *shape)
        close_codes(layer(x), layer.reference(x))
    assert layer(torch.zeros(0, 20, dtype=torch.uint8)).shape == (0, 7)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layers_obey_the_choice_of_backend(backend: str) -> None:
    spec = ConvSpec([1, 1], [1, 1], [1, 1], 1, QParams(0.1, 3), QParams(0.1, 0))
    layer = QuantizedConvolution(spec, torch.ones(4, 4, 3, 3, dtype=torch.int8), torch.full((4,), 0.1))
    with ops.use_backend(backend):
        layer(torch.zeros(1, 4, 5, 5, dtype=torch.uint8))
    packs = backend == "torch" and integer_products_are_exact()
    assert ("packed_weight" in dict(layer.named_buffers())) == packs


def packed_layers() -> list[tuple[Any, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made: list[tuple[Any, Tensor]] = []
    for dims, groups in ((1, 1), (2, 1), (2, 2), (2, 6), (3, 1)):
        spec = ConvSpec([1] * dims, [1] * dims, [1] * dims, groups, QParams(0.1, 3), QParams(0.1, 0))
        weight = torch.randint(-127, 128, (12, 6 // groups, *[3] * dims), generator=generator, dtype=torch.int8)
        layer = QuantizedConvolution(spec, weight, torch.rand(12, generator=generator), torch.randn(12))
        made.append((layer, codes(generator, 2, 6, *[7] * dims)))
    weight = torch.randint(-127, 128, (9, 33), generator=generator, dtype=torch.int8)
    linear = StaticLinear(LinearSpec(QParams(0.1, 3), None), weight, torch.rand(9, generator=generator))
    return [*made, (linear, codes(generator, 4, 33))]


@pytest.mark.parametrize("index", range(6))
def test_a_weight_is_held_once_and_reads_as_it_was(index: int) -> None:
    layer, x = packed_layers()[index]
    weight = layer.codes.clone()
    expected = layer(x)
    held = dict(layer.named_buffers()).keys() & {"weight", "packed_weight"}
    # Where oneDNN's products may saturate, nothing is packed for it.
    assert held == {"packed_weight" if integer_products_are_exact() else "weight"}
    assert torch.equal(layer.codes, weight)
    assert torch.equal(layer.state_dict()["weight"], weight)
    assert "packed_weight" not in layer.state_dict()
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(torch.float64).half()):
        assert torch.equal(same.codes, weight)
        assert same.weight_scale.dtype == torch.float32
        assert torch.equal(same(x), expected)
    changed = {**layer.state_dict(), "weight": -weight}
    layer.load_state_dict(changed)
    assert torch.equal(layer.codes, -weight)
    assert not torch.equal(layer(x), expected)


@given(
    seed=SEEDS, dims=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 1),
    dilation=st.integers(1, 2), ceil_mode=st.booleans(), size=st.integers(5, 20),
)  # fmt: skip
def test_max_pooling_is_exact(
    seed: int, dims: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool, size: int
) -> None:
    padding = min(padding, kernel // 2)
    x = codes(torch.Generator().manual_seed(seed), 2, 3, *[size] * (dims - 1), size + 3)
    layer = MaxPool(MaxPoolSpec([kernel] * dims, [stride] * dims, [padding] * dims, [dilation] * dims, ceil_mode))
    pool: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    expected = pool(x.float(), kernel, stride, padding, dilation, ceil_mode)
    found = layer(x)
    assert torch.equal(found.float(), expected)
    assert found.data_ptr() != x.data_ptr(), "a later step may write to the answer"


@given(
    seed=SEEDS, dims=st.integers(1, 3), kernel=st.integers(1, 3), padding=st.integers(0, 1), ceil_mode=st.booleans(),
    include=st.booleans(), given_scale=QPARAMS,
)  # fmt: skip
def test_average_pooling_is_off_by_half_a_step_at_most(
    seed: int, dims: int, kernel: int, padding: int, ceil_mode: bool, include: bool, given_scale: QParams
) -> None:
    padding = min(padding, kernel // 2)
    x = codes(torch.Generator().manual_seed(seed), 2, 3, *[9] * dims)
    spec = AveragePoolSpec([kernel] * dims, [2] * dims, [padding] * dims, ceil_mode, include, None, given_scale)
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    exact = pool(dequantize(x, given_scale), kernel, 2, padding, ceil_mode, include)
    found = dequantize(AveragePool(spec)(x), given_scale)
    assert float((found - exact).abs().max()) <= given_scale.scale * 0.501


@given(seed=SEEDS, dims=st.integers(1, 3), keepdim=st.booleans(), given_scale=QPARAMS)
def test_a_global_average_is_exact(seed: int, dims: int, keepdim: bool, given_scale: QParams) -> None:
    x = codes(torch.Generator().manual_seed(seed), 2, 5, *[7] * dims)
    exact = dequantize(x, given_scale).double().mean(list(range(2, dims + 2)), keepdim=keepdim)
    found = GlobalAverage(GlobalAverageSpec(given_scale, keepdim))(x)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * given_scale.scale * 255)


def test_the_mean_of_more_codes_than_an_int32_sum_holds_is_right() -> None:
    x = torch.full((1, 1, 2902, 2902), 255, dtype=torch.uint8)
    for keepdim in (True, False):
        found = GlobalAverage(GlobalAverageSpec(QParams(0.5, 5), keepdim))(x)
        assert found.flatten().tolist() == [125.0]


@given(seed=SEEDS, first=QPARAMS, second=QPARAMS, output=QPARAMS, gate=st.booleans())
def test_sums_and_products_are_rounded_once(
    seed: int, first: QParams, second: QParams, output: QParams, gate: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = codes(generator, 2, 5, 6, 6), codes(generator, 2, 5, *([1, 1] if gate else [6, 6]))
    x, y = dequantize(a, first).double(), dequantize(b, second).double()
    for kind, exact in ((Add, x + y), (Multiply, x * y)):
        expected = (torch.round(exact / output.scale) + output.zero_point).clamp(0, 255).to(torch.uint8)
        found = kind(TwoInputSpec(first, second, output))(a, b)
        close_codes(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


@given(given_scale=QPARAMS, output=QPARAMS)
def test_a_table_is_its_function_rounded_once(given_scale: QParams, output: QParams) -> None:
    everything = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    table = table_of(torch.sigmoid, given_scale, output)
    exact = torch.sigmoid(dequantize(everything, given_scale)) * (1 / output.scale)
    expected = (exact.round() + output.zero_point).clamp(0, 255).to(torch.uint8)
    found = table(everything)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@given(seed=SEEDS, output=QPARAMS, channels=st.integers(1, 6), batch=st.integers(0, 3))
def test_quantizing_rounds_to_the_nearest_code(seed: int, output: QParams, channels: int, batch: int) -> None:
    x = torch.randn(batch, channels, 5, 4, generator=torch.Generator().manual_seed(seed)) * 20
    found = quantize(x, output)
    assert found.is_contiguous(memory_format=torch.channels_last)
    low, high = (output.scale * (code - output.zero_point) for code in (0, 255))
    error = (dequantize(found, output) - x.clamp(low, high)).abs()
    assert bool((error <= output.scale * 0.5001 + 1e-6).all())
    assert torch.equal(Quantize(OutputSpec(output))(x), found)
    assert torch.equal(quantize(x.contiguous(memory_format=torch.channels_last), output), found)
    assert torch.equal(quantize(dequantize(found, output), output), found)


def test_zero_keeps_its_value() -> None:
    for zero_point in (0, 100, 255):
        qparams = QParams(0.37, zero_point)
        assert float(dequantize(quantize(torch.zeros(1), qparams), qparams)) == 0.0


def test_nan_is_refused_and_infinity_is_the_end_of_the_range() -> None:
    layer = Quantize(OutputSpec(QParams(0.1, 10)))
    with pytest.raises(InputError, match="NaN"):
        layer(torch.tensor([1.0, torch.nan]))
    assert layer(torch.tensor([torch.inf, -torch.inf])).tolist() == [255, 0]


def test_padding_is_with_the_code_of_zero() -> None:
    qparams = QParams(0.1, 77)
    x = codes(torch.Generator().manual_seed(0), 1, 2, 3, 3)
    found = Pad(PadSpec([0, 1, 2, 0], qparams))(x)
    torch.testing.assert_close(dequantize(found, qparams), F.pad(dequantize(x, qparams), [0, 1, 2, 0]))


def everything() -> list[Layer]:
    a, b = QParams(0.25, 3), QParams(0.5, 128)
    return [
        *(layer for layer, _ in packed_layers()),
        Add(TwoInputSpec(a, b, a)), Multiply(TwoInputSpec(a, b, a)), Quantize(OutputSpec(a)), Dequantize(InputSpec(b)),
        table_of(torch.tanh, a, b), GlobalAverage(GlobalAverageSpec(a, True)), Pad(PadSpec([1, 0], a)),
        AveragePool(AveragePoolSpec([2], [2], [0], False, True, None, a)),
        MaxPool(MaxPoolSpec([2], [2], [0], [1], True)),
        Call(CallSpec("aten.add.Tensor", [{"input": 0}, {"constant": "c"}], {"alpha": 2}), c=torch.ones(3)),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(len(everything())))
def test_descriptions_are_json_and_rebuild_the_layer(index: int) -> None:
    layer = everything()[index]
    rebuilt = build_layer(json.loads(json.dumps(layer.describe())), KINDS)
    assert type(rebuilt) is type(layer)
    rebuilt.load_state_dict(layer.state_dict())
    assert rebuilt.describe() == layer.describe()
    assert rebuilt.spec == layer.spec


def test_calls_keep_constants_of_their_own() -> None:
    call = Call(CallSpec("aten.add.Tensor", [{"input": 0}, {"constant": "c"}], {}), c=torch.ones(3))
    for same in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        same.load_state_dict({"c": torch.full((3,), 5.0)})
        assert same(torch.zeros(3)).tolist() == [5.0] * 3
        assert call(torch.zeros(3)).tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "function",
    ["aten.from_file.default", "aten.add_.Tensor", "aten.set_.source_Storage", "os.system", "python.eval",
     "aten.nothing.x", "mono_quant.embedding.default", "aten.add.nothing"],
)  # fmt: skip
def test_a_checkpoint_can_name_only_pure_functions(function: str) -> None:
    with pytest.raises(CheckpointError, match="not a function that this version allows"):
        Call(CallSpec(function, [{"input": 0}], {}))
