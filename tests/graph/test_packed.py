"""The layers of a static graph in their packed layouts: what other processes and other users of them see."""

from __future__ import annotations

import copy
import os
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from mono_quant import ops
from tests.graph.conftest import Example, leaves
from tests.spawning import SpawnedChild


@pytest.mark.parametrize("backend", ops.available_backends())
def test_a_spawned_process_inherits_descriptors_that_are_still_open(
    example: Example, backend: str, spawned_child: SpawnedChild
) -> None:
    model, inputs = copy.deepcopy(example.quantized), example.inputs(2)
    with ops.use_backend(backend):
        expected = leaves(model(*inputs))
        ForkingPickler.dumps(model)
        assert len(spawned_child.descriptors) == len(set(spawned_child.descriptors)) > 0
        for descriptor in spawned_child.descriptors:
            os.fstat(descriptor)
        for answer, want in zip(leaves(model(*inputs)), expected, strict=True):
            assert torch.equal(answer, want)
