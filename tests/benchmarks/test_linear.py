"""What is timed side by side computes the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import linear
from mono_quant.ops.torch_cpu import integer_products_are_exact


def test_our_calls_answer_what_float32_does_up_to_quantization() -> None:
    calls = linear.engines(4, 64, 32)
    reference = calls[linear.BASELINE]()
    for name in ("torch bfloat16", "mono_quant int8", "mono_quant int8, bfloat16 in and out"):
        error = (calls[name]().float() - reference).norm() / reference.norm()
        assert error < 0.03, name


@pytest.mark.skipif(not integer_products_are_exact(), reason="oneDNN's 8-bit products saturate on this processor")
def test_the_two_bare_products_differ_by_the_zero_point_of_128_only() -> None:
    calls = linear.engines(4, 64, 32)
    signed, unsigned = calls["torch._int_mm alone"](), calls["onednn qlinear alone"]()
    # (codes - 128) @ w = codes @ w - 128 * column sums: the same row of differences for every input row.
    difference = unsigned - signed
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))
