"""``encoder_layer``: every backend and instruction set against a twin in float64, and samples that stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.ops import native
from mono_quant.ops.encoder_reference import TENSORS_EACH
from tests.ops.encoder_layers import EncoderOperands, Norm, cases, constant, identity, sees
from tests.ops.operands import ACTIVATIONS, OPS, REFUSED, same_bits

NATIVE = tuple(f"native-{name}" for name in native.available_instruction_sets())
PLACES = (*NATIVE, "torch", "reference")
#: For what only the kernels promise: PyTorch's float products sum in an order that depends on all sizes.
KERNELS = pytest.mark.parametrize("place", NATIVE, indirect=True)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each instruction set of the native kernels, and on the other backends."""
    backend, _, isa = request.param.partition("-")
    before = native.instruction_set()
    with ops.use_backend(backend):
        if isa:
            native.set_instruction_set(isa)
        yield request.param
        if isa:
            assert before is not None
            native.set_instruction_set(before)


@pytest.fixture(params=(1, 2, 8))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer(**options: Any) -> EncoderOperands:
    """A layer whose sizes are no multiples of 16."""
    return EncoderOperands.random(3, 19, 131, **options)


def inputs(samples: int, length: int, operands: EncoderOperands) -> Tensor:
    return torch.randn(samples, length, operands.width, generator=torch.Generator().manual_seed(3))


@pytest.mark.usefixtures("place")
class TestAgainstFloat64:
    @given(case=cases())
    def test_rows_agree_but_for_codes_that_lie_between_two(
        self, case: tuple[EncoderOperands, Tensor, Tensor | None]
    ) -> None:
        operands, x, mask = case
        answer = operands.run(x, mask)
        assert (answer.shape, answer.dtype, answer.is_contiguous()) == (x.shape, torch.float32, True)
        wanted = operands.exact(x, mask)
        apart = (answer.double().reshape(wanted.value.shape) - wanted.value).norm(dim=1)
        assert bool((apart <= wanted.limit()).all())

    @given(case=cases())
    def test_bfloat16_is_computed_in_float32_and_rounded(
        self, case: tuple[EncoderOperands, Tensor, Tensor | None]
    ) -> None:
        operands, x, mask = case
        x, weights = x.bfloat16(), operands.weights()
        weights[-4:] = [tensor.bfloat16() for tensor in weights[-4:]]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.bfloat16()
        _, _, _, *numbers = operands.arguments(x)
        answer = OPS.encoder_layer(x, mask, weights, *numbers)
        weights[-4:] = [tensor.float() for tensor in weights[-4:]]
        single = mask.float() if mask is not None and mask.dtype != torch.bool else mask
        assert same_bits(answer, OPS.encoder_layer(x.float(), single, weights, *numbers).bfloat16())

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_most_rows_agree_up_to_rounding(self, activation: str, symmetric: bool) -> None:
        # What makes the property above worth something: few rows have a code that rounding may flip.
        operands = layer(activation=activation, symmetric=symmetric)
        x = inputs(3, 70, operands)
        mask = sees(3, 70, torch.Generator().manual_seed(4))
        wanted = operands.exact(x, mask)
        assert float((wanted.moved == 0).double().mean()) > 0.15
        apart = (operands.run(x, mask).double().reshape(wanted.value.shape) - wanted.value).norm(dim=1)
        assert float((apart < 1e-5 * wanted.value.norm(dim=1)).double().mean()) > 0.9

    @pytest.mark.parametrize("width", [2, 4, 16, 64, 256])
    def test_a_norm_of_ones_is_exact(self, width: int, place: str) -> None:
        # The mean is 0 and the variance 1 without rounding; linear layers that answer zeros leave two norms. PyTorch's
        # own norm multiplies with a reciprocal root that need not be 1.
        off = 0.0 if place in NATIVE else 1e-6
        operands = EncoderOperands.trivial(width)
        ones = torch.ones(5, width)
        ones[:, ::2] = -1
        x = torch.stack([row[torch.randperm(width)] for row in ones])[None]
        assert torch.allclose(operands.run(x), x, rtol=0, atol=off)
        weight, bias = torch.randint(-8, 9, (width,)) / 4, torch.randint(-8, 9, (width,)) / 4
        operands = replace(operands, norms=(operands.norms[0], Norm(weight, bias, 0.0)))
        assert torch.allclose(operands.run(x), x * weight + bias, rtol=0, atol=3 * off)

    @pytest.mark.parametrize(("width", "heads"), [(3, 1), (20, 2), (48, 3), (130, 2)])
    @pytest.mark.parametrize("length", [1, 2, 3, 7, 40])
    def test_a_query_that_sees_one_key_takes_its_value(self, width: int, heads: int, length: int) -> None:
        # The one weight is 1 whatever the scores are. Inputs are codes at scale 1, so that values and what the output
        # layer sees are the inputs of another token.
        operands = EncoderOperands.random(heads, width // heads, 5)
        linears = operands.linears | {"value": identity(width), "output": identity(width), "down": constant(width)}
        linears["down"] = replace(linears["down"], codes=torch.zeros(width, 5, dtype=torch.int8))
        operands = replace(operands, linears=linears, norms=(Norm.plain(width, 1e-5), Norm.plain(width, 1e-5)))
        x = torch.randint(-100, 156, (2, length, width)).float()
        x[..., 0], x[..., 1] = -100, 155
        order = torch.stack([torch.randperm(length), torch.randperm(length)])
        mask = torch.zeros(2, 1, length, length, dtype=torch.bool).scatter_(3, order[:, None, :, None], True)
        total = (x + torch.stack([x[0, order[0]], x[1, order[1]]])).double()
        once = torch.nn.functional.layer_norm(total, (width,), eps=1e-5)
        wanted = torch.nn.functional.layer_norm(once, (width,), eps=1e-5)
        for seen in (mask, torch.where(mask, 0.0, -torch.inf), torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
            assert torch.allclose(operands.run(x, seen).double(), wanted, rtol=0, atol=3e-6)

    @pytest.mark.parametrize("length", [1, 3, 5, 33])
    def test_a_query_that_sees_nothing_gets_the_bias_of_the_output_layer(self, length: int) -> None:
        operands = layer()
        x, mask = inputs(2, length, operands), torch.ones(2, 1, length, length, dtype=torch.bool)
        mask[0, :, -1] = False
        deaf = replace(operands, linears=operands.linears | {"output": constant(operands.width)})
        deaf.linears["output"].bias = operands.linears["output"].bias
        for seen in (mask, torch.where(mask, 0.0, -torch.inf)):
            assert same_bits(operands.run(x, seen)[0, -1], deaf.run(x)[0, -1])

    def test_a_mask_of_the_lowest_number_everywhere_sees_all_keys_alike(self) -> None:
        # What transformers' eager attention gets for a sample of padding only: the scores vanish in the sum.
        operands = layer()
        x = inputs(2, 6, operands)
        mask = torch.full((2, 1, 1, 6), torch.finfo(torch.float32).min)
        level = replace(operands, linears=operands.linears | {"query": constant(operands.width)})
        assert same_bits(operands.run(x, mask), level.run(x))


@KERNELS
@pytest.mark.usefixtures("place")
class TestSamples:
    @pytest.mark.parametrize("length", [1, 3, 7, 70])
    @pytest.mark.parametrize("samples", [2, 9])
    @pytest.mark.parametrize("masked", [True, False])
    def test_a_sample_depends_on_itself_alone(self, length: int, samples: int, masked: bool, threads: int) -> None:
        operands = layer(symmetric=False)
        x = inputs(samples, length, operands)
        mask = sees(samples, length, torch.Generator().manual_seed(4)) if masked else None
        together = operands.run(x, mask)
        for i in range(samples):
            own = None if mask is None else mask[i : i + 1]
            assert same_bits(operands.run(x[i : i + 1], own)[0], together[i])
        torch.set_num_threads(1)
        assert same_bits(operands.run(x, mask), together)

    @given(case=cases(), order=st.randoms(use_true_random=False))
    def test_the_order_of_samples_does_not_matter(
        self, case: tuple[EncoderOperands, Tensor, Tensor | None], order: Any
    ) -> None:
        operands, x, mask = case
        chosen = list(range(x.shape[0]))
        order.shuffle(chosen)
        moved = mask[chosen] if mask is not None and mask.shape[0] == x.shape[0] else mask
        assert same_bits(operands.run(x[chosen], moved), operands.run(x, mask)[chosen])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("masked", [True, False])
    def test_a_broken_sample_is_nan_and_harms_no_other(self, value: float, masked: bool) -> None:
        operands = layer(activation="silu")
        x = inputs(9, 20, operands)
        mask = torch.ones(9, 1, 1, 20, dtype=torch.bool) if masked else None
        clean = operands.run(x, mask)
        x[4, 7, 5] = value
        answer = operands.run(x, mask)
        assert bool(answer[4].isnan().all())
        others = [i for i in range(9) if i != 4]
        assert same_bits(answer[others], clean[others])

    def test_eight_threads_at_once_get_their_own_answers(self) -> None:
        layers = [layer(seed=seed, symmetric=bool(seed % 2)) for seed in range(4)]
        xs = [inputs(1 + i % 5, 3 + 9 * i, layers[0]) for i in range(8)]

        def work(index: int, start: Barrier | None = None) -> list[Tensor]:
            if start is not None:
                start.wait()
            return [operands.run(xs[index]) for operands in layers]

        wanted = [work(i) for i in range(8)]
        start = Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                for answer, want in zip(pool.map(work, range(8), [start] * 8), wanted, strict=True):
                    assert all(same_bits(a, b) for a, b in zip(answer, want, strict=True))

    @pytest.mark.parametrize("added", [1, 9, 60])
    def test_padding_changes_no_token(self, added: int) -> None:
        operands = layer()
        x = inputs(3, 7, operands)
        padded = torch.cat([x, torch.full((3, added, operands.width), 5.0)], dim=1)
        mask = torch.ones(3, 1, 1, 7 + added, dtype=torch.bool)
        mask[..., 7:] = False
        assert same_bits(operands.run(padded, mask)[:, :7], operands.run(x))


@pytest.mark.usefixtures("place")
class TestInputs:
    def test_strides_of_the_input_do_not_matter(self) -> None:
        operands = layer()
        x = inputs(4, 6, operands)
        wanted = operands.run(x)
        assert same_bits(operands.run(x.transpose(0, 1).contiguous().transpose(0, 1)), wanted)
        assert same_bits(operands.run(x.transpose(1, 2).contiguous().transpose(1, 2)), wanted)
        assert same_bits(operands.run(x[:1].expand(4, -1, -1)), wanted[:1].expand(4, -1, -1))

    def test_nothing_is_written_to(self) -> None:
        operands = layer()
        x, mask = inputs(2, 6, operands), torch.zeros(2, 1, 1, 6)
        arguments = operands.arguments(x, mask)
        before = [x.clone(), mask.clone(), *(tensor.clone() for tensor in operands.weights())]
        OPS.encoder_layer(*arguments)
        after = [x, mask, *arguments[2]]  # type: ignore[misc]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_no_tokens_give_no_answers(self) -> None:
        operands = layer()
        assert operands.run(torch.empty(2, 0, operands.width)).shape == (2, 0, operands.width)
        assert operands.run(torch.empty(0, 5, operands.width)).shape == (0, 5, operands.width)


def _replaced(index: int, tensor: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda weights: [*weights[:index], tensor, *weights[index + 1 :]]


BAD_WEIGHTS = {
    "one too few": lambda weights: weights[:-1],
    "none": lambda weights: [],
    "short norm weight": _replaced(-4 + 34, torch.ones(5)),
    "short norm bias": lambda weights: [*weights[:-1], torch.zeros(5)],
    "norm in half": lambda weights: [*weights[:-1], torch.zeros(57).half()],
    "short bias": _replaced(3, torch.zeros(5)),
    "short column sums": _replaced(1, torch.zeros(5, dtype=torch.int32)),
    "scales in double": _replaced(2, torch.ones(57).double()),
    "short zero points": _replaced(4, torch.zeros(5, dtype=torch.int8)),
    "plain codes": _replaced(0, torch.zeros(57, 57, dtype=torch.int8)),
    "tiles of another depth": _replaced(0, torch.zeros(4, 2, 16, 16, 4, dtype=torch.int8)),
    "tiles of another width": _replaced(0, torch.zeros(9, 1, 16, 16, 4, dtype=torch.int8)),
    "up in the place of output": lambda weights: [*weights[:15], *weights[20:25], *weights[20:]],
    "down of another depth": _replaced(5 * TENSORS_EACH, torch.zeros(4, 4, 16, 16, 4, dtype=torch.int8)),
}


@pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())
class TestRefusals:
    """The kernels read raw memory, so nothing that does not fit may reach them."""

    @pytest.mark.parametrize("change", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
    def test_weights_that_do_not_fit(self, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
        operands = layer()
        x, mask, weights, *numbers = operands.arguments(inputs(2, 5, operands))
        with ops.use_backend("native"), pytest.raises(REFUSED):
            OPS.encoder_layer(x, mask, change(weights), *numbers)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "mask",
        [
            torch.zeros(2, 1, 1, 4), torch.zeros(3, 1, 1, 5), torch.zeros(2, 3, 1, 5), torch.zeros(2, 1, 4, 5),
            torch.zeros(2, 5), torch.zeros(2, 1, 1, 5).double(), torch.zeros(2, 1, 1, 5, dtype=torch.int64),
        ],
        ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype}",
    )  # fmt: skip
    def test_masks_that_do_not_fit(self, mask: Tensor) -> None:
        operands = layer()
        with ops.use_backend("native"), pytest.raises(REFUSED):
            operands.run(inputs(2, 5, operands), mask)

    @pytest.mark.parametrize(
        "x",
        [torch.zeros(2, 5, 56), torch.zeros(2, 5, 0), torch.zeros(5, 57), torch.zeros(2, 5, 57).half()],
        ids=lambda x: f"{tuple(x.shape)} {x.dtype}",
    )
    def test_inputs_that_do_not_fit(self, x: Tensor) -> None:
        with ops.use_backend("native"), pytest.raises(REFUSED):
            layer().run(x)

    @pytest.mark.parametrize("heads", [0, -3, 2, 58])
    @pytest.mark.parametrize("backend_name", ["native", "reference"])
    def test_heads_that_do_not_divide_the_width(self, heads: int, backend_name: str) -> None:
        operands = replace(layer(), heads=heads, scale=1.0)
        with ops.use_backend(backend_name), pytest.raises(REFUSED):
            operands.run(inputs(2, 5, operands))

    @pytest.mark.parametrize("backend_name", ["native", "reference"])
    def test_an_activation_that_does_not_exist(self, backend_name: str) -> None:
        operands = replace(layer(), activation="softplus")
        with ops.use_backend(backend_name), pytest.raises(REFUSED, match="softplus"):
            operands.run(inputs(2, 5, operands))
