"""A layer moves into tiles while other threads and processes look at it: they see one layout or the other, whole."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant import ops
from mono_quant.modules import QuantizedLinear, packed
from tests.modules.layers import ASYMMETRIC, SYMMETRIC, quantize
from tests.spawning import SpawnedChild

needs_native = pytest.mark.skipif(ops.get_backend() != "native", reason="only native kernels have tiles")


def packed_layer() -> QuantizedLinear:
    layer = quantize(nn.Linear(70, 18), SYMMETRIC)
    assert isinstance(layer, QuantizedLinear)
    layer(torch.randn(2, 70))
    assert "packed_weight" in layer._buffers
    return layer


@needs_native
def test_a_spawned_process_inherits_descriptors_that_are_still_open(spawned_child: SpawnedChild) -> None:
    model = nn.Sequential(packed_layer(), packed_layer())
    ForkingPickler.dumps(model)
    assert len(spawned_child.descriptors) == len(set(spawned_child.descriptors)) == 6
    for descriptor in spawned_child.descriptors:
        os.fstat(descriptor)


@needs_native
def test_packing_leaves_what_others_iterate_over_as_it_is() -> None:
    layer = quantize(nn.Linear(70, 18), SYMMETRIC)
    names = iter(layer.named_buffers())
    first = next(names)
    layer(torch.randn(2, 70))
    assert {name for name, _ in (first, *names)} == {"weight", "weight_scale", "bias"}


@needs_native
def test_a_layer_can_be_copied_and_saved_while_it_first_runs() -> None:
    x = torch.randn(2, 70)

    def look(layer: nn.Module) -> list[Tensor]:
        return [
            copy.deepcopy(layer)(x),
            pickle.loads(pickle.dumps(layer))(x),
            *layer.state_dict().values(),
        ]

    for _ in range(30):
        model = nn.Sequential(*(quantize(nn.Linear(70, 70), SYMMETRIC) for _ in range(4)))
        expected = look(copy.deepcopy(model))
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(model, x) for _ in range(2)]
            looking = [pool.submit(look, model) for _ in range(2)]
        assert all(torch.equal(future.result(), expected[0]) for future in running)
        for future in looking:
            found = future.result()
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_forked_while_another_thread_packs_can_pack() -> None:
    layer = quantize(nn.Linear(70, 18), SYMMETRIC)
    with packed._lock:
        process = os.fork()
        if process == 0:
            signal.alarm(20)
            assert isinstance(layer, QuantizedLinear)
            os._exit(0 if layer._pack()[0].numel() else 1)
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.parametrize("backend", ops.available_backends())
def test_functional_call_takes_the_state_of_a_layer_before_and_after_it_ran(backend: str) -> None:
    with ops.use_backend(backend):
        layer, other = (quantize(nn.Linear(70, 18), ASYMMETRIC) for _ in range(2))
        x = torch.randn(2, 70)
        theirs = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        expected = copy.deepcopy(layer)(x), copy.deepcopy(other)(x)
        for _ in range(2):
            for _ in range(2):
                assert torch.equal(functional_call(layer, dict(layer.state_dict()), (x,)), expected[0])
                assert torch.equal(functional_call(layer, theirs, (x,)), expected[1])
            assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in theirs.items())
            assert set(layer.state_dict()) == set(theirs)
            assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected[0])
            assert torch.equal(layer(x), expected[0])
