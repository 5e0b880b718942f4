"""``decoder_layers``: all layers in one call answer what they answer one by one, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.ops import native
from mono_quant.ops.decoder_stack_reference import release_decoder_layers
from tests.ops.operands import OPS, REFUSED, same_bits
from tests.ops.test_decoder import DTYPES, Decoder, isa, threads

__all__ = ["isa", "threads"]  # fixtures

EPS = (1e-5, 1e-6)

# Whether a forked process can take and give back the lock around held layers while other threads do nothing else.
FORKING = """
import ctypes, os, signal, sys, threading
from mono_quant.ops import native

release = ctypes.CDLL(str(native.LIBRARY)).mono_quant_release_decoder_layers
release.argtypes = [ctypes.c_int64]
sys.setswitchinterval(1e-5)
stopped = threading.Event()

def keep_releasing():
    while not stopped.is_set():
        release(-1)

threads = [threading.Thread(target=keep_releasing) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(50):
    process = os.fork()
    if process == 0:
        signal.alarm(5)
        release(-1)
        os._exit(0)
    if os.waitpid(process, 0)[1] != 0:
        stopped.set()
        raise SystemExit("a child never got the lock")
stopped.set()
"""


def layers(count: int = 3, **options: Any) -> list[Decoder]:
    return [Decoder.random(seed=10 * i, **options) for i in range(count)]


@contextmanager
def held(decoders: list[Decoder]) -> Iterator[int]:
    """Answer the number of the layers for a ``with`` block."""
    one = decoders[0]
    weights = [tensor for decoder in decoders for tensor in decoder.weights]
    number = OPS.hold_decoder_layers(
        weights, one.key_heads * one.group, one.key_heads, one.depth, one.depth**-0.5, EPS * len(decoders),
        one.activation,
    )  # fmt: skip
    try:
        yield number
    finally:
        release_decoder_layers(number)
        native.release_decoder_layers(number)


class Sequence:
    """Hidden states, and for each layer keys and values of a past."""

    def __init__(self, decoders: list[Decoder], samples: int, length: int, past: int) -> None:
        self.decoders = decoders
        self.x, _, _, self.cosine, self.sine = decoders[0].inputs(samples, length, past)
        pasts = [decoder.inputs(samples, length, past, seed=i)[1:3] for i, decoder in enumerate(decoders)]
        self.keys, self.values = [keys for keys, _ in pasts], [values for _, values in pasts]

    def one_by_one(self, mask: Tensor | None, causal: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, grown = self.x, []
        for decoder, keys, values in zip(self.decoders, self.keys, self.values, strict=True):
            x, *cache = decoder.run((x, keys, values, self.cosine, self.sine), mask, causal)
            grown.append(cache)
        return x, [keys for keys, _ in grown], [values for _, values in grown]

    def together(self, mask: Tensor | None, causal: bool, number: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        answer: tuple[Tensor, list[Tensor], list[Tensor]] = OPS.decoder_layers(
            number, self.x, self.keys, self.values, self.cosine, self.sine, mask, causal
        )
        return answer

    def static(self, mask: Tensor | None, causal: bool, number: int, room: int) -> tuple[Tensor, ...]:
        past, length = self.keys[0].shape[2], self.x.shape[1]
        samples, heads, _, depth = self.keys[0].shape
        shape = samples, heads, past + length + room, depth
        caches = [torch.full(shape, 7.0, dtype=self.x.dtype) for _ in range(2 * len(self.keys))]
        for cache, known in zip(caches, [*self.keys, *self.values], strict=True):
            cache[:, :, :past] = known
        count = len(self.keys)
        positions = [torch.tensor(past) for _ in range(count)]
        out: Tensor = OPS.decoder_layers_static_cache(
            number, self.x, caches[:count], caches[count:], positions, self.cosine, self.sine, mask, causal
        )
        assert all(int(position) == past for position in positions)
        return out, *caches


def same(found: Any, wanted: Any) -> bool:
    return all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def seen(samples: int, length: int, keys: int) -> Tensor:
    mask = torch.rand(samples, 1, length, keys, generator=torch.Generator().manual_seed(keys)) < 0.7
    mask[..., 0] = True
    return mask


@pytest.mark.usefixtures("isa")
class TestEveryInstructionSet:
    @given(
        count=st.integers(1, 4), samples=st.sampled_from((0, 1, 3)), past=st.sampled_from((0, 1, 65)),
        length=st.one_of(st.integers(1, 40), st.just(300)), masked=st.booleans(), causal=st.booleans(),
        symmetric=st.booleans(), bits=st.sampled_from(((), (4,), (0, 8, 4))), dtype=st.sampled_from(DTYPES),
    )  # fmt: skip
    def test_together_is_one_by_one(
        self, count: int, samples: int, past: int, length: int, masked: bool, causal: bool, symmetric: bool,
        bits: tuple[int, ...], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        decoders = layers(count, symmetric=symmetric, bits=bits, dtype=dtype)
        sequence, whole = Sequence(decoders, samples, length, past), past + length
        mask = seen(samples, length, whole) if masked else None
        wanted = sequence.one_by_one(mask, causal)
        with held(decoders) as number:
            out, keys, values = sequence.together(mask, causal, number)
            assert same([out, *keys, *values], [wanted[0], *wanted[1], *wanted[2]])
            hidden = None if mask is None else torch.cat([mask, torch.zeros(*mask.shape[:3], 5) > 0], -1)
            out, *caches = sequence.static(hidden, causal, number, 5)
        assert same_bits(out, wanted[0])
        assert same([cache[:, :, :whole].contiguous() for cache in caches], [*wanted[1], *wanted[2]])
        assert all(bool((cache[:, :, whole:] == 7).all()) for cache in caches)

    def test_any_number_of_threads_gives_the_same(self, threads: int) -> None:
        decoders = layers()
        for length in (1, 2, 40, 300):
            sequence = Sequence(decoders, 2, length, 9)
            with held(decoders) as number:
                found = sequence.together(None, True, number)
                torch.set_num_threads(1)
                wanted = sequence.together(None, True, number)
                torch.set_num_threads(threads)
            assert same([found[0], *found[1], *found[2]], [wanted[0], *wanted[1], *wanted[2]])

    def test_eight_threads_at_once_get_their_own_answers(self) -> None:
        decoders = layers()
        sequences = [Sequence(decoders, 1, 1 + 7 * i, 5 * i) for i in range(6)]
        with held(decoders) as number:
            wanted = [sequence.together(None, True, number)[0] for sequence in sequences]
            with ThreadPoolExecutor(max_workers=8) as pool:
                answers = list(pool.map(lambda s: s.together(None, True, number)[0], sequences * 4))
        assert same(answers, wanted * 4)

    def test_what_is_written_into_a_weight_is_seen_as_well_as_other_data(self) -> None:
        decoders = layers(2)
        sequence = Sequence(decoders, 1, 3, 2)
        with held(decoders) as number:
            before = sequence.together(None, True, number)[0]
            scale, norm = decoders[1].weights[2], decoders[0].weights[-1]
            scale.mul_(2)
            written = sequence.together(None, True, number)[0]
            assert same_bits(written, sequence.one_by_one(None, True)[0])
            norm.data = norm * 3
            exchanged = sequence.together(None, True, number)[0]
            assert same_bits(exchanged, sequence.one_by_one(None, True)[0])
            assert not torch.equal(before, written)
            assert not torch.equal(written, exchanged)
            norm.data = torch.ones(5)
            with pytest.raises(RuntimeError, match="data of another kind"):
                sequence.together(None, True, number)

    @pytest.mark.parametrize("bits", [(), (4,)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_tensor_is_seen_where_it_is_now(self, bits: tuple[int, ...], dtype: torch.dtype) -> None:
        decoders = layers(2, bits=bits, symmetric=False, dtype=dtype)
        for decoder in decoders:
            decoder.weights[3] = decoder.weights[3].to(dtype)  # a bias may be of another dtype than float32
        sequence = Sequence(decoders, 1, 3, 2)
        answers = []
        with held(decoders) as number:
            for tensor in [*decoders[0].weights[:5], *decoders[1].weights[-6:]]:
                if tensor.numel() == 1:
                    continue  # the number of bits: what it says of the others must stay
                tensor.share_memory_()
                # Not what any tensor held before, and whatever the old memory holds by now is something else.
                tensor.data = torch.zeros_like(tensor) if tensor.dtype in (torch.int8, torch.int32) else tensor * 2
                answers.append(sequence.together(None, True, number)[0])
                assert same_bits(answers[-1], sequence.one_by_one(None, True)[0])
        assert not torch.equal(answers[0], answers[-1])

    def test_data_of_another_kind_is_refused(self) -> None:
        for place, other in ((0, torch.zeros(1, dtype=torch.int8)), (3, torch.zeros(120, dtype=torch.float64))):
            decoders = layers(2)
            sequence = Sequence(decoders, 1, 3, 2)
            with held(decoders) as number:
                decoders[1].weights[place].data = other
                with pytest.raises(RuntimeError, match=r"data of another kind|must be float32, bfloat16 or float16"):
                    sequence.together(None, True, number)


@pytest.mark.usefixtures("backend")
class TestWhatIsRefused:
    def test_a_number_that_nobody_knows(self) -> None:
        decoders = layers(2)
        with held(decoders) as number:
            pass
        sequence = Sequence(decoders, 1, 3, 2)
        with pytest.raises(REFUSED, match=f"no decoder layers of number {number}"):
            sequence.together(None, True, number)
        with pytest.raises(REFUSED, match="no decoder layers of number"):
            sequence.static(None, True, number, 3)

    @pytest.mark.parametrize("change", ["none", "weights", "eps"])
    def test_a_number_of_weights(self, change: str) -> None:
        weights = layers(1)[0].weights
        weights = [] if change == "none" else weights[:-1] if change == "weights" else weights
        with pytest.raises(REFUSED):
            OPS.hold_decoder_layers(weights, 6, 2, 20, 0.2, EPS[:1] if change == "eps" else EPS, "silu")

    def test_keys_of_other_heads_or_a_layer_too_few(self) -> None:
        decoders = layers(2)
        sequence = Sequence(decoders, 1, 3, 2)
        with held(decoders) as number:
            keys = sequence.keys
            sequence.keys = [t[..., :-2] for t in keys]
            with pytest.raises(REFUSED):
                sequence.together(None, True, number)
            sequence.keys = keys[:1]
            with pytest.raises((*REFUSED, ValueError)):
                sequence.together(None, True, number)

    @pytest.mark.parametrize("heads", [2**60 + 6, 0, -6])
    def test_a_number_of_heads_that_cannot_be(self, heads: int) -> None:
        decoders = layers(1)

        def run() -> None:
            number = OPS.hold_decoder_layers(decoders[0].weights, heads, 2, 20, 0.2, EPS, "silu")
            try:
                Sequence(decoders, 1, 3, 2).together(None, True, number)
            finally:
                release_decoder_layers(number)
                native.release_decoder_layers(number)

        with pytest.raises(REFUSED):
            run()

    def test_a_position_beyond_all_numbers(self) -> None:
        decoders = layers(1)
        sequence = Sequence(decoders, 1, 3, 2)
        keys = torch.zeros(1, 2, 8, 20)
        with held(decoders) as number, pytest.raises(REFUSED):
            OPS.decoder_layers_static_cache(
                number, sequence.x, [keys], [keys.clone()], [torch.tensor(2**63 - 2)], sequence.cosine, sequence.sine,
                None, True,
            )  # fmt: skip

    def test_a_cache_without_room(self) -> None:
        decoders = layers(2)
        sequence = Sequence(decoders, 1, 3, 2)
        with held(decoders) as number, pytest.raises(REFUSED, match="a cache for 4 tokens got 3 at position 2"):
            sequence.static(None, True, number, -1)


def test_the_specification_calls_one_layer_after_the_other() -> None:
    decoders = layers(2)
    sequence = Sequence(decoders, 2, 3, 4)
    with ops.use_backend("reference"), held(decoders) as number:
        wanted = sequence.one_by_one(None, True)
        found = sequence.together(None, True, number)
        static = sequence.static(None, True, number, 0)
    assert same([found[0], *found[1], *found[2]], [wanted[0], *wanted[1], *wanted[2]])
    assert same(static, [wanted[0], *wanted[1], *wanted[2]])


@pytest.mark.skipif(not native.is_loaded() or not hasattr(os, "fork"), reason="no native library, or no forks")
def test_a_process_forked_while_layers_are_released_can_release_them() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
