"""``count_values``: every instruction set counts as the specification does, value by value."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.ops import native
from tests.ops.operands import OPS


@pytest.fixture(params=native.available_instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.instruction_set()
    assert before is not None
    with ops.use_backend("native"):
        native.set_instruction_set(request.param)
        yield request.param
        native.set_instruction_set(before)


@pytest.fixture(params=(1, 2, 8))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wanted(x: Tensor, bins: int, exponent: int) -> Tensor:
    """Count in float64, one bin after the other."""
    numbers = (x.double().flatten() * 2.0**-exponent).ceil().long() + bins // 2 - 1
    return torch.bincount(numbers, minlength=bins)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Values that have a bin, among them edges of bins, zeros of both signs and subnormal numbers."""
    bins, exponent = draw(st.sampled_from((512, 2048, 8192))), draw(st.integers(-126, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.integers(0, 3000))
    inside = (torch.rand(count, generator=generator) * 2 - 1) * (bins // 2 - 1)
    edges = torch.randint(1 - bins // 2, bins // 2, (count,), generator=generator).float()
    kind = torch.randint(0, 4, (count,), generator=generator)
    values = torch.where(kind == 0, edges, inside) * 2.0**exponent
    values = torch.where(kind == 1, torch.tensor(-0.0), values)
    tiny = torch.where(values < 0, -1e-41, 1e-41)
    return torch.where((kind == 2) & (torch.arange(count) % 3 == 0), tiny, values).float(), bins, exponent


@given(case=cases())
def test_counts_are_those_of_float64(isa: str, case: tuple[Tensor, int, int]) -> None:
    x, bins, exponent = case
    counts = OPS.count_values(x, bins, exponent)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, wanted(x, bins, exponent))


@pytest.mark.usefixtures("backend")
def test_every_backend_counts_alike() -> None:
    x = torch.randn(3, 1000)
    assert torch.equal(OPS.count_values(x, 512, -5), wanted(x, 512, -5))


def test_values_that_lie_apart_and_threads_change_nothing(isa: str, threads: int) -> None:
    x = torch.randn(1_000_001).clamp(-3.9, 3.9)[1:].reshape(1000, 1000)
    for part in (x, x[:, 3:], x.t(), x[::2, ::3]):
        assert torch.equal(OPS.count_values(part, 8192, -10), wanted(part, 8192, -10))


@pytest.mark.parametrize(("dtype", "bins"), [(torch.float64, 512), (torch.float32, 1)])
def test_what_cannot_be_counted_is_refused(isa: str, dtype: torch.dtype, bins: int) -> None:
    with pytest.raises(RuntimeError, match="count_values takes"):
        OPS.count_values(torch.zeros(4, dtype=dtype), bins, 0)
