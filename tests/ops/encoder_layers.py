"""Operands of ``encoder_layer``, and what it must answer: a twin in float64 that knows where a code may flip.

Between two linear layers of an encoder layer stand sums in float32, whose last bits depend on the order of the sum, and
then a quantization. An element that lies half way between two codes may be rounded up by one implementation and down by
another, and from there on the row's answers differ by much more than rounding. So the twin computes for every row

- how many elements lie so close to a tie that rounding may decide (:data:`NEAR`, in codes). Each changes the quantized
  row by at most one code, so ``n`` of them by at most ``scale * sqrt(n)`` in the Euclidean norm;
- what becomes of that change: a linear layer enlarges it by at most its spectral norm, an activation by at most
  :data:`STEEPEST`, and a norm, which divides by the length of the centred row, by what :func:`_norm` says. A row that
  has changed may flip all its codes in the next quantization.

Rows without such an element, a good part of all, must agree up to rounding (:data:`ROUNDING`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import pack_tiles
from mono_quant.ops import reference
from mono_quant.ops.encoder_reference import LINEARS
from tests.ops.operands import ACTIVATIONS, EXACT_ACTIVATIONS, OPS, LinearWeight

#: Distance from a tie, in codes, within which float32 rounding may choose either: about ten times what it can move.
NEAR = 0.003
#: The largest slope of any activation: that of the exact GELU.
STEEPEST = 1.13
#: Relative error of a row that only rounding makes, before a norm enlarges it by cancelling the row's mean.
ROUNDING = 1e-6


@dataclass
class Norm:
    """Weight, bias and epsilon of a layer norm."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-12

    @classmethod
    def random(cls, width: int, generator: torch.Generator) -> Norm:
        return cls(torch.rand(width, generator=generator) + 0.5, torch.randn(width, generator=generator) / 4)

    @classmethod
    def plain(cls, width: int, eps: float = 0.0) -> Norm:
        return cls(torch.ones(width), torch.zeros(width), eps)


@dataclass
class EncoderOperands:
    """The weights of one encoder layer, and its numbers."""

    linears: dict[str, LinearWeight]
    norms: tuple[Norm, Norm]
    heads: int
    activation: str = "gelu"
    scale: float = 0.0

    def __post_init__(self) -> None:
        self.scale = self.scale or (self.width // self.heads) ** -0.5

    @property
    def width(self) -> int:
        return self.linears["query"].codes.shape[0]

    @classmethod
    def random(
        cls, heads: int, depth: int, wide: int, *, symmetric: bool = True, activation: str = "gelu", seed: int = 0
    ) -> EncoderOperands:
        """Answer a layer whose scores and sums are as large as those of trained ones."""
        width = heads * depth
        sizes = dict.fromkeys(LINEARS, (width, width)) | {"up": (wide, width), "down": (width, wide)}
        linears = {}
        for number, (name, (outputs, inputs)) in enumerate(sizes.items()):
            linear = LinearWeight.random(outputs, inputs, symmetric=symmetric, seed=seed + number)
            linear.scale = linear.scale * inputs**-0.5
            linears[name] = linear
        generator = torch.Generator().manual_seed(seed + 6)
        norms = Norm.random(width, generator), Norm.random(width, generator)
        return cls(linears, norms, heads, activation)

    @classmethod
    def trivial(cls, width: int, heads: int = 1) -> EncoderOperands:
        """Answer a layer whose linear layers answer zeros and whose norms scale by one."""
        linears = {name: constant(width) for name in LINEARS}
        return cls(linears, (Norm.plain(width), Norm.plain(width)), heads, "none")

    def weights(self) -> list[Tensor]:
        """Answer the operator's list of tensors."""
        tensors: list[Tensor] = []
        for name in LINEARS:
            linear = self.linears[name]
            bias = torch.zeros(linear.codes.shape[0]) if linear.bias is None else linear.bias
            zeros = torch.empty(0, dtype=torch.int8) if linear.zero_point is None else linear.zero_point.reshape(-1)
            sums = linear.codes.sum(1, dtype=torch.int32)
            tensors += [pack_tiles(linear.codes), sums, linear.scale.reshape(-1), bias, zeros]
        return tensors + [tensor for norm in self.norms for tensor in (norm.weight, norm.bias)]

    def arguments(self, x: Tensor, mask: Tensor | None = None) -> tuple[object, ...]:
        first, second = self.norms
        return x, mask, self.weights(), self.heads, self.scale, first.eps, second.eps, self.activation

    def run(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        answer: Tensor = OPS.encoder_layer(*self.arguments(x, mask))
        return answer

    def exact(self, x: Tensor, mask: Tensor | None = None) -> Answer:
        """Answer the layer in float64."""
        samples, length, width = x.shape
        rows = Answer.of(x.reshape(-1, width).double())

        def split(name: str) -> Tensor:
            projected = _project(self.linears[name], rows, same_codes=True).value
            return projected.view(samples, length, self.heads, width // self.heads).transpose(1, 2)

        context = _attend(split("query"), split("key"), split("value"), mask, self.scale)
        context = context.transpose(1, 2).reshape(-1, width)
        hidden = _norm(self.norms[0], _project(self.linears["output"], Answer.of(context)), rows)
        wide = _project(self.linears["up"], hidden)
        wide = replace(wide, value=EXACT_ACTIVATIONS[self.activation](wide.value), moved=wide.moved * STEEPEST)
        return _norm(self.norms[1], _project(self.linears["down"], wide), hidden)


def constant(width: int, value: float = 0.0) -> LinearWeight:
    """Answer a square linear layer that answers ``value`` for whatever input."""
    codes = torch.zeros(width, width, dtype=torch.int8)
    return LinearWeight(codes, torch.ones(width, 1), None, torch.full((width,), value))


def identity(width: int) -> LinearWeight:
    """Answer a linear layer that answers its input as it is quantized."""
    return LinearWeight(torch.eye(width, dtype=torch.int8), torch.ones(width, 1), None, torch.zeros(width))


@dataclass
class Answer:
    """Rows in float64.

    Attributes:
        value: ``[rows, n]``.
        moved: ``[rows]``, Euclidean norm of what flipped codes can have changed of a row; 0 where none can have.
        amplified: ``[rows]``, how much the norms so far have enlarged relative errors.
    """

    value: Tensor
    moved: Tensor
    amplified: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Answer:
        return cls(value, torch.zeros(value.shape[0]).double(), torch.ones(value.shape[0]).double())

    def limit(self) -> Tensor:
        """Answer ``[rows]``, the Euclidean norm by which an implementation may differ from ``value``."""
        return self.moved + ROUNDING * self.amplified * self.value.norm(dim=1).clamp(min=1.0)


def _project(linear: LinearWeight, rows: Answer, same_codes: bool = False) -> Answer:
    inputs = linear.codes.shape[1]
    codes, scale, zero_point = reference.quantize_rows(rows.value.float())
    step = scale.double()[:, None]
    in_codes = rows.value / step
    near = ((in_codes - in_codes.floor() - 0.5).abs() < NEAR).sum(1)
    flips = torch.zeros_like(near) if same_codes else torch.where(rows.moved > 0, inputs, near)
    moved = rows.moved + 1.01 * step[:, 0] * flips.double().sqrt()
    weight = linear.codes.double() - (0.0 if linear.zero_point is None else linear.zero_point.double())
    weight = weight * linear.scale.double()
    bias = 0.0 if linear.bias is None else linear.bias.double()
    value = (codes.double() - zero_point[:, None]) * step @ weight.t() + bias
    return Answer(value, moved * torch.linalg.matrix_norm(weight, 2), rows.amplified)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        added = torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask
        scores = scores + added.double()
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ value


def _norm(norm: Norm, x: Answer, residual: Answer) -> Answer:
    """Answer the norm of a sum.

    Two vectors divided by their lengths are no further apart than ``2 |a - b| / (|a| + |b|)`` (Dunkl and Williams), and
    no further than two.
    """
    total, moved = x.value + residual.value, x.moved + residual.moved
    n = total.shape[1]
    centred = total - total.mean(1, keepdim=True)
    length = (centred.square().sum(1) + n * norm.eps).sqrt()
    value = centred / length[:, None] * math.sqrt(n) * norm.weight.double() + norm.bias.double()
    largest = math.sqrt(n) * float(norm.weight.abs().max())
    apart = torch.where(moved < length, 2 * moved / (2 * length - moved).clamp(min=1e-300), 2.0)
    cancelled = total.norm(dim=1) / length.clamp(min=1e-300)
    amplified = torch.maximum(x.amplified, residual.amplified) * (1 + cancelled)
    return Answer(value, apart * largest, amplified)


def sees(samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Answer a bool mask ``[samples, 1, length, length]`` in which every fifth query sees nothing."""
    mask = torch.rand(samples, 1, length, length, generator=generator) < 0.6
    mask[:, :, ::5] = False
    return mask


@st.composite
def masks(draw: st.DrawFn, samples: int, length: int) -> Tensor | None:
    """Masks of every form that the operator takes."""
    kind = draw(st.sampled_from(("none", "bool", "float")))
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = samples if draw(st.booleans()) else 1
    mask = sees(rows, length, generator)
    if kind == "float":
        added = torch.randn(mask.shape, generator=generator)
        mask = torch.where(mask, added, torch.tensor(draw(st.sampled_from((-math.inf, -32.0)))))
    form = draw(st.sampled_from(("full", "keys", "keys expanded", "queries expanded", "samples expanded", "apart")))
    if form.startswith("keys"):
        mask = mask[:, :, -1:]
        return mask.expand(-1, -1, length, -1) if form == "keys expanded" else mask
    if form == "queries expanded":
        return mask[..., :1].expand(-1, -1, -1, length)
    if form == "samples expanded":
        return mask[:1].expand(samples, -1, -1, -1) if rows else mask
    return mask.transpose(2, 3).contiguous().transpose(2, 3) if form == "apart" else mask


@st.composite
def cases(draw: st.DrawFn) -> tuple[EncoderOperands, Tensor, Tensor | None]:
    """Layers of any size, inputs and masks."""
    heads, depth = draw(st.integers(1, 4)), draw(st.sampled_from((1, 2, 3, 5, 8, 15, 16, 17, 20, 33, 40)))
    wide = draw(st.sampled_from((1, 3, 15, 17, 33, 65, 129)))
    samples = draw(st.sampled_from((0, 1, 3, 9)))
    length = draw(st.one_of(st.integers(1, 12), st.integers(1, 70), st.just(200)))
    seed = draw(st.integers(0, 2**31))
    activation, symmetric = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
    operands = EncoderOperands.random(heads, depth, wide, symmetric=symmetric, activation=activation, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, length, operands.width, generator=generator)
    if draw(st.booleans()):
        # Rows of different sizes, one of them zeros, and rows that lie apart.
        x = x * torch.randint(0, 4, (samples, length, 1), generator=generator)
        x = torch.cat([x, x], dim=2)[..., : operands.width]
    return operands, x, draw(masks(samples, length))
