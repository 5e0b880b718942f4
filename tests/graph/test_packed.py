"""The layers of a static graph in their packed layouts: what other processes and other users of them see."""

from __future__ import annotations

import copy
import os
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from mono_quant import ops
from mono_quant.errors import InputTypeError
from mono_quant.graph.layers.packed import PackedLayer
from tests.graph.conftest import Example, example_of, leaves
from tests.spawning import SpawnedChild


def packed_layers(model: nn.Module) -> list[PackedLayer]:
    found = [module for module in model.modules() if isinstance(module, PackedLayer)]
    assert found
    return found


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


def test_codes_can_be_assigned_before_and_after_it_ran() -> None:
    model, x = copy.deepcopy(example_of("residuals").quantized), torch.randn(2, 3, 32, 32)
    for _ in range(2):
        for layer in packed_layers(model):
            halved = torch.div(layer.codes, 2, rounding_mode="trunc")
            layer.weight = halved
            assert torch.equal(layer.codes, halved)
        twin = copy.deepcopy(model)
        assert torch.equal(model(x), twin(x))
    with pytest.raises(InputTypeError, match="cannot be set"):
        layer.weight = halved[:1]
    with pytest.raises(InputTypeError, match="cannot be set"):
        layer.weight = halved.float()
