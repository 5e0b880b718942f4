"""Comparisons: sizes, weights and outputs as they are, latencies by turns."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant.errors import ConfigurationError, InputTypeError
from mono_quant.report import Comparison, compare_models, cosine_similarity, model_bytes, sqnr_db
from tests.report.models import SCHEMES, network, quantized


@pytest.mark.parametrize("name", SCHEMES)
def test_sizes_weights_and_outputs_are_those_of_the_two_models(name: str) -> None:
    model, inputs = network(), torch.randn(16, 32)
    twin = quantized(model, SCHEMES[name])
    found = compare_models(model, twin, inputs, repeats=0)
    assert (found.original_bytes, found.quantized_bytes) == (model_bytes(model), model_bytes(twin))
    assert found.size_ratio == model_bytes(twin) / model_bytes(model) < 0.65
    assert [(layer.layer, layer.scheme) for layer in found.layers] == [
        (layer, str(SCHEMES[name])) for layer in ("0", "3.0", "4")
    ]
    weight, twin_weight = model[0].weight, twin.get_submodule("0").weight
    assert isinstance(twin_weight, Tensor)
    assert found.layers[0].sqnr_db == pytest.approx(sqnr_db(weight, twin_weight))
    with torch.no_grad():
        exact, approximate = model(inputs), twin(inputs)
    (output,) = found.outputs
    assert output.sqnr_db == pytest.approx(sqnr_db(exact, approximate), abs=0.5)
    assert output.cosine == pytest.approx(cosine_similarity(exact, approximate), abs=1e-3)
    assert found.latency is None
    assert found.warnings == ()


def test_the_ratio_over_all_weights_lies_between_the_layers() -> None:
    model = network()
    found = compare_models(model, quantized(model, SCHEMES["int4"]))
    each = [layer.sqnr_db for layer in found.layers]
    assert found.weight_sqnr_db is not None
    assert min(each) <= found.weight_sqnr_db <= max(each)


@pytest.mark.parametrize("name", SCHEMES)
def test_state_dicts_are_compared_like_the_models_they_come_from(name: str) -> None:
    model = network()
    twin = quantized(model, SCHEMES[name])
    expected = compare_models(model, twin)
    for first, second in (
        (model, twin.state_dict()),
        (model.state_dict(), twin),
        (model.state_dict(), twin.state_dict()),
    ):
        found = compare_models(first, second)
        assert found.weight_sqnr_db == expected.weight_sqnr_db
        assert {layer.layer: layer.sqnr_db for layer in found.layers} == {
            layer.layer: layer.sqnr_db for layer in expected.layers
        }


def test_tied_layers_count_once_in_the_ratio_over_all_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    nn.init.uniform_(model[1].weight)
    twin = quantized(model, SCHEMES["int8"])
    expected = compare_models(model, twin).weight_sqnr_db
    thrice = nn.Sequential(model[0], model[1], nn.Linear(64, 64, bias=False))
    thrice[2].weight = model[0].weight
    state = twin.state_dict()
    state |= {name.replace("0.", "2."): tensor for name, tensor in state.items() if name.startswith("0.")}
    assert compare_models(thrice, state).weight_sqnr_db == expected


def test_a_model_that_has_run_compares_like_one_that_has_not() -> None:
    model = network()
    twin = quantized(model, SCHEMES["int8"])
    before = compare_models(model, twin)
    twin(torch.ones(2, 32))
    assert compare_models(model, twin) == before


def test_models_without_our_layers_are_compared_by_size_and_outputs() -> None:
    model = network()
    found = compare_models(model, network(), torch.ones(2, 32), repeats=0)
    assert (found.layers, found.weight_sqnr_db, found.size_ratio) == ((), None, 1.0)
    assert found.outputs[0].sqnr_db == math.inf


def test_a_layer_that_the_original_lacks_is_named_in_the_warnings() -> None:
    model = network()
    twin = quantized(model, SCHEMES["int8"])
    found = compare_models(nn.Sequential(*list(model)[:4]), twin)
    assert found.warnings == ("the original has no layer '4'",)
    assert [layer.layer for layer in found.layers] == ["0", "3.0"]


def test_latencies_are_medians_of_calls_that_take_turns() -> None:
    calls: list[str] = []

    class Recorder(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.name)
            torch.randn(400, 400) @ torch.randn(400, 400)
            return x

    rounds: list[tuple[int, int]] = []
    found = compare_models(
        Recorder("a"),
        Recorder("b"),
        torch.ones(1),
        repeats=4,
        progress=lambda done, total: rounds.append((done, total)),
    )
    assert found.latency is not None
    assert found.latency.repeats == 4
    assert found.latency.ratio == found.latency.quantized / found.latency.original
    assert found.latency.original > 0
    assert rounds == [(0, 4), (1, 4), (2, 4), (3, 4)]
    turns = [name for name, before in zip(calls[1:], calls, strict=False) if name != before]
    assert len(turns) >= 5


def test_models_keep_their_mode_and_original_is_not_touched() -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare_models(model, quantized(model, SCHEMES["int8"]), torch.randn(4, 32), repeats=1)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_comparison_is_plain_values_for_json() -> None:
    model = network()
    found = compare_models(model, quantized(model, SCHEMES["int8"]), torch.ones(2, 32), repeats=1)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["layers"][0]["layer"] == "0"
    assert document["latency"]["repeats"] == 1
    assert set(document) == set(Comparison.__dataclass_fields__)


@pytest.mark.parametrize(
    ("first", "second", "options", "error"),
    [
        (network(), network(), {"inputs": torch.ones(2, 32), "repeats": -1}, ConfigurationError),
        (network(), network().state_dict(), {"inputs": torch.ones(2, 32)}, InputTypeError),
        (3, network(), {}, InputTypeError),
    ],
)
def test_what_cannot_be_compared_is_refused(first: Any, second: Any, options: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        compare_models(first, second, **options)
