"""Look-ups in an int8 table, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant.core import quantize_weight_int8
from tests.ops.operands import (
    DTYPES,
    OPS,
)


@pytest.mark.usefixtures("backend")
class TestEmbedding:
    @given(
        rows_=st.integers(1, 20), columns=st.integers(0, 40), shape=st.lists(st.integers(0, 4), max_size=3),
        symmetric=st.booleans(), dtype=st.sampled_from(DTYPES), index_dtype=st.sampled_from([torch.int32, torch.int64]),
    )  # fmt: skip
    def test_looks_up_dequantized_rows(
        self, rows_: int, columns: int, shape: list[int], symmetric: bool, dtype: torch.dtype, index_dtype: torch.dtype
    ) -> None:
        quantized = quantize_weight_int8(torch.randn(rows_, columns), symmetric)
        zero_point = None if quantized.zero_point is None else quantized.zero_point[:, None]
        indices = torch.randint(0, rows_, shape, dtype=index_dtype)
        answer = OPS.embedding(indices, quantized.codes, quantized.scale[:, None], zero_point, dtype)
        assert answer.dtype == dtype
        assert torch.equal(answer, quantized.dequantize(dtype)[indices.long()])

    def test_indices_of_any_strides(self) -> None:
        quantized = quantize_weight_int8(torch.randn(10, 5), symmetric=True)
        indices = torch.randint(0, 10, (4, 6)).t()[::2]
        answer = OPS.embedding(indices, quantized.codes, quantized.scale[:, None], None, torch.float32)
        assert torch.equal(answer, quantized.dequantize()[indices])

    @pytest.mark.parametrize("index", [-1, 10, 2**40, -(2**40)])
    def test_an_index_out_of_range_is_refused(self, index: int) -> None:
        codes, scale = torch.zeros(10, 5, dtype=torch.int8), torch.ones(10, 1)
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            OPS.embedding(torch.tensor([0, index]), codes, scale, None, torch.float32)
