"""QuantizedTensor answers to the accessors of PyTorch's quantized tensors with the same values."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import (
    QuantizedTensor,
    dequantize_weight,
    quantize_affine,
    quantize_weight_groupwise,
    quantize_weight_int8,
)
from mono_quant.errors import InputError
from tests.core.strategies import HUGE, arbitrary

pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")


def per_tensor(weight: Tensor, scale: float = 0.25, zero_point: int = 3) -> QuantizedTensor:
    return quantize_affine(weight, torch.tensor(scale), torch.tensor(zero_point), axis=None)


class TestAccessorsOfPyTorch:
    @given(weight=arbitrary(), symmetric=st.booleans(), data=st.data())
    def test_per_channel(self, weight: Tensor, symmetric: bool, data: st.DataObject) -> None:
        weight = weight.clamp(-1e6, 1e6)
        axis = data.draw(st.integers(0, weight.dim() - 1))
        ours = quantize_weight_int8(weight, symmetric, axis)
        theirs = torch.quantize_per_channel(
            weight, ours.q_per_channel_scales(), ours.q_per_channel_zero_points(), axis, torch.qint8
        )
        assert torch.equal(ours.int_repr(), theirs.int_repr())
        for name in ("q_per_channel_scales", "q_per_channel_zero_points"):
            mine, original = getattr(ours, name)(), getattr(theirs, name)()
            assert torch.equal(mine, original)
            assert mine.dtype == original.dtype
        assert ours.q_per_channel_axis() == theirs.q_per_channel_axis()
        assert ours.qscheme() == theirs.qscheme()
        assert ours.dtype == theirs.dtype == torch.qint8
        assert ours.is_quantized
        assert theirs.is_quantized
        assert ours.shape == theirs.shape
        assert ours.size() == theirs.size()
        assert ours.size(axis) == theirs.size(axis)
        assert (ours.dim(), ours.numel(), ours.device) == (theirs.dim(), theirs.numel(), theirs.device)
        torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=2e-7, atol=0)

    @given(weight=arbitrary(), scale=st.floats(2**-8, 2**8, width=32), zero_point=st.integers(-128, 127))
    def test_per_tensor(self, weight: Tensor, scale: float, zero_point: int) -> None:
        weight = weight.clamp(-1e4, 1e4)
        ours = per_tensor(weight, scale, zero_point)
        theirs = torch.quantize_per_tensor(weight, scale, zero_point, torch.qint8)
        assert ours.q_scale() == theirs.q_scale()
        assert ours.q_zero_point() == theirs.q_zero_point()
        assert ours.qscheme() == theirs.qscheme()
        assert torch.equal(ours.int_repr(), theirs.int_repr())
        assert torch.equal(ours.dequantize(), theirs.dequantize())


class TestDequantize:
    @given(weight=arbitrary(), symmetric=st.booleans())
    def test_torch_dequantize_accepts_it(self, weight: Tensor, symmetric: bool) -> None:
        quantized = quantize_weight_int8(weight, symmetric)
        assert torch.equal(torch.dequantize(quantized), quantized.dequantize())
        assert torch.equal(dequantize_weight(quantized), quantized.dequantize())

    def test_other_functions_of_torch_do_not(self) -> None:
        quantized = quantize_weight_int8(torch.randn(2, 3))
        with pytest.raises(TypeError):
            torch.add(quantized, 1)

    def test_is_code_minus_zero_point_times_scale(self) -> None:
        codes = torch.tensor([[1, -128, 127], [0, 5, -5]], dtype=torch.int8)
        scale, zero_point = torch.tensor([0.5, 2.0]), torch.tensor([-128, 5], dtype=torch.int8)
        quantized = QuantizedTensor(codes, scale, zero_point)
        assert quantized.dequantize().tolist() == [[64.5, 0.0, 127.5], [-10.0, 0.0, -20.0]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @given(weight=arbitrary(), symmetric=st.booleans())
    def test_rounds_once_to_the_dtype_that_is_asked_for(
        self, dtype: torch.dtype, weight: Tensor, symmetric: bool
    ) -> None:
        quantized = quantize_weight_int8(weight.clamp(-6e4, 6e4), symmetric)
        answer = quantized.dequantize(dtype)
        assert answer.dtype == dtype
        limit = min(torch.finfo(dtype).max, HUGE)
        assert torch.equal(answer, quantized.dequantize().clamp(-limit, limit).to(dtype))

    def test_stays_finite_at_the_edge_of_the_dtype(self) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            largest = torch.finfo(dtype).max
            weight = torch.tensor([[largest, -largest, largest / 3]], dtype=dtype)
            for symmetric in (True, False):
                restored = quantize_weight_int8(weight, symmetric).dequantize(dtype)
                assert bool(torch.isfinite(restored).all())

    def test_long_tensors_are_the_same_as_their_parts(self) -> None:
        # Longer than one block of the blockwise code.
        weight = torch.randn(3, 300_000)
        quantized = quantize_weight_int8(weight)
        for row in range(3):
            part = QuantizedTensor(
                quantized.codes[row : row + 1], quantized.scale[row : row + 1], quantized.zero_point[row : row + 1]
            )
            assert torch.equal(part.dequantize()[0], quantized.dequantize()[row])


class TestKinds:
    def test_asking_for_the_other_granularity_is_refused(self) -> None:
        by_channel, whole = quantize_weight_int8(torch.randn(2, 3)), per_tensor(torch.randn(2, 3))
        for name in ("q_scale", "q_zero_point"):
            with pytest.raises(InputError, match="per channel"):
                getattr(by_channel, name)()
        for name in ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"):
            with pytest.raises(InputError, match="per tensor"):
                getattr(whole, name)()

    def test_groups_have_no_qscheme(self) -> None:
        grouped = quantize_weight_groupwise(torch.randn(2, 8), 4)
        with pytest.raises(InputError, match="group-wise"):
            grouped.qscheme()
        assert grouped.q_per_channel_scales().shape == (2, 2)

    def test_symmetric_tensors_hold_no_zero_points_but_answer_zeros(self) -> None:
        quantized = quantize_weight_int8(torch.randn(2, 3), symmetric=True)
        assert quantized.symmetric
        assert quantized.zero_point is None
        assert quantized.q_per_channel_zero_points().tolist() == [0, 0]
        assert not quantize_weight_int8(torch.randn(2, 3)).symmetric

    def test_bytes_are_those_on_disk(self) -> None:
        assert quantize_weight_int8(torch.randn(10, 30), symmetric=True).nbytes == 300 + 40
        assert quantize_weight_int8(torch.randn(10, 30)).nbytes == 300 + 40 + 10
        assert quantize_weight_groupwise(torch.randn(10, 30), 10).nbytes == 150 + 120

    def test_is_frozen_and_copies(self) -> None:
        quantized = quantize_weight_int8(torch.randn(2, 3))
        with pytest.raises(dataclasses.FrozenInstanceError):
            quantized.axis = 1  # type: ignore[misc]
        for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), quantized.to("cpu")):
            assert torch.equal(other.dequantize(), quantized.dequantize())
            assert other.qscheme() == quantized.qscheme()
        assert copy.deepcopy(quantized).codes.data_ptr() != quantized.codes.data_ptr()

    def test_says_what_it_is(self) -> None:
        assert repr(quantize_weight_int8(torch.randn(2, 3))) == (
            "QuantizedTensor(shape=(2, 3), bits=8, axis=0, asymmetric)"
        )
        assert "group_size=4" in repr(quantize_weight_groupwise(torch.randn(2, 8), 4))
        assert "per tensor" in repr(per_tensor(torch.randn(2)))
