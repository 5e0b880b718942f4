"""Operands for the operators, and what the operators must answer, computed the slow and exact way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import pack_tiles, quantize_weight_int8
from mono_quant.errors import ConfigurationError, InputError

OPS = torch.ops.mono_quant
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

# Kernels outside Python can only raise RuntimeError.
REFUSED = (InputError, ConfigurationError, RuntimeError, IndexError)

EXACT_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass
class LinearWeight:
    """An int8 weight ``[N, K]`` as the operators take it."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    @classmethod
    def random(
        cls, out_features: int, in_features: int, *, symmetric: bool = True, bias: bool = True, seed: int = 0
    ) -> LinearWeight:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_features, in_features, generator=generator) + 0.3
        quantized = quantize_weight_int8(weight, symmetric)
        zero_point = None if quantized.zero_point is None else quantized.zero_point[:, None]
        offset = torch.randn(out_features, generator=generator) if bias else None
        return cls(quantized.codes, quantized.scale[:, None], zero_point, offset)

    def linear(self, x: Tensor, activation: str = "none") -> Tensor:
        return OPS.linear_dynamic(x, self.codes, self.scale, self.zero_point, self.bias, activation)

    def linear_packed(self, x: Tensor, activation: str = "none") -> Tensor:
        sums = self.codes.sum(dim=1, dtype=torch.int32)
        return OPS.linear_dynamic_packed(
            x, pack_tiles(self.codes), sums, self.scale, self.zero_point, self.bias, self.codes.shape[0], activation
        )

    def exact(self, x: Tensor, activation: str = "none") -> tuple[Tensor, Tensor]:
        """Answer the result in float64 and the largest summand of each element."""
        codes, scale, zero_point = OPS.quantize_rows(x)
        centred = (codes.to(torch.int64) - zero_point[..., None]).double()
        weight = self.codes.double() - (0.0 if self.zero_point is None else self.zero_point.double())
        product = (centred @ weight.t()) * scale[..., None].double() * self.scale[:, 0].double()
        bias = torch.zeros(self.codes.shape[0]) if self.bias is None else self.bias
        result = EXACT_ACTIVATIONS[activation](product + bias.double())
        return result, torch.maximum(product.abs(), bias.double().abs().expand_as(product))


@dataclass
class ConvWeight:
    """An int8 convolution weight and its geometry."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    geometry: dict[str, Any]

    @classmethod
    def random(
        cls,
        out_channels: int,
        in_channels: int,
        kernel: tuple[int, ...],
        *,
        symmetric: bool = True,
        bias: bool = True,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        seed: int = 0,
    ) -> ConvWeight:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_channels, in_channels // groups, *kernel, generator=generator) + 0.3
        quantized = quantize_weight_int8(weight, symmetric)
        shape = (out_channels, *[1] * (len(kernel) + 1))
        zero_point = None if quantized.zero_point is None else quantized.zero_point.reshape(shape)
        offset = torch.randn(out_channels, generator=generator) if bias else None
        geometry = {
            "stride": [stride] * len(kernel),
            "padding": [padding] * len(kernel),
            "dilation": [dilation] * len(kernel),
            "groups": groups,
        }
        return cls(quantized.codes, quantized.scale.reshape(shape), zero_point, offset, geometry)

    def convolve(self, x: Tensor) -> Tensor:
        return OPS.conv_dynamic(x, self.codes, self.scale, self.zero_point, self.bias, *self.geometry.values())

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Answer the result in float64 and the largest summand of each element, with or without the correction."""
        codes, scale, zero_point = OPS.quantize_rows(x.flatten(1))
        centred = (codes.double() - zero_point[:, None]).reshape(x.shape)
        functions = (F.conv1d, F.conv2d, F.conv3d)
        convolve = functions[x.dim() - 3]
        plain = convolve(centred, self.codes.double(), None, **self.geometry)
        shift = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        correction = convolve(centred, shift.double().expand(self.codes.shape), None, **self.geometry)
        factor = scale.double().reshape(-1, *[1] * (x.dim() - 1)) * self.scale.double().reshape(
            1, -1, *[1] * (x.dim() - 2)
        )
        bias = torch.zeros(self.codes.shape[0]) if self.bias is None else self.bias
        offset = bias.double().reshape(1, -1, *[1] * (x.dim() - 2))
        summands = torch.stack([(plain * factor).abs(), (correction * factor).abs(), offset.abs().expand_as(plain)])
        return (plain - correction) * factor + offset, summands.amax(0)


def assert_rounded_from(actual: Tensor, exact: Tensor, summand: Tensor, spacings: int = 6) -> None:
    """``actual`` is ``exact`` up to float32 rounding at ``summand`` and one rounding to its own dtype."""
    assert actual.shape == exact.shape
    slack = spacings * torch.finfo(torch.float32).eps * torch.maximum(summand, exact.abs()) + 1e-37
    if actual.dtype != torch.float32:
        limit = torch.finfo(actual.dtype)
        slack = slack + limit.eps * exact.abs() + limit.smallest_normal * limit.eps
        exact = torch.where(exact.abs() > limit.max, exact.sign() * torch.inf, exact)
    same = (actual.double() - exact).abs() <= slack
    assert bool((same | (actual.double() == exact)).all())


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have equal elements, where NaN equals NaN."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.nan_to_num(12345.0), second.nan_to_num(12345.0)) and torch.equal(
        first.isnan(), second.isnan()
    )


ROW_KINDS = ("normal", "zero", "positive", "negative", "outlier", "tiny", "subnormal", "huge", "largest", "ties")


def make_row(kind: str, length: int, generator: torch.Generator) -> Tensor:
    """Answer one float32 row of activations of the given kind."""
    noise = torch.randn(length, generator=generator)
    match kind:
        case "zero":
            return torch.zeros(length)
        case "positive":
            return noise.abs() + 1
        case "negative":
            return -noise.abs() - 1
        case "outlier":
            return torch.where(torch.arange(length) == length // 2, torch.tensor(1000.0), noise)
        case "tiny":
            return noise * 1e-30
        case "subnormal":
            return noise * 1e-41
        case "huge":
            return noise.clamp(-1, 1) * 3e38
        case "largest":
            return noise.sign() * torch.finfo(torch.float32).max
        case "ties":
            # Scale 1 exactly, every other element half way between two codes.
            row = torch.randint(-254, 255, (length,), generator=generator) / 2
            return torch.cat([torch.tensor([-127.5, 127.5]), row])[:length]
        case _:
            return noise * 3


@st.composite
def rows(draw: st.DrawFn, max_length: int = 150, kinds: tuple[str, ...] = ROW_KINDS) -> Tensor:
    """Float32 ``[rows, length]`` with rows of different kinds side by side."""
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8))
    length = draw(st.integers(1, max_length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.stack([make_row(kind, length, generator) for kind in chosen])


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype`` without leaving its range."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-limit, limit).to(dtype)
