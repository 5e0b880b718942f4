"""Linear layers with packed or float16 weights and float arithmetic, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import QuantizedTensor, pack_int32, quantize_weight_groupwise
from tests.ops.operands import (
    DTYPES,
    OPS,
    assert_rounded_from,
)


@pytest.mark.usefixtures("backend")
class TestWeightOnly:
    @given(
        shape=st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(1, 4), st.integers(1, 40)),
        bits=st.sampled_from([4, 8]), symmetric=st.booleans(), bias=st.booleans(), dtype=st.sampled_from(DTYPES),
    )  # fmt: skip
    def test_multiplies_with_the_dequantized_weight(
        self, shape: tuple[int, int, int, int], bits: int, symmetric: bool, bias: bool, dtype: torch.dtype
    ) -> None:
        m, n, groups, size = shape
        x, offset = torch.randn(m, groups * size).to(dtype), torch.randn(n) if bias else None
        quantized = quantize_weight_groupwise(torch.randn(n, groups * size), size, symmetric, bits)
        answer = OPS.linear_weight_only(
            x,
            pack_int32(quantized.codes, bits),
            quantized.scale,
            quantized.zero_point,
            offset,
            groups * size,
            bits,
            size,
        )
        assert answer.dtype == dtype
        self.assert_float_product(answer, x, quantized, offset)

    @given(
        m=st.integers(0, 4), n=st.integers(0, 30), k=st.integers(0, 80), bias=st.booleans(),
        dtype=st.sampled_from(DTYPES),
    )  # fmt: skip
    def test_half_multiplies_with_the_float16_weight(
        self, m: int, n: int, k: int, bias: bool, dtype: torch.dtype
    ) -> None:
        x, weight, offset = torch.randn(m, k).to(dtype), torch.randn(n, k).half(), torch.randn(n) if bias else None
        answer = OPS.linear_half(x, weight, offset)
        assert answer.dtype == dtype
        self.assert_float_product(answer, x, weight, offset)

    @staticmethod
    def assert_float_product(
        answer: Tensor, x: Tensor, weight: QuantizedTensor | Tensor, offset: Tensor | None
    ) -> None:
        values = weight.dequantize().double() if isinstance(weight, QuantizedTensor) else weight.double()
        bias = torch.zeros(values.shape[0]).double() if offset is None else offset.double()
        exact = x.double() @ values.t() + bias
        # The bound of a float32 sum in any order (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1).
        magnitude = x.double().abs() @ values.abs().t() + bias.abs()
        assert_rounded_from(answer, exact, magnitude * (x.shape[1] + 4) / 6)

    @pytest.mark.parametrize("shape", [(24,), (2, 24), (2, 3, 24), (1, 2, 1, 2, 24), (0, 24), (3, 0, 24)])
    def test_inputs_of_any_rank_and_no_rows(self, shape: tuple[int, ...]) -> None:
        quantized = quantize_weight_groupwise(torch.randn(7, 24), 8)
        packed = pack_int32(quantized.codes, 4)
        x = torch.randn(shape)
        for answer in (
            OPS.linear_weight_only(x, packed, quantized.scale, None, None, 24, 4, 8),
            OPS.linear_half(x, torch.randn(7, 24).half(), None),
        ):
            assert answer.shape == (*shape[:-1], 7)
            assert answer.is_contiguous()

    def test_without_inputs_the_answer_is_the_bias(self) -> None:
        bias = torch.randn(4)
        empty = torch.zeros(4, 0, dtype=torch.int32)
        for answer in (
            OPS.linear_weight_only(torch.randn(3, 0), empty, torch.ones(4, 0), None, bias, 0, 4, 1),
            OPS.linear_half(torch.randn(3, 0), torch.randn(4, 0).half(), bias),
        ):
            assert torch.equal(answer, bias.expand(3, 4))

    def test_inputs_of_any_strides(self) -> None:
        quantized = quantize_weight_groupwise(torch.randn(7, 24), 8)
        packed, half = pack_int32(quantized.codes, 4), torch.randn(7, 24).half()
        views = [
            torch.randn(24, 5).t(),
            torch.randn(5, 48)[:, ::2],
            torch.randn(1, 24).expand(5, 24),
            torch.randn(24, 1).t(),
        ]
        for x in views:
            answer = OPS.linear_weight_only(x, packed, quantized.scale, None, None, 24, 4, 8)
            self.assert_float_product(answer, x, quantized, None)
            self.assert_float_product(OPS.linear_half(x, half, None), x, half, None)
