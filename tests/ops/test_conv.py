"""Convolutions of integers against exact arithmetic, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.operands import (
    DTYPES,
    ConvWeight,
    assert_rounded_from,
)

CONVOLUTIONS = [
    {"in_channels": 3, "out_channels": 5, "kernel": (3,), "padding": 1},
    {"in_channels": 4, "out_channels": 6, "kernel": (4,), "stride": 2, "dilation": 2, "groups": 2},
    {"in_channels": 3, "out_channels": 8, "kernel": (3, 3), "padding": 1},
    {"in_channels": 16, "out_channels": 16, "kernel": (1, 1)},
    {"in_channels": 8, "out_channels": 8, "kernel": (3, 3), "padding": 2, "stride": 2, "groups": 8},
    {"in_channels": 6, "out_channels": 9, "kernel": (2, 3), "dilation": 2, "groups": 3, "padding": 3},
    {"in_channels": 2, "out_channels": 4, "kernel": (3, 2, 1), "padding": 1, "stride": 2},
]


@pytest.mark.usefixtures("backend")
class TestConv:
    @pytest.mark.parametrize("arguments", CONVOLUTIONS)
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_integer_convolution_scaled(
        self, arguments: dict[str, object], symmetric: bool, dtype: torch.dtype
    ) -> None:
        weight = ConvWeight.random(**arguments, symmetric=symmetric)  # type: ignore[arg-type]
        spatial = [9, 8, 7][: len(weight.codes.shape) - 2]
        for batch, offset in ((1, 0.0), (3, 1.0)):
            x = (torch.randn(batch, arguments["in_channels"], *spatial) * 2 + offset).to(dtype)  # type: ignore[call-overload]
            answer = weight.convolve(x)
            assert answer.dtype == dtype
            assert_rounded_from(answer, *weight.exact(x))

    @settings(max_examples=12)
    @given(
        batch=st.integers(1, 3), groups=st.integers(1, 3), size=st.integers(3, 8), kernel=st.integers(1, 3),
        stride=st.integers(1, 3), padding=st.integers(0, 2), symmetric=st.booleans(), bias=st.booleans(),
    )  # fmt: skip
    def test_any_geometry(
        self, batch: int, groups: int, size: int, kernel: int, stride: int, padding: int, symmetric: bool, bias: bool
    ) -> None:
        weight = ConvWeight.random(
            2 * groups, 3 * groups, (kernel, kernel), stride=stride, padding=padding, groups=groups,
            symmetric=symmetric, bias=bias,
        )  # fmt: skip
        x = torch.randn(batch, 3 * groups, size, size + 1)
        assert_rounded_from(weight.convolve(x), *weight.exact(x))

    def test_padding_is_with_real_zeros(self) -> None:
        # All-positive input: its codes' zero point is 0 only because the range is widened; negative: it is 255.
        weight = ConvWeight(torch.ones(1, 1, 3, 3, dtype=torch.int8), torch.ones(1, 1, 1, 1), None, None, {
            "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
        })  # fmt: skip
        for value in (255.0, -255.0):
            answer = weight.convolve(torch.full((1, 1, 3, 3), value))
            assert (answer[0, 0] / value).tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]

    @pytest.mark.parametrize("zero_point", [None, 127])
    def test_long_sums_do_not_overflow(self, zero_point: int | None) -> None:
        for channels in (33_500, 66_600):
            shift = None if zero_point is None else torch.full((2, 1, 1), zero_point, dtype=torch.int8)
            weight = ConvWeight(
                torch.full((2, channels, 1), -128, dtype=torch.int8), torch.ones(2, 1, 1), shift, None,
                {"stride": [1], "padding": [0], "dilation": [1], "groups": 1},
            )  # fmt: skip
            answer = weight.convolve(torch.full((1, channels, 1), 255.0))
            expected = 255.0 * (-128 - (zero_point or 0)) * channels
            torch.testing.assert_close(answer, torch.full((1, 2, 1), expected), rtol=3e-7, atol=0)

    @pytest.mark.parametrize("batch", [0, 2])
    def test_empty_batches(self, batch: int) -> None:
        weight = ConvWeight.random(4, 3, (3, 3), padding=1)
        assert weight.convolve(torch.randn(batch, 3, 5, 6)).shape == (batch, 4, 5, 6)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_strides_make_no_difference(self, symmetric: bool) -> None:
        weight = ConvWeight.random(8, 6, (3, 3), padding=1, symmetric=symmetric)
        x = torch.randn(2, 6, 9, 10)
        expected = weight.convolve(x)
        for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(weight.convolve(view), expected)
        wide = torch.randn(4, 6, 9, 20)
        assert torch.equal(weight.convolve(wide[::2, :, :, ::2]), weight.convolve(wide[::2, :, :, ::2].contiguous()))
