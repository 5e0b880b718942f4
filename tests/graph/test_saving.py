"""Statically quantized models as JSON and plain tensors, copies and pickles."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant.errors import CheckpointError, InputError
from mono_quant.graph import describe_static, restore_static
from tests.graph.conftest import NETWORKS, Example, example_of, leaves


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_as_json_and_plain_tensors_it_answers_the_same(name: str) -> None:
    example = example_of(name)
    inputs = example.inputs(2)
    expected = example.quantized(*inputs)
    text = json.dumps(describe_static(example.quantized), allow_nan=False)
    state = example.quantized.state_dict()
    assert all(type(tensor) is Tensor and tensor.layout == torch.strided for tensor in state.values())
    restored = restore_static(json.loads(text), example.model)
    restored.load_state_dict(state)
    for a, b in zip(leaves(restored(*inputs)), leaves(expected), strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_answer_the_same(example: Example) -> None:
    inputs = example.inputs(2)
    expected = leaves(example.quantized(*inputs))
    for same in (copy.deepcopy(example.quantized), pickle.loads(pickle.dumps(example.quantized))):
        for a, b in zip(leaves(same(*inputs)), expected, strict=True):
            assert torch.equal(a, b)


def test_damaged_descriptions_are_refused() -> None:
    good = describe_static(example_of("residuals").quantized)
    text = json.dumps(good)
    damages: list[Any] = [
        {},
        {"kind": "graph"},
        {"kind": "graph", "graph": {"format_version": 99}},
        json.loads(text.replace('"kind": "conv"', '"kind": "spell"')),
        json.loads(text.replace('"int8"', '"int3"')),
        json.loads(text.replace('"stride"', '"pace"')),
        json.loads(text.replace('"inputs": [0]', '"inputs": [77]')),
        json.loads(text.replace("aten.reshape.default", "aten.from_file.default")),
        {"kind": "graph", "graph": {**good["graph"], "output": ["value", 999]}},
        {"kind": "graph", "graph": {**good["graph"], "output": ["set", []]}},
    ]
    for damaged in damages:
        with pytest.raises(CheckpointError):
            restore_static(damaged)


def test_layers_need_their_model() -> None:
    description = describe_static(example_of("decides").quantized)
    with pytest.raises(InputError, match="float architecture"):
        restore_static(description)
    with pytest.raises(InputError, match="no layer named"):
        restore_static(description, nn.ReLU())
    with pytest.raises(InputError, match="not a statically quantized model"):
        describe_static(nn.ReLU())


@pytest.mark.parametrize("name", ["residuals", "signals"])
def test_a_graph_can_be_copied_and_saved_while_it_first_runs(name: str) -> None:
    example = example_of(name)
    inputs = example.inputs(2)
    expected = leaves(copy.deepcopy(example.quantized)(*inputs))
    expected_state = example.quantized.state_dict()

    def look(model: nn.Module) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        return (
            leaves(copy.deepcopy(model)(*inputs)),
            leaves(pickle.loads(pickle.dumps(model))(*inputs)),
            model.state_dict(),
        )

    for _ in range(10):
        model = copy.deepcopy(example.quantized)
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(model, *inputs) for _ in range(2)]
            looking = [pool.submit(look, model) for _ in range(2)]
        found = [leaves(future.result()) for future in running]
        for future in looking:
            *answers, state = future.result()
            found += answers
            assert state.keys() == expected_state.keys()
            assert all(torch.equal(state[key], value) for key, value in expected_state.items())
        for answer in found:
            assert all(torch.equal(a, b) for a, b in zip(answer, expected, strict=True))
