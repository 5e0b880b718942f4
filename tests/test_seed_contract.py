"""The contract that this project started from, one test for each of its sentences."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant import ops
from mono_quant.core import (
    AsymmetricScheme,
    SymmetricScheme,
    calculate_scale_zp_groupwise,
    calculate_scale_zp_per_channel,
    calculate_scale_zp_per_tensor,
    dequantize_weight,
    dequantize_weight_int4,
    get_dtype_range,
    quantize_weight_fp16,
    quantize_weight_int4,
    quantize_weight_int8,
)
from mono_quant.modules import (
    QuantizedLinear,
    quantize_conv1d_module,
    quantize_conv2d_module,
    quantize_conv3d_module,
    quantize_embedding_bag_module,
    quantize_embedding_module,
    quantize_linear_module,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")

WEIGHT = torch.linspace(-1.5, 2.5, 6 * 10).reshape(6, 10)

CONVOLUTIONS = (
    (quantize_conv1d_module, nn.Conv1d, (2, 4, 12)),
    (quantize_conv2d_module, nn.Conv2d, (2, 4, 12, 10)),
    (quantize_conv3d_module, nn.Conv3d, (2, 4, 6, 5, 7)),
)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def cosine(first: Tensor, second: Tensor) -> float:
    similarity = F.cosine_similarity(first.detach().double().flatten(), second.detach().double().flatten(), dim=0)
    return float(similarity)


class TestMappersAndSchemes:
    def test_get_dtype_range_answers_the_codes_of_a_dtype(self) -> None:
        assert get_dtype_range(torch.qint8) == (-128, 127)
        assert get_dtype_range(torch.quint8) == (0, 255)

    def test_scale_and_zero_point_per_tensor_are_scalars(self) -> None:
        scale, zero_point = calculate_scale_zp_per_tensor(WEIGHT, dtype=torch.qint8, symmetric=False)
        assert scale.shape == zero_point.shape == ()

    def test_scale_and_zero_point_per_channel_have_one_entry_for_each_channel(self) -> None:
        for axis, channels in ((0, 6), (1, 10)):
            scale, zero_point = calculate_scale_zp_per_channel(WEIGHT, dtype=torch.qint8, symmetric=False, axis=axis)
            assert scale.shape == zero_point.shape == (channels,)

    def test_scale_and_zero_point_per_group_have_one_entry_for_each_group(self) -> None:
        scale, zero_point = calculate_scale_zp_groupwise(WEIGHT, group_size=5)
        assert scale.shape == zero_point.shape == (6, 2)

    def test_symmetric_parameters_have_zero_points_of_zero(self) -> None:
        assert calculate_scale_zp_per_tensor(WEIGHT, symmetric=True)[1] == 0
        assert not calculate_scale_zp_per_channel(WEIGHT, symmetric=True)[1].any()

    def test_the_default_is_asymmetric_qint8(self) -> None:
        by_default, in_words = (
            calculate_scale_zp_per_tensor(WEIGHT),
            calculate_scale_zp_per_tensor(WEIGHT, torch.qint8, False),
        )
        assert by_default == in_words
        assert by_default[1] != 0

    def test_both_schemes_calculate_per_tensor_and_per_axis(self) -> None:
        for scheme, symmetric in ((SymmetricScheme(), True), (AsymmetricScheme(), False)):
            assert scheme.calculate(WEIGHT) == calculate_scale_zp_per_tensor(WEIGHT, symmetric=symmetric)
            by_axis = scheme.calculate(WEIGHT, axis=1)
            wanted = calculate_scale_zp_per_channel(WEIGHT, symmetric=symmetric, axis=1)
            assert all(torch.equal(a, b) for a, b in zip(by_axis, wanted, strict=True))

    def test_float16_needs_neither_scale_nor_zero_point(self) -> None:
        assert calculate_scale_zp_per_tensor(WEIGHT, torch.float16) == (None, None)
        assert calculate_scale_zp_per_channel(WEIGHT, torch.float16) == (None, None)


class TestQuantizers:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_int8_answers_a_per_channel_affine_quantized_tensor(self, symmetric: bool, axis: int) -> None:
        quantized = quantize_weight_int8(WEIGHT, symmetric=symmetric, axis=axis)
        assert quantized.dtype == torch.qint8
        assert quantized.qscheme() == torch.per_channel_affine
        assert quantized.q_per_channel_axis() == axis
        assert quantized.int_repr().dtype == torch.int8
        assert quantized.shape == WEIGHT.shape

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_its_codes_agree_with_pytorchs_for_the_same_scale_and_zero_point(self, symmetric: bool) -> None:
        ours = quantize_weight_int8(WEIGHT, symmetric)
        theirs = torch.quantize_per_channel(
            WEIGHT, ours.q_per_channel_scales(), ours.q_per_channel_zero_points(), 0, torch.qint8
        )
        assert torch.equal(ours.int_repr(), theirs.int_repr())

    def test_fp16_casts(self) -> None:
        assert torch.equal(quantize_weight_fp16(WEIGHT), WEIGHT.to(torch.float16))

    def test_dequantize_brings_either_back_to_float32(self) -> None:
        for quantized in (quantize_weight_int8(WEIGHT), quantize_weight_fp16(WEIGHT)):
            restored = dequantize_weight(quantized)
            assert restored.dtype == torch.float32
            torch.testing.assert_close(restored, WEIGHT, atol=0.01, rtol=0)

    @pytest.mark.parametrize("other", [torch.zeros(2), torch.zeros(2, dtype=torch.int8), [1.0], None])
    def test_dequantize_refuses_anything_else_with_a_type_error(self, other: object) -> None:
        with pytest.raises(TypeError):
            dequantize_weight(other)

    def test_int4_is_packed_in_groups_and_comes_back(self) -> None:
        packed, scale, zero_point = quantize_weight_int4(WEIGHT, group_size=5)
        assert packed.dtype == torch.int32
        assert packed.shape == (6, 2)
        restored = dequantize_weight_int4(packed, scale, zero_point, group_size=5)
        assert bool(((restored - WEIGHT).abs() <= scale.repeat_interleave(5, dim=1) * 0.5001).all())


@pytest.mark.usefixtures("backend")
class TestLinear:
    def make(self, bias: bool = True) -> nn.Linear:
        return nn.Linear(48, 24, bias=bias)

    def test_a_new_layer_has_the_shape_it_is_asked_for(self) -> None:
        layer = QuantizedLinear(48, 24, bias=True, dtype=torch.qint8, symmetric=False)
        assert layer(torch.randn(5, 48)).shape == (5, 24)
        assert (layer.in_features, layer.out_features) == (48, 24)
        assert QuantizedLinear(48, 24, bias=False).bias is None

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_from_linear_computes_what_the_float_layer_does(self, symmetric: bool) -> None:
        linear, x = self.make(), torch.randn(5, 48)
        assert cosine(QuantizedLinear.from_linear(linear, symmetric=symmetric)(x), linear(x)) > 0.999

    def test_the_quantized_weight_is_cached(self) -> None:
        linear = self.make()
        layer = QuantizedLinear.from_linear(linear)
        assert layer._quantized_weight.dtype == torch.qint8
        assert layer._quantized_weight.qscheme() == torch.per_channel_affine
        assert layer._quantized_weight.int_repr().data_ptr() == layer._quantized_weight.int_repr().data_ptr()

    def test_the_weight_is_readable_as_floats(self) -> None:
        linear = self.make()
        layer = quantize_linear_module(linear)
        assert layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight, linear.weight.detach(), atol=0.002, rtol=0)
        assert torch.equal(layer.weight, dequantize_weight(layer._quantized_weight))

    def test_the_bias_is_kept_in_float(self) -> None:
        linear = self.make()
        layer = quantize_linear_module(linear)
        assert torch.equal(layer.bias, linear.bias.detach())
        assert layer.bias.dtype == torch.float32

    def test_the_bias_is_a_copy(self) -> None:
        linear = self.make()
        layer = quantize_linear_module(linear)
        before = layer.bias.clone()
        with torch.no_grad():
            linear.bias.add_(1)
        assert torch.equal(layer.bias, before)

    def test_it_stores_int8_and_no_float_weight(self) -> None:
        state = quantize_linear_module(self.make(bias=False)).state_dict()
        assert state["weight"].dtype == torch.int8
        assert sum(tensor.nbytes for tensor in state.values()) < 24 * 48 * 2

    def test_it_computes_in_int8(self) -> None:
        # The result is that of integer products of quantized rows, not that of float products.
        linear, x = self.make(), torch.randn(5, 48)
        layer = quantize_linear_module(linear, symmetric=True)
        codes, scale, zero_point = torch.ops.mono_quant.quantize_rows(x)
        integers = (codes.long() - zero_point[:, None]) @ layer._quantized_weight.int_repr().long().t()
        expected = integers.float() * scale[:, None] * layer._quantized_weight.scale + linear.bias.detach()
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(layer(x), F.linear(x, layer.weight, linear.bias))

    def test_float16_is_stored_and_float32_computed(self) -> None:
        linear, x = self.make(), torch.randn(5, 48)
        layer = quantize_linear_module(linear, dtype=torch.float16)
        assert layer.state_dict()["weight"].dtype == torch.float16
        torch.testing.assert_close(layer(x), F.linear(x, linear.weight.half().float(), linear.bias))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 48), (2, 1, 3, 48), (0, 48), (2, 0, 48)])
    def test_inputs_of_any_rank_and_dtype_keep_both(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        answer = quantize_linear_module(self.make())(torch.randn(shape).to(dtype))
        assert answer.dtype == dtype
        assert answer.shape == (*shape[:-1], 24)

    def test_non_contiguous_inputs_work(self) -> None:
        layer, x = quantize_linear_module(self.make()), torch.randn(48, 7)
        assert torch.equal(layer(x.t()), layer(x.t().contiguous()))

    @pytest.mark.parametrize("other", [nn.Conv2d(1, 1, 1), nn.ReLU(), "linear"])
    def test_other_modules_are_a_type_error(self, other: object) -> None:
        with pytest.raises(TypeError):
            quantize_linear_module(other)  # type: ignore[arg-type]


@pytest.mark.usefixtures("backend")
class TestConvolutions:
    @pytest.mark.parametrize(("factory", "float_type", "shape"), CONVOLUTIONS)
    def test_the_result_is_still_a_convolution_and_reads_as_one(
        self, factory: object, float_type: type[nn.Module], shape: tuple[int, ...]
    ) -> None:
        conv = float_type(4, 6, 3, stride=2, padding=1, groups=2)
        quantized = factory(conv)  # type: ignore[operator]
        assert isinstance(quantized, float_type)
        assert quantized.weight.dtype == torch.float32
        torch.testing.assert_close(quantized.weight, conv.weight.detach(), atol=0.01, rtol=0)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(quantized, name) == getattr(conv, name)

    @pytest.mark.parametrize(("factory", "float_type", "shape"), CONVOLUTIONS)
    def test_it_stores_int8(self, factory: object, float_type: type[nn.Module], shape: tuple[int, ...]) -> None:
        state = factory(float_type(4, 6, 3)).state_dict()  # type: ignore[operator]
        assert state["weight"].dtype == torch.int8
        assert "weight_scale" in state

    @pytest.mark.parametrize(("factory", "float_type", "shape"), CONVOLUTIONS)
    @pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
    def test_groups_dilation_and_every_padding_mode_work(
        self, factory: object, float_type: type[nn.Module], shape: tuple[int, ...], mode: str
    ) -> None:
        conv = float_type(4, 6, 3, padding=1, groups=2, dilation=2, padding_mode=mode)
        x = torch.randn(shape)
        answer = factory(conv)(x)  # type: ignore[operator]
        assert answer.shape == conv(x).shape
        assert cosine(answer, conv(x)) > 0.999

    @pytest.mark.parametrize("padding", ["same", "valid"])
    def test_string_padding_works(self, padding: str) -> None:
        conv, x = nn.Conv2d(4, 6, (3, 5), padding=padding), torch.randn(2, 4, 9, 9)
        assert cosine(quantize_conv2d_module(conv)(x), conv(x)) > 0.999

    def test_it_computes_in_int8(self) -> None:
        conv, x = nn.Conv2d(4, 6, 3, bias=False), torch.randn(1, 4, 8, 8)
        layer = quantize_conv2d_module(conv, symmetric=True)
        codes, scale, zero_point = torch.ops.mono_quant.quantize_rows(x.flatten(1))
        integers = F.conv2d((codes.double() - zero_point).reshape(x.shape), layer._quantized_weight.int_repr().double())
        expected = integers.float() * scale * layer._quantized_weight.scale.reshape(1, -1, 1, 1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("backend")
class TestEmbeddings:
    def test_an_embedding_looks_up_int8_rows(self) -> None:
        table, indices = nn.Embedding(20, 16), torch.randint(0, 20, (3, 4))
        layer = quantize_embedding_module(table)
        assert layer.state_dict()["weight"].dtype == torch.int8
        assert torch.equal(layer(indices), layer.weight[indices])
        assert cosine(layer(indices), table(indices)) > 0.999

    @pytest.mark.parametrize("mode", ["sum", "mean", "max"])
    def test_a_bag_reduces_them(self, mode: str) -> None:
        bag, indices = nn.EmbeddingBag(20, 16, mode=mode), torch.randint(0, 20, (3, 4))
        layer = quantize_embedding_bag_module(bag)
        assert cosine(layer(indices), bag(indices)) > 0.999


FACTORIES = [
    pytest.param(lambda: nn.Linear(8, 4), quantize_linear_module, id="Linear"),
    pytest.param(lambda: nn.Conv1d(2, 4, 3), quantize_conv1d_module, id="Conv1d"),
    pytest.param(lambda: nn.Conv2d(2, 4, 3), quantize_conv2d_module, id="Conv2d"),
    pytest.param(lambda: nn.Conv3d(2, 4, 3), quantize_conv3d_module, id="Conv3d"),
    pytest.param(lambda: nn.Embedding(8, 4), quantize_embedding_module, id="Embedding"),
    pytest.param(lambda: nn.EmbeddingBag(8, 4), quantize_embedding_bag_module, id="EmbeddingBag"),
]


@pytest.mark.parametrize(("make", "factory"), FACTORIES)
class TestFactories:
    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
    def test_make_a_new_module_and_never_modify_the_original(
        self, make: object, factory: object, dtype: torch.dtype
    ) -> None:
        module = make()  # type: ignore[operator]
        before, kind = state_of(module), type(module)
        quantized = factory(module, dtype=dtype)  # type: ignore[operator]
        assert quantized is not module
        assert type(module) is kind
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        for mine in quantized.state_dict().values():
            for theirs in module.state_dict().values():
                assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()

    def test_take_a_module_in_half_precision_without_sharing_it(self, make: object, factory: object) -> None:
        module = make().half()  # type: ignore[operator]
        quantized = factory(module, dtype=torch.float16)  # type: ignore[operator]
        before = copy.deepcopy(quantized.state_dict())
        with torch.no_grad():
            module.weight.zero_()
        assert all(torch.equal(before[name], tensor) for name, tensor in quantized.state_dict().items())

    def test_refuse_a_weight_that_is_not_finite(self, make: object, factory: object) -> None:
        module = make()  # type: ignore[operator]
        with torch.no_grad():
            module.weight.view(-1)[3] = torch.nan
        with pytest.raises(RuntimeError, match="NaN"):
            factory(module)  # type: ignore[operator]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("make", [case.values[0] for case in FACTORIES], ids=[case.id for case in FACTORIES])
def test_a_quantized_layer_compiles_and_exports_without_a_graph_break(make: object) -> None:
    module = make()  # type: ignore[operator]
    factory = {type(case.values[0]()): case.values[1] for case in FACTORIES}[type(module)]
    layer = factory(module).eval()
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        x = torch.randint(0, 8, (2, 3))
    else:
        x = torch.randn(3, 8) if isinstance(module, nn.Linear) else torch.randn(2, 2, *[6] * len(module.kernel_size))
    expected = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    if ops.get_backend() == "reference":
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
