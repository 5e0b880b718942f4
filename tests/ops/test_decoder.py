"""``decoder_layer``: every instruction set against the specification, tokens one by one, samples that stay apart."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.core import pack_int32, pack_tiles, quantize_weight_groupwise
from mono_quant.ops import native
from mono_quant.ops.decoder_reference import LINEARS
from tests.ops.operands import ACTIVATIONS, OPS, REFUSED, LinearWeight, same_bits

DTYPES = (torch.float32, torch.bfloat16)


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


def few_bits(outputs: int, inputs: int, bits: int, symmetric: bool, seed: int) -> list[Tensor]:
    """Answer a weight of ``bits`` in two groups for each row where its length is even."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    quantized = quantize_weight_groupwise(weight, inputs if inputs % 2 else inputs // 2, symmetric, bits)
    zeros = torch.empty(0, dtype=torch.int8) if quantized.zero_point is None else quantized.zero_point
    bias = torch.randn(outputs, generator=generator) / 4
    words = pack_int32(quantized.codes, bits)
    return [words, torch.tensor([bits], dtype=torch.int32), quantized.scale, bias, zeros]


@dataclass
class Decoder:
    """The weights of one decoder layer, and its numbers."""

    weights: list[Tensor]
    width: int
    key_heads: int
    group: int
    depth: int
    activation: str = "silu"

    @classmethod
    def random(
        cls, key_heads: int = 2, group: int = 3, depth: int = 20, wide: int = 131, *, symmetric: bool = True,
        activation: str = "silu", seed: int = 0, bits: tuple[int, ...] = (), dtype: torch.dtype = torch.float32,
    ) -> Decoder:  # fmt: skip
        """Answer a layer of int8 linear layers; with ``bits``, of such weights in turn, 0 for int8."""
        width, queries, keys = 52, key_heads * group * depth, key_heads * depth
        sizes = {"query": (queries, width), "key": (keys, width), "value": (keys, width), "output": (width, queries),
                 "gate": (wide, width), "up": (wide, width), "down": (width, wide)}  # fmt: skip
        weights: list[Tensor] = []
        for number, name in enumerate(LINEARS):
            few = bits[number % len(bits)] if bits else 0
            if few:
                weights += few_bits(*sizes[name], few, symmetric, seed + number)
                continue
            linear = LinearWeight.random(*sizes[name], symmetric=symmetric, seed=seed + number)
            zeros = torch.empty(0, dtype=torch.int8) if linear.zero_point is None else linear.zero_point.reshape(-1)
            assert linear.bias is not None
            scale = linear.scale.reshape(-1) * sizes[name][1] ** -0.5
            weights += [pack_tiles(linear.codes), linear.codes.sum(1, dtype=torch.int32), scale, linear.bias / 4, zeros]
        generator = torch.Generator().manual_seed(seed)
        weights += [(torch.rand(width, generator=generator) + 0.5).to(dtype) for _ in range(2)]
        return cls(weights, width, key_heads, group, depth, activation)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[-1].dtype

    def inputs(self, samples: int, length: int, past: int, seed: int = 1) -> tuple[Tensor, ...]:
        """Answer hidden states, keys and values of the past, cosine and sine."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, length, self.width, generator=generator)
        held = torch.randn(2, samples, self.key_heads, past, self.depth, generator=generator)
        positions = (past + torch.arange(length)).float()[:, None] * 0.3 ** torch.arange(self.depth // 2)
        angles = torch.cat([positions, positions], -1)[None]
        return tuple(tensor.to(self.dtype) for tensor in (x, held[0], held[1], angles.cos(), angles.sin()))

    def run(self, inputs: tuple[Tensor, ...], mask: Tensor | None = None, causal: bool = True) -> tuple[Tensor, ...]:
        answer: tuple[Tensor, ...] = OPS.decoder_layer(
            *inputs, mask, self.weights, self.key_heads * self.group, self.depth**-0.5, 1e-5, 1e-6, causal,
            self.activation,
        )  # fmt: skip
        return answer

    def run_static(
        self, inputs: tuple[Tensor, ...], room: int, mask: Tensor | None = None, causal: bool = True
    ) -> tuple[Tensor, ...]:
        """Answer what :meth:`run` does, in a cache that has ``room`` for more than the tokens of ``x``."""
        x, past_keys, past_values, *angles = inputs
        past = past_keys.shape[2]
        samples, heads, _, depth = past_keys.shape
        keys, values = torch.full((2, samples, heads, past + x.shape[1] + room, depth), 7.0, dtype=x.dtype)
        keys[:, :, :past], values[:, :, :past] = past_keys, past_values
        out: Tensor = OPS.decoder_layer_static_cache(
            x, keys, values, torch.tensor(past), *angles, mask, self.weights, self.key_heads * self.group,
            self.depth**-0.5, 1e-5, 1e-6, causal, self.activation,
        )  # fmt: skip
        return out, keys, values


def rows_agree(answer: Tensor, wanted: Tensor) -> bool:
    """Whether rows are equal up to rounding, but for codes that rounding flips.

    A flip changes a quantized row by one of 255 steps, and its effect on the sum that is answered is small beside the
    row. Most rows have none.
    """
    if answer.dtype != wanted.dtype:
        return False
    answer, wanted = answer.float(), wanted.float()
    apart = (answer - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)
    return bool((apart < 0.05).all()) and (apart.numel() == 0 or float(apart.median()) < 0.01)


@dataclass(repr=False)
class Case:
    """A call of the operator."""

    decoder: Decoder
    sizes: tuple[int, int, int]
    causal: bool
    inputs: tuple[Tensor, ...]
    mask: Tensor | None

    def __repr__(self) -> str:
        d = self.decoder
        mask = None if self.mask is None else (self.mask.dtype, tuple(self.mask.shape))
        return f"Case({d.key_heads, d.group, d.depth, d.activation, d.dtype}, {self.sizes}, {self.causal}, {mask})"

    def run(self) -> tuple[Tensor, ...]:
        return self.decoder.run(self.inputs, self.mask, self.causal)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    decoder = Decoder.random(
        draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from((2, 6, 16, 20, 64))),
        draw(st.sampled_from((1, 17, 64, 131))), symmetric=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)), seed=draw(st.integers(0, 1000)),
        bits=draw(st.sampled_from(((), (4,), (8,), (4, 0, 8, 0)))), dtype=draw(st.sampled_from(DTYPES)),
    )  # fmt: skip
    samples, past = draw(st.sampled_from((0, 1, 3))), draw(st.sampled_from((0, 1, 65)))
    length = draw(st.one_of(st.integers(1, 40), st.just(150)))
    inputs = decoder.inputs(samples, length, past)
    kind, mask = draw(st.sampled_from(("none", "bool", "float"))), None
    if kind != "none":
        generator = torch.Generator().manual_seed(length)
        mask = torch.rand(max(samples, 1), 1, length, past + length, generator=generator) < 0.7
        mask = mask[:, :, -1:].expand(-1, -1, length, -1) if draw(st.booleans()) else mask
        mask = mask if samples else mask[:0]
    if mask is not None and kind == "float":
        mask = torch.where(mask, 0.0, -torch.inf).to(decoder.dtype)
    return Case(decoder, (samples, length, past), draw(st.booleans()), inputs, mask)


@pytest.mark.usefixtures("isa")
class TestEveryInstructionSet:
    @given(case=cases())
    def test_answers_what_the_specification_says(self, case: Case) -> None:
        answer, keys, values = case.run()
        with ops.use_backend("reference"):
            wanted = case.run()
        past = case.sizes[2]
        assert torch.equal(keys[:, :, :past], case.inputs[1])
        assert torch.equal(values[:, :, :past], case.inputs[2])
        # The first norm sums in another order: up to a code of its row, new keys and values agree.
        assert keys.shape == wanted[1].shape
        assert rows_agree(keys, wanted[1])
        assert rows_agree(values, wanted[2])
        assert rows_agree(answer, wanted[0])

    @given(case=cases(), room=st.sampled_from((0, 1, 40)))
    def test_a_static_cache_holds_what_one_that_grows_does(self, case: Case, room: int) -> None:
        whole, mask = case.sizes[1] + case.sizes[2], case.mask
        if mask is not None and room:
            hidden = torch.zeros((*mask.shape[:3], room), dtype=torch.bool)
            rest = hidden if mask.dtype == torch.bool else torch.where(hidden, 0.0, -torch.inf).to(mask.dtype)
            mask = torch.cat([mask, rest], -1)
        out, keys, values = case.decoder.run_static(case.inputs, room, mask, case.causal)
        wanted = case.run()
        assert same_bits(out, wanted[0])
        assert same_bits(keys[:, :, :whole].contiguous(), wanted[1])
        assert same_bits(values[:, :, :whole].contiguous(), wanted[2])
        assert bool((keys[:, :, whole:] == 7).all())
        assert bool((values[:, :, whole:] == 7).all())

    @given(length=st.integers(1, 40), past=st.sampled_from((0, 1, 65)), symmetric=st.booleans(), causal=st.booleans())
    def test_bfloat16_is_computed_in_float32_and_rounded(
        self, length: int, past: int, symmetric: bool, causal: bool
    ) -> None:
        half = Decoder.random(symmetric=symmetric, dtype=torch.bfloat16)
        single = Decoder.random(symmetric=symmetric)
        single.weights[-2:] = [norm.float() for norm in half.weights[-2:]]
        inputs = half.inputs(2, length, past)
        answer, *held = half.run(inputs, causal=causal)
        wide, *wanted = single.run(tuple(tensor.float() for tensor in inputs), causal=causal)
        # Attention alone sees something else: keys and values of this call, as the cache holds them.
        for found, expected in zip(held, wanted, strict=True):
            assert same_bits(found, expected.bfloat16())
        assert rows_agree(answer, wide.bfloat16())

    def test_a_mask_may_show_places_behind_the_last_token(self) -> None:
        decoder = Decoder.random()
        inputs, mask = decoder.inputs(2, 1, 4), torch.ones(2, 1, 1, 9, dtype=torch.bool)
        mask[..., 7:] = False
        answer = decoder.run_static(inputs, 4, mask, causal=False)[0]
        with ops.use_backend("reference"):
            wanted = decoder.run_static(inputs, 4, mask, causal=False)[0]
        assert rows_agree(answer, wanted)
        assert not torch.equal(answer, decoder.run_static(inputs, 4, mask & (torch.arange(9) < 5), causal=False)[0])

    def test_tokens_one_by_one_are_those_of_one_call(self) -> None:
        decoder = Decoder.random()
        x, none, _, cosine, sine = decoder.inputs(2, 30, 0)
        whole, keys, values = decoder.run((x, none, none, cosine, sine))
        steps, held = [], (none, none)
        for i in range(30):
            at = slice(i, i + 1)
            step, *held = decoder.run((x[:, at], *held, cosine[:, at], sine[:, at]), causal=False)
            steps.append(step)
        # Keys and values depend on their own token only: the same bits.
        assert same_bits(held[0], keys)
        assert same_bits(held[1], values)
        assert rows_agree(torch.cat(steps, 1), whole)

    @pytest.mark.parametrize(("length", "past"), [(1, 40), (2, 3), (70, 0)])
    def test_a_sample_depends_on_itself_alone(self, length: int, past: int, threads: int) -> None:
        decoder = Decoder.random(symmetric=False)
        x, keys, values, cosine, sine = decoder.inputs(5, length, past)
        together = decoder.run((x, keys, values, cosine, sine))
        for i in range(5):
            one = slice(i, i + 1)
            alone = decoder.run((x[one], keys[one], values[one], cosine, sine))
            assert all(same_bits(a, b[one]) for a, b in zip(alone, together, strict=True))
        x = x.clone()
        x[2, 0, 3] = torch.nan
        broken = decoder.run((x, keys, values, cosine, sine))[0]
        others = [0, 1, 3, 4]
        assert bool(broken[2, -1].isnan().all())
        assert same_bits(broken[others], together[0][others])

    def test_a_past_that_lies_apart_is_read_as_it_is(self) -> None:
        decoder = Decoder.random()
        x, keys, values, cosine, sine = decoder.inputs(2, 3, 9)
        wanted = decoder.run((x, keys, values, cosine, sine))
        longer = [torch.cat([t, t], 2)[:, :, :9] for t in (keys, values)]
        swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values)]
        for past in (longer, swapped, [longer[0], swapped[1]]):
            answer = decoder.run((x, *past, cosine, sine))
            assert all(same_bits(a, b) for a, b in zip(answer, wanted, strict=True))

    def test_eight_threads_at_once_get_their_own_answers(self) -> None:
        decoder = Decoder.random()
        inputs = [decoder.inputs(1, 1 + 7 * i, 5 * i, seed=i) for i in range(6)]
        wanted = [decoder.run(i) for i in inputs]
        with ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(decoder.run, inputs * 4))
        for i, answer in enumerate(answers):
            assert all(same_bits(a, b) for a, b in zip(answer, wanted[i % 6], strict=True))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("change", ["weights", "angles", "past", "mask", "heads", "words", "bits", "groups", "dtype"])
def test_sizes_that_do_not_fit_are_refused(change: str) -> None:
    decoder = Decoder.random()
    x, keys, values, cosine, sine = decoder.inputs(2, 3, 4)
    mask: Any = None
    if change == "weights":
        decoder.weights = decoder.weights[:-1]
    elif change == "angles":
        cosine = cosine[..., :-2]
    elif change == "past":
        values = values[..., :-2]
    elif change == "mask":
        mask = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    elif change == "heads":
        decoder.group = 0
    elif change == "dtype":
        keys, values = keys.half(), values.half()
    else:
        weights = Decoder.random(bits=(4,)).weights
        if change == "words":
            weights[0] = weights[0][:, 1:]
        elif change == "bits":
            weights[1] = torch.tensor([5], dtype=torch.int32)
        else:
            weights[2] = torch.ones(weights[2].shape[0], 7)
        decoder.weights = weights
    with pytest.raises(REFUSED):
        decoder.run((x, keys, values, cosine, sine), mask)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("position", [-1, 5])
def test_a_static_cache_without_room_is_refused(position: int) -> None:
    decoder = Decoder.random()
    x, keys, values, cosine, sine = decoder.inputs(2, 3, 7)
    before = keys.clone()
    with pytest.raises(REFUSED, match=f"a cache for 7 tokens got 3 at position {position}"):
        OPS.decoder_layer_static_cache(
            x, keys, values, torch.tensor(position), cosine, sine, None, decoder.weights, 6, 0.2, 1e-5, 1e-6, True,
            "silu",
        )  # fmt: skip
    assert same_bits(keys, before)
