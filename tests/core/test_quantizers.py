"""Weights to codes and back keep the promises about error, zero, sign and shape, whatever the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import (
    QuantizedTensor,
    dequantize_weight,
    dequantize_weight_int4,
    pack_int32,
    quantize_affine,
    quantize_weight_fp16,
    quantize_weight_groupwise,
    quantize_weight_int4,
    quantize_weight_int8,
    quantize_weight_int8_per_tensor,
)
from mono_quant.errors import ConfigurationError, InputError, InputTypeError, QuantizationError
from tests.core.strategies import (
    CHANNEL_KINDS,
    FLOAT_DTYPES,
    HUGE,
    arbitrary,
    channels,
    make_channel,
    typed_weights,
    ulp,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")

# Multiplying with the rounded inverse, as PyTorch's quantizers do, and rounding the product code * scale: each costs
# at most one spacing of the largest magnitude.
ROUNDINGS = 2


def assert_within_half_a_scale(weight: Tensor, quantized: QuantizedTensor) -> None:
    """``|w - dequantized| <= scale / 2`` up to float32 rounding at the channel's largest magnitude."""
    if quantized.axis is None:
        rows = weight.reshape(1, 1, -1)
        restored = quantized.dequantize().reshape(1, 1, -1)
        scale = quantized.scale.reshape(1, 1)
    else:
        groups = 1 if quantized.group_size is None else quantized.scale.shape[1]
        rows = weight.movedim(quantized.axis, 0).reshape(weight.shape[quantized.axis], groups, -1)
        restored = quantized.dequantize().movedim(quantized.axis, 0).reshape(rows.shape)
        scale = quantized.scale.reshape(rows.shape[:2])
    assert bool(torch.isfinite(restored).all())
    error = (rows.double() - restored.double()).abs().amax(-1)
    slack = ROUNDINGS * ulp(rows.abs().amax(-1))
    assert bool((error <= scale.double() / 2 + slack).all())


class TestErrorBound:
    @given(weight=weights(), symmetric=st.booleans(), data=st.data())
    def test_per_channel(self, weight: Tensor, symmetric: bool, data: st.DataObject) -> None:
        axis = data.draw(st.integers(-weight.dim(), weight.dim() - 1))
        assert_within_half_a_scale(weight, quantize_weight_int8(weight, symmetric, axis))

    @given(weight=typed_weights(), symmetric=st.booleans())
    def test_per_channel_of_every_float_dtype(self, weight: Tensor, symmetric: bool) -> None:
        assert_within_half_a_scale(weight, quantize_weight_int8(weight, symmetric))

    @given(weight=weights(), symmetric=st.booleans())
    def test_per_tensor(self, weight: Tensor, symmetric: bool) -> None:
        quantized = quantize_weight_int8_per_tensor(weight, symmetric)
        assert_within_half_a_scale(weight, quantized)
        assert bool((quantized.scale == quantized.scale[0]).all())

    @given(rows=st.integers(1, 4), groups=st.integers(1, 4), size=st.integers(1, 9), data=st.data())
    def test_per_group(self, rows: int, groups: int, size: int, data: st.DataObject) -> None:
        kinds = data.draw(st.lists(st.sampled_from(CHANNEL_KINDS), min_size=rows * groups, max_size=rows * groups))
        symmetric, bits = data.draw(st.booleans()), data.draw(st.sampled_from([4, 8]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        weight = torch.stack([make_channel(kind, size, generator) for kind in kinds]).reshape(rows, groups * size)
        quantized = quantize_weight_groupwise(weight, size, symmetric, bits)
        assert quantized.scale.shape == (rows, groups)
        assert_within_half_a_scale(weight, quantized)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("kind", CHANNEL_KINDS)
    def test_each_kind_of_channel(self, kind: str, symmetric: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.stack([make_channel(kind, 300, generator) for _ in range(5)])
        assert_within_half_a_scale(weight, quantize_weight_int8(weight, symmetric))

    def test_values_between_two_codes_go_to_the_nearer(self) -> None:
        weight = torch.tensor([[127.0, 0.49, 0.51, -0.49, -0.51, 0.5, 1.5, -0.5, -1.5, 2.5]])
        quantized = quantize_weight_int8(weight, symmetric=True)
        assert quantized.scale.item() == 1.0
        assert quantized.codes[0].tolist() == [127, 0, 1, 0, -1, 0, 2, 0, -2, 2]

    def test_values_beyond_float32_are_refused_and_not_turned_into_infinity(self) -> None:
        with pytest.raises(QuantizationError):
            quantize_weight_int8(torch.tensor([[1e300, 1.0]], dtype=torch.float64))


class TestZeroAndSign:
    @given(weight=weights(), symmetric=st.booleans(), data=st.data())
    def test_zero_is_kept_exactly(self, weight: Tensor, symmetric: bool, data: st.DataObject) -> None:
        mask = torch.rand(weight.shape) < data.draw(st.sampled_from([0.1, 0.5, 1.0]))
        weight = weight.masked_fill(mask, 0.0)
        assert bool((quantize_weight_int8(weight, symmetric).dequantize()[weight == 0] == 0).all())
        assert bool((quantize_weight_int8_per_tensor(weight, symmetric).dequantize()[weight == 0] == 0).all())

    @given(weight=channels())
    def test_zero_is_kept_exactly_in_groups_of_four_bits(self, weight: Tensor) -> None:
        weight = weight.masked_fill(torch.rand(weight.shape) < 0.5, 0.0)
        for symmetric in (True, False):
            restored = quantize_weight_groupwise(weight, weight.shape[1], symmetric).dequantize()
            assert bool((restored[weight == 0] == 0).all())

    @given(weight=weights())
    def test_negating_a_weight_negates_its_symmetric_codes(self, weight: Tensor) -> None:
        there, back = quantize_weight_int8(weight, symmetric=True), quantize_weight_int8(-weight, symmetric=True)
        assert torch.equal(there.codes, -back.codes)
        assert torch.equal(there.scale, back.scale)
        assert int(there.codes.min()) >= -127

    def test_symmetric_codes_are_symmetric_under_any_given_scale(self) -> None:
        weight = torch.tensor([[-1000.0, 1000.0, -1.0]])
        assert quantize_affine(weight, torch.ones(1), None).codes.tolist() == [[-127, 127, -1]]
        assert quantize_affine(weight, torch.ones(1), torch.zeros(1)).codes.tolist() == [[-128, 127, -1]]
        narrow = quantize_affine(weight, torch.ones(1, 1), None, group_size=3, bits=4)
        assert narrow.codes.tolist() == [[-7, 7, -1]]

    @given(weight=weights(), symmetric=st.booleans())
    def test_scaling_by_a_power_of_two_changes_no_code(self, weight: Tensor, symmetric: bool) -> None:
        weight = weight.clamp(-1e30, 1e30)
        weight = torch.where(weight.abs() < 1e-20, 0.0, weight)
        codes = quantize_weight_int8(weight, symmetric).codes
        assert torch.equal(codes, quantize_weight_int8(weight * 64, symmetric).codes)

    @given(weight=channels(), symmetric=st.booleans())
    def test_channels_do_not_influence_each_other(self, weight: Tensor, symmetric: bool) -> None:
        together = quantize_weight_int8(weight, symmetric)
        for index in range(weight.shape[0]):
            alone = quantize_weight_int8(weight[index : index + 1], symmetric)
            assert torch.equal(alone.codes[0], together.codes[index])
            assert alone.scale[0] == together.scale[index]


class TestAgreementWithPyTorch:
    @given(weight=arbitrary(min_dims=1, max_dims=4), symmetric=st.booleans(), data=st.data())
    def test_per_channel_codes(self, weight: Tensor, symmetric: bool, data: st.DataObject) -> None:
        axis = data.draw(st.integers(0, weight.dim() - 1))
        ours = quantize_weight_int8(weight, symmetric, axis)
        theirs = torch.quantize_per_channel(
            weight, ours.q_per_channel_scales(), ours.q_per_channel_zero_points(), axis, torch.qint8
        )
        assert torch.equal(ours.int_repr(), theirs.int_repr())

    @given(weight=channels(max_length=100), symmetric=st.booleans())
    def test_per_channel_codes_of_long_channels(self, weight: Tensor, symmetric: bool) -> None:
        ours = quantize_weight_int8(weight, symmetric)
        theirs = torch.quantize_per_channel(
            weight, ours.q_per_channel_scales(), ours.q_per_channel_zero_points(), 0, torch.qint8
        )
        assert torch.equal(ours.int_repr(), theirs.int_repr())
        # PyTorch lets the outermost code run over into infinity.
        restored = theirs.dequantize().clamp(-HUGE, HUGE)
        torch.testing.assert_close(ours.dequantize(), restored, rtol=2e-7, atol=0)

    @given(weight=weights(), scale=st.floats(2**-10, 2**10, width=32), zero_point=st.integers(-128, 127))
    def test_per_tensor_codes(self, weight: Tensor, scale: float, zero_point: int) -> None:
        # Beyond int32 the conversion of PyTorch's own quantizer is undefined.
        weight = weight.clamp(-1e5, 1e5)
        ours = quantize_affine(weight, torch.tensor(scale), torch.tensor(zero_point), axis=None)
        theirs = torch.quantize_per_tensor(weight, scale, zero_point, torch.qint8)
        assert torch.equal(ours.int_repr(), theirs.int_repr())
        assert ours.q_scale() == theirs.q_scale()
        assert ours.q_zero_point() == theirs.q_zero_point()


class TestShapes:
    @pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 0), (2, 0, 3), (4, 3, 0, 0)])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_nothing_becomes_nothing(self, shape: tuple[int, ...], symmetric: bool) -> None:
        for quantized in (
            quantize_weight_int8(torch.empty(shape), symmetric),
            quantize_weight_int8_per_tensor(torch.empty(shape), symmetric),
        ):
            assert quantized.codes.shape == shape
            assert quantized.scale.shape == shape[:1]
            assert bool(torch.isfinite(quantized.scale).all())
            assert quantized.dequantize().shape == shape
        assert quantize_weight_fp16(torch.empty(shape)).shape == shape

    @given(weight=arbitrary(min_dims=2), data=st.data())
    def test_non_contiguous_weights_have_the_codes_of_contiguous_ones(
        self, weight: Tensor, data: st.DataObject
    ) -> None:
        order = data.draw(st.permutations(range(weight.dim())))
        view = weight.permute(order)
        plain, strided = quantize_weight_int8(view.contiguous()), quantize_weight_int8(view)
        assert torch.equal(plain.codes, strided.codes)
        assert strided.codes.is_contiguous()

    @given(weight=arbitrary(min_dims=1), data=st.data())
    def test_a_negative_axis_counts_from_the_end(self, weight: Tensor, data: st.DataObject) -> None:
        axis = data.draw(st.integers(0, weight.dim() - 1))
        positive = quantize_weight_int8(weight, axis=axis)
        negative = quantize_weight_int8(weight, axis=axis - weight.dim())
        assert torch.equal(positive.codes, negative.codes)
        assert negative.q_per_channel_axis() == axis

    def test_a_weight_that_requires_grad_is_quantized_without_a_graph(self) -> None:
        weight = torch.nn.Parameter(torch.randn(3, 4))
        quantized = quantize_weight_int8(weight)
        assert not quantized.scale.requires_grad
        assert not quantized.dequantize().requires_grad
        assert not quantize_weight_fp16(weight).requires_grad


class TestInt4:
    @given(out_features=st.integers(1, 5), groups=st.integers(1, 4), size=st.integers(1, 20), symmetric=st.booleans())
    def test_packed_weights_come_back(self, out_features: int, groups: int, size: int, symmetric: bool) -> None:
        weight = torch.randn(out_features, groups * size)
        packed, scale, zero_point = quantize_weight_int4(weight, size, symmetric)
        assert packed.dtype == torch.int32
        assert packed.shape == (out_features, -(-groups * size // 8))
        assert scale.shape == zero_point.shape == (out_features, groups)
        assert zero_point.dtype == torch.int8
        quantized = quantize_weight_groupwise(weight, size, symmetric)
        assert torch.equal(packed, pack_int32(quantized.codes, 4))
        assert torch.equal(dequantize_weight_int4(packed, scale, zero_point, size), quantized.dequantize())

    @given(weight=channels(min_length=2))
    def test_symmetric_codes_are_symmetric(self, weight: Tensor) -> None:
        codes = quantize_weight_groupwise(weight, weight.shape[1]).codes
        assert int(codes.min()) >= -7
        assert int(codes.max()) <= 7

    def test_further_dimensions_count_as_inputs(self) -> None:
        weight = torch.randn(6, 4, 3, 3)
        assert torch.equal(quantize_weight_int4(weight, 12)[0], quantize_weight_int4(weight.flatten(1), 12)[0])

    @pytest.mark.parametrize("group_size", [0, -4, 5, 64])
    def test_a_group_size_that_does_not_divide_is_refused(self, group_size: int) -> None:
        with pytest.raises(ConfigurationError, match=f"group_size={group_size}"):
            quantize_weight_int4(torch.randn(2, 32), group_size)

    @pytest.mark.parametrize("bits", [2, 3, 16])
    def test_other_widths_are_refused(self, bits: int) -> None:
        with pytest.raises(ConfigurationError, match=f"bits={bits}"):
            quantize_weight_groupwise(torch.randn(2, 32), 16, bits=bits)


class TestFloat16:
    @given(weight=channels())
    def test_casts(self, weight: Tensor) -> None:
        weight = weight.clamp(-65504, 65504)
        half = quantize_weight_fp16(weight)
        assert half.dtype == torch.float16
        assert torch.equal(half, weight.half())
        assert torch.equal(dequantize_weight(half), weight.half().float())

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 65520.0, -1e6])
    def test_refuses_what_it_cannot_hold(self, value: float) -> None:
        with pytest.raises(QuantizationError, match=r"65,504"):
            quantize_weight_fp16(torch.tensor([[1.0, value]]))


class TestRefusals:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    @pytest.mark.parametrize(
        "quantize",
        [quantize_weight_int8, quantize_weight_int8_per_tensor, lambda w: quantize_weight_int4(w, 3)],
        ids=["per_channel", "per_tensor", "per_group"],
    )
    def test_nan_and_infinity(self, quantize: object, dtype: torch.dtype, value: float) -> None:
        weight = torch.randn(5, 6).to(dtype)
        weight[3, 4] = value
        with pytest.raises(QuantizationError, match="NaN or infinite"):
            quantize(weight)  # type: ignore[operator]

    @pytest.mark.parametrize(
        "wrong", [torch.arange(6).reshape(2, 3), torch.ones(2, 3, dtype=torch.bool), [[1.0]], None]
    )
    @pytest.mark.parametrize(
        "quantize",
        [quantize_weight_int8, quantize_weight_int8_per_tensor, quantize_weight_int4, quantize_weight_fp16],
    )
    def test_what_is_not_a_float_tensor(self, quantize: object, wrong: object) -> None:
        with pytest.raises(InputTypeError, match="expected a floating-point"):
            quantize(wrong)  # type: ignore[operator]

    @pytest.mark.parametrize("axis", [2, -3, 100])
    def test_an_axis_that_is_not_there(self, axis: int) -> None:
        with pytest.raises(InputError, match=f"axis {axis}"):
            quantize_weight_int8(torch.randn(2, 3), axis=axis)

    def test_a_scalar_has_no_channels(self) -> None:
        with pytest.raises(InputError):
            quantize_weight_int8(torch.tensor(1.0))
        with pytest.raises(InputError):
            quantize_weight_int8_per_tensor(torch.tensor(1.0))

    @pytest.mark.parametrize("wrong", [torch.randn(2), torch.ones(2, dtype=torch.int8), "weight", None, 1.0])
    def test_dequantizing_anything_else_is_a_type_error(self, wrong: object) -> None:
        with pytest.raises(TypeError) as caught:
            dequantize_weight(wrong)
        assert isinstance(caught.value, InputTypeError)

    def test_dequantizing_pytorchs_own_tensors_still_works(self) -> None:
        theirs = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 3, torch.qint8)
        assert torch.equal(dequantize_weight(theirs), theirs.dequantize())
