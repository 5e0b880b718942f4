"""Weights worth quantizing in a test: ordinary ones, and those that break careless arithmetic."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import torch
from hypothesis import strategies as st
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
HUGE = torch.finfo(torch.float32).max

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Magnitudes on both sides of every threshold in the code: subnormal, smallest normal, ordinary, largest.
_elements = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, TINY, -TINY, 1e-30, 1.0, -1.0, 127.5, 3e38, -3e38, HUGE, -HUGE]),
)

CHANNEL_KINDS = (
    "normal", "zero", "constant", "positive", "negative", "tiny", "subnormal", "huge", "largest", "one_outlier",
)  # fmt: skip


def make_channel(kind: str, length: int, generator: torch.Generator) -> Tensor:
    """Answer one float32 channel of the given kind."""
    noise = torch.randn(length, generator=generator)
    match kind:
        case "zero":
            return torch.zeros(length)
        case "constant":
            return torch.full((length,), float(torch.randn((), generator=generator)))
        case "positive":
            return noise.abs() + 0.5
        case "negative":
            return -noise.abs() - 0.5
        case "tiny":
            return noise * 1e-30
        case "subnormal":
            return noise * 1e-40
        case "huge":
            return noise.clamp(-1, 1) * 3e38
        case "largest":
            return noise.sign() * HUGE
        case "one_outlier":
            return torch.cat([noise[1:] * 1e-3, torch.tensor([100.0])])[:length]
        case _:
            return noise


@st.composite
def channels(draw: st.DrawFn, min_length: int = 1, max_length: int = 40) -> Tensor:
    """Float32 ``[channels, length]`` with channels of different kinds side by side."""
    kinds = draw(st.lists(st.sampled_from(CHANNEL_KINDS), min_size=1, max_size=6))
    length = draw(st.integers(min_length, max_length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.stack([make_channel(kind, length, generator) for kind in kinds])


@st.composite
def arbitrary(draw: st.DrawFn, min_dims: int = 1, max_dims: int = 4) -> Tensor:
    """Float32 of any shape whose elements hypothesis chooses one by one."""
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=1, max_side=5))
    return torch.from_numpy(draw(hnp.arrays("float32", shape, elements=_elements)))


def weights(min_dims: int = 1, max_dims: int = 4) -> st.SearchStrategy[Tensor]:
    """Finite float32 weights."""
    if min_dims <= 2 <= max_dims:
        return st.one_of(channels(), arbitrary(min_dims, max_dims))
    return arbitrary(min_dims, max_dims)


@st.composite
def typed_weights(draw: st.DrawFn) -> Tensor:
    """Finite weights of every floating dtype."""
    weight = draw(channels())
    dtype = draw(st.sampled_from(FLOAT_DTYPES))
    limit = min(torch.finfo(dtype).max, HUGE)
    return weight.to(dtype).clamp(-limit, limit)


def ulp(value: Tensor) -> Tensor:
    """Answer the spacing of float32 numbers at ``|value|``, as float64."""
    magnitude = value.abs().float().clamp(max=torch.nextafter(torch.tensor(HUGE), torch.tensor(0.0)))
    return torch.nextafter(magnitude, torch.tensor(torch.inf)).double() - magnitude.double()
