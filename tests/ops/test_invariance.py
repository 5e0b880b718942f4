"""A row's result depends on that row alone: not on the batch, its order, the number of threads, or broken rows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.operands import ACTIVATIONS, DTYPES, OPS, ConvWeight, LinearWeight, in_dtype, rows, same_bits

pytestmark = pytest.mark.usefixtures("backend")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TestLinear:
    @settings(max_examples=15)
    @given(
        x=rows(), n=st.integers(1, 50), symmetric=st.booleans(), dtype=st.sampled_from(DTYPES),
        activation=st.sampled_from(ACTIVATIONS), data=st.data(),
    )  # fmt: skip
    def test_a_row_alone_is_the_row_in_the_batch(
        self, x: Tensor, n: int, symmetric: bool, dtype: torch.dtype, activation: str, data: st.DataObject
    ) -> None:
        x = in_dtype(x, dtype)
        weight = LinearWeight.random(n, x.shape[1], symmetric=symmetric)
        for run in (weight.linear, weight.linear_packed):
            together = run(x, activation)
            for index in range(x.shape[0]):
                assert same_bits(run(x[index], activation), together[index])
            order = torch.tensor(data.draw(st.permutations(range(x.shape[0]))))
            assert same_bits(run(x[order], activation), together[order])
            doubled = torch.cat([x, x + 1, x])
            assert same_bits(run(doubled, activation)[-x.shape[0] :], together)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("shape", [(67, 129, 201), (300, 64, 1000), (1, 2000, 999), (3, 515, 4097)])
    def test_any_number_of_threads(self, shape: tuple[int, int, int], activation: str) -> None:
        m, k, n = shape
        weight, x = LinearWeight.random(n, k, symmetric=False), torch.randn(m, k) * 2
        expected = weight.linear(x, activation)
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(weight.linear(x, activation), expected)
                assert torch.equal(weight.linear_packed(x, activation), expected)
                for answer, wanted in zip(OPS.quantize_rows(x), OPS.quantize_rows(x.clone()), strict=True):
                    assert torch.equal(answer, wanted)
        chosen = sorted({0, m // 3, m - 1})
        assert torch.equal(weight.linear(x[chosen], activation), expected[chosen])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_broken_row_is_nan_and_the_others_are_unharmed(
        self, value: float, dtype: torch.dtype, activation: str
    ) -> None:
        for symmetric in (True, False):
            weight, x = LinearWeight.random(33, 70, symmetric=symmetric), torch.randn(9, 70).to(dtype)
            for run in (weight.linear, weight.linear_packed):
                clean = run(x, activation)
                broken = x.clone()
                broken[4, 69] = value
                answer = run(broken, activation)
                assert bool(answer[4].isnan().all())
                assert torch.equal(answer[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])

    def test_a_longer_sequence_changes_no_token(self) -> None:
        # Padding a batch of sequences appends tokens; those that were there keep their bits.
        weight, x = LinearWeight.random(40, 64), torch.randn(3, 10, 64)
        padded = torch.cat([x, torch.zeros(3, 7, 64)], dim=1)
        assert torch.equal(weight.linear(padded)[:, :10], weight.linear(x))


class TestConv:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 2, 2)])
    def test_a_sample_alone_is_the_sample_in_the_batch(
        self, kernel: tuple[int, ...], dtype: torch.dtype, symmetric: bool
    ) -> None:
        weight = ConvWeight.random(8, 4, kernel, padding=1, symmetric=symmetric)
        scale = torch.tensor([1.0, 1000.0, 1e-5]).reshape(3, *[1] * (len(kernel) + 1))
        x = (torch.randn(3, 4, *[7, 6, 5][: len(kernel)]) * scale).to(dtype)
        together = weight.convolve(x)
        for index in range(3):
            assert torch.equal(weight.convolve(x[index : index + 1])[0], together[index])
        assert torch.equal(weight.convolve(x[[2, 0, 1]]), together[[2, 0, 1]])

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_any_number_of_threads(self, symmetric: bool) -> None:
        weight = ConvWeight.random(24, 20, (3, 3), padding=1, symmetric=symmetric)
        x = torch.randn(2, 20, 31, 29)
        expected = weight.convolve(x)
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(weight.convolve(x), expected)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_broken_sample_is_nan_and_the_others_are_unharmed(self, value: float, symmetric: bool) -> None:
        weight, x = ConvWeight.random(8, 4, (3, 3), symmetric=symmetric), torch.randn(3, 4, 7, 7)
        clean = weight.convolve(x)
        x[1, 2, 0, 0] = value
        answer = weight.convolve(x)
        assert bool(answer[1].isnan().all())
        assert torch.equal(answer[[0, 2]], clean[[0, 2]])


class TestConcurrency:
    def test_eight_threads_on_the_same_weights(self) -> None:
        weights = [LinearWeight.random(60, 100, symmetric=bool(index % 2), seed=index) for index in range(3)]
        conv = ConvWeight.random(8, 4, (3, 3), padding=1, symmetric=False)
        inputs = [torch.randn(5 + index, 100) for index in range(8)]
        images = [torch.randn(2, 4, 8, 8) for _ in range(8)]

        def work(index: int, start: Barrier | None = None) -> list[Tensor]:
            if start is not None:
                start.wait()
            answers = [run(inputs[index]) for weight in weights for run in (weight.linear, weight.linear_packed)]
            return [*answers, *OPS.quantize_rows(inputs[index]), conv.convolve(images[index])]

        expected = [work(index) for index in range(8)]
        # Fresh weights: whatever is computed once per weight is computed while all threads ask for it.
        for weight in [*weights, conv]:
            weight.codes = weight.codes.clone()
        for _ in range(5):
            start = Barrier(8)
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(work, range(8), [start] * 8))
            for answer, wanted in zip(answers, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(answer, wanted, strict=True))
