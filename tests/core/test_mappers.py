"""Ranges to scales and zero points: values, shapes, dtypes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import (
    calculate_scale_zp_groupwise,
    calculate_scale_zp_per_channel,
    calculate_scale_zp_per_tensor,
    get_dtype_range,
)
from mono_quant.errors import ConfigurationError, InputError, InputTypeError, MonoQuantError, QuantizationError
from tests.core.strategies import TINY, arbitrary, channels, typed_weights, weights

TARGETS = (torch.qint8, torch.quint8, torch.int8, torch.uint8)
PER_SOMETHING = (calculate_scale_zp_per_tensor, calculate_scale_zp_per_channel, calculate_scale_zp_groupwise)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.qint8, (-128, 127)), (torch.int8, (-128, 127)), (torch.quint8, (0, 255)), (torch.uint8, (0, 255))],
)
def test_integer_dtypes_have_a_range(dtype: torch.dtype, expected: tuple[int, int]) -> None:
    assert get_dtype_range(dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.bool])
def test_other_dtypes_have_none(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigurationError, match=str(dtype)) as caught:
        get_dtype_range(dtype)
    assert isinstance(caught.value, ValueError)
    assert caught.value.suggestion


class TestValues:
    def test_symmetric_scale_is_the_largest_magnitude_over_127(self) -> None:
        scale, zero_point = calculate_scale_zp_per_tensor(torch.tensor([[-254.0, 3.0], [7.0, 127.0]]), symmetric=True)
        assert scale.item() == 2.0
        assert zero_point.item() == 0

    def test_asymmetric_scale_is_the_range_over_255(self) -> None:
        scale, zero_point = calculate_scale_zp_per_tensor(torch.tensor([-1.0, 4.0, 509.0]))
        assert scale.item() == 2.0
        assert zero_point.item() == -128  # round(-128 - -1 / 2), half to even

    def test_an_asymmetric_range_is_widened_to_hold_zero(self) -> None:
        scale, zero_point = calculate_scale_zp_per_channel(torch.tensor([[100.0, 255.0], [-255.0, -100.0]]))
        assert scale.tolist() == [1.0, 1.0]
        assert zero_point.tolist() == [-128, 127]

    def test_unsigned_codes_are_centred_on_128(self) -> None:
        scale, zero_point = calculate_scale_zp_per_tensor(torch.tensor([-127.0, 3.0]), torch.quint8, symmetric=True)
        assert (scale.item(), zero_point.item()) == (1.0, 128)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("value", [0.0, 1e-45, -1e-42])
    def test_a_range_too_small_for_a_scale_gets_the_smallest_normal_one(self, value: float, symmetric: bool) -> None:
        scale, _ = calculate_scale_zp_per_tensor(torch.full((3,), value), symmetric=symmetric)
        assert scale.item() == TINY

    @given(exponent=st.integers(-35, 37))
    def test_small_ranges_keep_their_own_scale(self, exponent: int) -> None:
        scale, _ = calculate_scale_zp_per_tensor(torch.tensor([10.0**exponent]), symmetric=True)
        assert scale.item() == pytest.approx(10.0**exponent / 127, rel=1e-6)

    @given(weight=weights(), dtype=st.sampled_from(TARGETS), symmetric=st.booleans())
    def test_zero_point_is_a_code_and_stands_for_zero(
        self, weight: Tensor, dtype: torch.dtype, symmetric: bool
    ) -> None:
        scale, zero_point = calculate_scale_zp_per_channel(weight, dtype, symmetric)
        low, high = get_dtype_range(dtype)
        assert low <= int(zero_point.min()) <= int(zero_point.max()) <= high
        assert bool((scale >= TINY).all())
        assert bool(torch.isfinite(scale).all())

    @given(weight=weights(), dtype=st.sampled_from(TARGETS), symmetric=st.booleans())
    def test_every_value_has_a_code(self, weight: Tensor, dtype: torch.dtype, symmetric: bool) -> None:
        scale, zero_point = calculate_scale_zp_per_tensor(weight, dtype, symmetric)
        low, high = get_dtype_range(dtype)
        position = weight.double() / scale.double() + zero_point.double()
        assert float(position.min()) >= low - 0.5001
        assert float(position.max()) <= high + 0.5001

    @given(weight=arbitrary(), symmetric=st.booleans(), data=st.data())
    def test_a_channel_has_the_scale_of_that_channel_alone(
        self, weight: Tensor, symmetric: bool, data: st.DataObject
    ) -> None:
        axis = data.draw(st.integers(-weight.dim(), weight.dim() - 1))
        scale, zero_point = calculate_scale_zp_per_channel(weight, symmetric=symmetric, axis=axis)
        assert scale.shape == zero_point.shape == (weight.shape[axis],)
        for index, channel in enumerate(weight.unbind(axis)):
            alone = calculate_scale_zp_per_tensor(channel, symmetric=symmetric)
            assert (scale[index].item(), zero_point[index].item()) == (alone[0].item(), alone[1].item())

    @given(weight=channels(), groups=st.integers(1, 3), symmetric=st.booleans(), bits=st.sampled_from([4, 8]))
    def test_a_group_has_the_scale_of_that_group_alone(
        self, weight: Tensor, groups: int, symmetric: bool, bits: int
    ) -> None:
        rows = torch.cat([weight * (1 + part / 8) for part in range(groups)], dim=1).clamp(-3e38, 3e38)
        size = weight.shape[1]
        scale, zero_point = calculate_scale_zp_groupwise(rows, size, symmetric=symmetric, bits=bits)
        assert scale.shape == zero_point.shape == (rows.shape[0], groups)
        for group in range(groups):
            part = rows[:, group * size : (group + 1) * size].contiguous()
            alone = calculate_scale_zp_groupwise(part, size, symmetric=symmetric, bits=bits)
            assert torch.equal(scale[:, group], alone[0][:, 0])
            assert torch.equal(zero_point[:, group], alone[1][:, 0])

    @given(weight=typed_weights(), symmetric=st.booleans())
    def test_parameters_are_float32_and_int32_for_every_input_dtype(self, weight: Tensor, symmetric: bool) -> None:
        for calculate in PER_SOMETHING:
            arguments = (1,) if calculate is calculate_scale_zp_groupwise else ()
            scale, zero_point = calculate(weight, *arguments, symmetric=symmetric)
            assert scale.dtype == torch.float32
            assert zero_point.dtype == torch.int32
            assert not scale.requires_grad

    @pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
    def test_empty_tensors_have_valid_parameters(self, shape: tuple[int, ...]) -> None:
        scale, zero_point = calculate_scale_zp_per_tensor(torch.empty(shape))
        assert (scale.item(), zero_point.shape) == (TINY, ())
        scale, _ = calculate_scale_zp_per_channel(torch.empty(shape))
        assert scale.tolist() == [TINY] * shape[0]
        if len(shape) > 1:
            scale, _ = calculate_scale_zp_groupwise(torch.empty(shape), 1)
            assert scale.shape == (shape[0], torch.Size(shape[1:]).numel())

    def test_a_group_may_be_cut_along_another_axis(self) -> None:
        weight = torch.randn(6, 4)
        moved = calculate_scale_zp_groupwise(weight, 3, axis=1)
        assert torch.equal(moved[0], calculate_scale_zp_groupwise(weight.t(), 3)[0])


class TestFloat16Target:
    @pytest.mark.parametrize("calculate", PER_SOMETHING)
    def test_needs_neither_scale_nor_zero_point(self, calculate: object) -> None:
        assert calculate(torch.randn(4, 128), dtype=torch.float16) == (None, None)  # type: ignore[operator]


class TestRefusals:
    @pytest.mark.parametrize("calculate", PER_SOMETHING)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16])
    def test_dtypes_without_codes(self, calculate: object, dtype: torch.dtype) -> None:
        with pytest.raises(ConfigurationError, match=str(dtype)):
            calculate(torch.randn(4, 128), dtype=dtype)  # type: ignore[operator]

    @pytest.mark.parametrize("calculate", PER_SOMETHING)
    @pytest.mark.parametrize("wrong", [torch.ones(2, 2, dtype=torch.int64), [[1.0]], None, torch.tensor([[1j]])])
    def test_what_is_not_a_float_tensor(self, calculate: object, wrong: object) -> None:
        with pytest.raises(InputTypeError) as caught:
            calculate(wrong)  # type: ignore[operator]
        assert isinstance(caught.value, TypeError)

    @pytest.mark.parametrize("calculate", PER_SOMETHING)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_nan_and_infinity(self, calculate: object, value: float, symmetric: bool) -> None:
        weight = torch.randn(2, 128)
        weight[1, 100] = value
        with pytest.raises(QuantizationError, match="NaN or infinite"):
            calculate(weight, symmetric=symmetric)  # type: ignore[operator]

    @pytest.mark.parametrize("axis", [2, -3])
    def test_an_axis_that_is_not_there(self, axis: int) -> None:
        for calculate in (calculate_scale_zp_per_channel, calculate_scale_zp_groupwise):
            with pytest.raises(InputError, match=f"axis {axis}"):
                calculate(torch.randn(2, 128), axis=axis)

    def test_groups_of_unsigned_codes_and_odd_widths(self) -> None:
        with pytest.raises(ConfigurationError, match="quint8"):
            calculate_scale_zp_groupwise(torch.randn(2, 128), dtype=torch.quint8)
        with pytest.raises(ConfigurationError, match="bits=5"):
            calculate_scale_zp_groupwise(torch.randn(2, 128), bits=5)

    @pytest.mark.parametrize("group_size", [0, -1, 3, 256])
    def test_group_sizes_that_do_not_divide(self, group_size: int) -> None:
        with pytest.raises(ConfigurationError, match=f"group_size={group_size}"):
            calculate_scale_zp_groupwise(torch.randn(2, 128), group_size)

    def test_a_vector_has_no_groups(self) -> None:
        with pytest.raises(MonoQuantError):
            calculate_scale_zp_groupwise(torch.randn(128))


@given(weight=typed_weights())
def test_the_tensor_is_not_modified(weight: Tensor) -> None:
    before = weight.clone()
    for symmetric in (True, False):
        calculate_scale_zp_per_tensor(weight, symmetric=symmetric)
        for parameter in calculate_scale_zp_per_channel(weight, symmetric=symmetric):
            parameter.fill_(5)
    assert torch.equal(weight, before)


def test_parameters_never_share_the_memory_of_a_vector() -> None:
    # Each element of a vector is its own channel, whose minimum and maximum are the element itself.
    vector = torch.tensor([1.0, 0.0, 0.0])
    for symmetric in (True, False):
        scale, _ = calculate_scale_zp_per_channel(vector, symmetric=symmetric)
        scale.fill_(9)
    assert vector.tolist() == [1.0, 0.0, 0.0]
