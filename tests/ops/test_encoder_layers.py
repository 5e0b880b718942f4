"""``encoder_layers``: all layers in one call answer what they answer one by one, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.ops import native
from mono_quant.ops.encoder_stack_reference import release_encoder_layers
from tests.ops.encoder_layers import EncoderOperands, sees
from tests.ops.operands import OPS, REFUSED, same_bits
from tests.ops.test_encoder import KERNELS, inputs, place, threads

__all__ = ["place", "threads"]  # fixtures


def layers(count: int = 3, wide: tuple[int, ...] = (131, 40, 200), symmetric: bool = True) -> list[EncoderOperands]:
    """Layers of one width whose feed-forward parts are not of one."""
    return [EncoderOperands.random(3, 19, wide[i % len(wide)], symmetric=symmetric, seed=10 * i) for i in range(count)]


@contextmanager
def held(each: list[EncoderOperands], weights: list[Tensor] | None = None) -> Iterator[int]:
    """Answer the number of the layers for a ``with`` block."""
    if weights is None:
        weights = [tensor for operands in each for tensor in operands.weights()]
    eps = [norm.eps for operands in each for norm in operands.norms]
    number = OPS.hold_encoder_layers(weights, each[0].heads, each[0].scale, eps, each[0].activation)
    try:
        yield number
    finally:
        release_encoder_layers(number)
        native.release_encoder_layers(number)


def one_by_one(each: list[EncoderOperands], x: Tensor, mask: Tensor | None = None) -> Tensor:
    for operands in each:
        x = operands.run(x, mask)
    return x


@pytest.mark.usefixtures("place")
class TestOneCall:
    @given(
        count=st.integers(1, 4),
        samples=st.integers(0, 5),
        length=st.integers(0, 40),
        symmetric=st.booleans(),
        masked=st.booleans(),
        rounded=st.booleans(),
    )
    def test_answers_what_the_layers_answer(
        self, count: int, samples: int, length: int, symmetric: bool, masked: bool, rounded: bool
    ) -> None:
        each = layers(count, symmetric=symmetric)
        x = inputs(samples, length, each[0]).to(torch.bfloat16 if rounded else torch.float32)
        before = x.clone()
        mask = sees(samples, length, torch.Generator().manual_seed(4)) if masked else None
        with held(each) as number:
            answer = OPS.encoder_layers(number, x, mask)
        assert same_bits(answer, one_by_one(each, x, mask))
        assert torch.equal(x, before)

    def test_strides_of_the_input_do_not_matter(self) -> None:
        each = layers(2)
        x = inputs(4, 6, each[0])
        with held(each) as number:
            wanted = OPS.encoder_layers(number, x, None)
            assert same_bits(OPS.encoder_layers(number, x.transpose(0, 1).contiguous().transpose(0, 1), None), wanted)


@KERNELS
@pytest.mark.usefixtures("place")
class TestThreads:
    @pytest.mark.parametrize(("samples", "length"), [(1, 1), (1, 70), (3, 33), (9, 70)])
    def test_their_number_does_not_matter(self, samples: int, length: int, threads: int) -> None:
        each = layers()
        x = inputs(samples, length, each[0])
        with held(each) as number:
            answer = OPS.encoder_layers(number, x, None)
        torch.set_num_threads(1)
        assert same_bits(answer, one_by_one(each, x))

    def test_eight_at_once_get_their_own_answers(self) -> None:
        each = layers()
        xs = [inputs(1 + i % 5, 3 + 9 * i, each[0]) for i in range(8)]
        start = Barrier(8)
        with held(each) as number:
            wanted = [OPS.encoder_layers(number, x, None) for x in xs]

            def work(x: Tensor) -> Tensor:
                start.wait()
                answer: Tensor = OPS.encoder_layers(number, x, None)
                return answer

            with ThreadPoolExecutor(8) as pool:
                for _ in range(3):
                    assert all(same_bits(a, b) for a, b in zip(pool.map(work, xs), wanted, strict=True))


@KERNELS
@pytest.mark.usefixtures("place")
class TestWhatIsHeld:
    def test_what_is_written_into_weights_or_put_in_their_place_is_seen(self) -> None:
        each = layers(2, symmetric=False)
        weights = [tensor for operands in each for tensor in operands.weights()]
        x = inputs(2, 5, each[0])

        def alone(at: int, x: Tensor) -> Tensor:
            _, _, _, *numbers = each[at].arguments(x)
            half = len(weights) // 2
            answer: Tensor = OPS.encoder_layer(x, None, weights[at * half : (at + 1) * half], *numbers)
            return answer

        with held(each, weights) as number:
            before = OPS.encoder_layers(number, x, None)
            for tensor in weights:
                tensor.share_memory_()
                if tensor.dtype == torch.float32:
                    tensor.data = tensor * 1.25
            noise = [torch.randn(4, 1000) for _ in range(50)]  # where the weights were
            answer = OPS.encoder_layers(number, x, None)
            assert same_bits(answer, alone(1, alone(0, x)))
            assert not torch.equal(answer, before)
            weights[-1].zero_()
            assert same_bits(OPS.encoder_layers(number, x, None), alone(1, alone(0, x)))
            del noise

    @pytest.mark.parametrize(
        ("at", "other"),
        [
            (0, torch.zeros(1, dtype=torch.int8)),
            (1, torch.zeros(57, dtype=torch.int64)),
            (2, torch.ones(3)),
            (3, torch.zeros(57, dtype=torch.float64)),
            (-1, torch.zeros(56)),
            (-2, torch.zeros(57, dtype=torch.float64)),
            (-2, torch.zeros(57, dtype=torch.bfloat16)),
        ],
        ids=str,
    )
    def test_data_of_another_kind_is_refused(self, at: int, other: Tensor) -> None:
        each = layers(2)
        weights = [tensor for operands in each for tensor in operands.weights()]
        with held(each, weights) as number:
            weights[at].data = other
            with pytest.raises(RuntimeError, match=r"data of another kind|must be float32, bfloat16 or float16"):
                OPS.encoder_layers(number, inputs(1, 3, each[0]), None)


CHANGES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "none": lambda weights: [],
    "one too few": lambda weights: weights[:-1],
    "layers of another width": lambda weights: [
        *weights[: len(weights) // 2], *EncoderOperands.random(2, 9, 21).weights(),
    ],
}  # fmt: skip


@pytest.mark.usefixtures("backend")
class TestWhatIsRefused:
    def test_a_number_that_nobody_knows(self) -> None:
        each = layers(1)
        with held(each) as number:
            pass
        with pytest.raises(REFUSED, match=f"no encoder layers of number {number}"):
            OPS.encoder_layers(number, inputs(1, 3, each[0]), None)

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_weights_that_do_not_fit(self, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
        each = layers(2)
        weights = change([tensor for operands in each for tensor in operands.weights()])

        def run() -> None:
            with held(each, weights) as number:
                OPS.encoder_layers(number, inputs(1, 3, each[0]), None)

        with pytest.raises(REFUSED):
            run()

    def test_another_number_of_eps(self) -> None:
        each = layers(1)
        with pytest.raises(REFUSED):
            OPS.hold_encoder_layers(each[0].weights(), each[0].heads, 1.0, [1e-5], "gelu")

    @pytest.mark.parametrize("x", [torch.zeros(2, 5, 56), torch.zeros(5, 57)], ids=lambda x: str(tuple(x.shape)))
    def test_inputs_that_do_not_fit(self, x: Tensor) -> None:
        with held(layers(1)) as number, pytest.raises((*REFUSED, ValueError)):
            OPS.encoder_layers(number, x, None)

    def test_a_mask_that_does_not_fit(self) -> None:
        each = layers(1)
        with held(each) as number, pytest.raises(REFUSED):
            OPS.encoder_layers(number, inputs(2, 5, each[0]), torch.zeros(2, 1, 1, 4))


def test_the_specification_calls_one_layer_after_the_other() -> None:
    each = layers(2)
    x, mask = inputs(2, 5, each[0]), torch.zeros(2, 1, 1, 5)
    with ops.use_backend("reference"), held(each) as number:
        assert same_bits(OPS.encoder_layers(number, x, mask), one_by_one(each, x, mask))
