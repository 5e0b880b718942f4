"""Fused runs copy biases, scales and tables: what becomes of these later is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant import ops
from mono_quant.errors import InputError, InputTypeError
from mono_quant.graph import StaticGraph, StaticOptions, quantize_static
from mono_quant.graph.arithmetic import QParams
from mono_quant.graph.layers.conv import QuantizedConvolution
from mono_quant.graph.layers.elementwise import Table


def network() -> StaticGraph:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.Sigmoid(), nn.Conv2d(8, 4, 1)
    )
    # Without their correction, biases that the float layers lack stay absent.
    quantized, _ = quantize_static(model.eval(), torch.randn(16, 3, 9, 9), StaticOptions(correct_bias=False))
    assert isinstance(quantized, StaticGraph)
    return quantized


def part(model: StaticGraph, kind: type, index: int = 0) -> Any:
    return [layer for layer in model.layers if isinstance(layer, kind)][index]


def exchange(tensor: Tensor) -> None:
    tensor.data = tensor + 0.5


def write_in_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(0.5)


def describe_anew(layer: QuantizedConvolution) -> None:
    layer.spec = replace(layer.spec, input=QParams(0.05, 3))


def place_of(model: StaticGraph, kind: type) -> int:
    return next(place for place, layer in enumerate(model.layers) if isinstance(layer, kind))


def assign_layer(model: StaticGraph) -> None:
    place = place_of(model, QuantizedConvolution)
    other = copy.deepcopy(model.layers[place])
    other.bias += 1.0
    model.layers[place] = other


def assign_layers(model: StaticGraph) -> None:
    others = copy.deepcopy(model.layers)
    others[place_of(model, QuantizedConvolution)].bias += 1.0
    model.layers = others


def wrap_layer(model: StaticGraph) -> None:
    place = place_of(model, Table)
    inverse = copy.deepcopy(model.layers[place])
    inverse.table = torch.arange(255, -1, -1).to(torch.uint8)
    model.layers[place] = nn.Sequential(model.layers[place], inverse)


CHANGES: dict[str, Callable[[StaticGraph], Any]] = {
    "bias written to": lambda model: part(model, QuantizedConvolution).bias.add_(1.0),
    "bias replaced": lambda model: setattr(part(model, QuantizedConvolution), "bias", torch.full((8,), 0.5)),
    "bias removed": lambda model: setattr(part(model, QuantizedConvolution, 2), "bias", None),
    "bias added": lambda model: setattr(part(model, QuantizedConvolution, 1), "bias", torch.ones(8)),
    "bias exchanged": lambda model: exchange(part(model, QuantizedConvolution).bias),
    "scales written to": lambda model: part(model, QuantizedConvolution, 1).weight_scale.copy_(torch.full((8,), 0.01)),
    "scales in inference mode": lambda model: write_in_inference_mode(part(model, QuantizedConvolution).weight_scale),
    "table written to": lambda model: part(model, Table).table.copy_(torch.arange(255, -1, -1)),
    "table replaced": lambda model: setattr(part(model, Table), "table", torch.arange(255, -1, -1).to(torch.uint8)),
    "description replaced": lambda model: describe_anew(part(model, QuantizedConvolution, 2)),
    "layer replaced": assign_layer,
    "layer replaced by another module": wrap_layer,
    "all layers replaced": assign_layers,
    "one layer loaded": lambda model: part(model, QuantizedConvolution).load_state_dict(
        {name: t // 2 for name, t in part(model, QuantizedConvolution).state_dict().items()}
    ),
}  # fmt: skip


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_by_the_next_call(name: str) -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    assert part(model, QuantizedConvolution, 1).bias is None
    before = model(x)
    with torch.no_grad():
        CHANGES[name](model)
    after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(model)(x))
    assert torch.equal(after, model(x))


@pytest.mark.usefixtures("backend")
def test_layers_of_another_number_are_refused() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    model(x)
    del model.layers[-1]
    with pytest.raises(InputError, match=r"5 steps, found 4 layers"):
        model(x)


def test_a_module_that_is_no_layer_of_a_graph_is_not_saved() -> None:
    model = network()
    wrap_layer(model)
    with pytest.raises(InputTypeError, match=r"step '3' .* is a Sequential"):
        model.describe()


@pytest.mark.usefixtures("backend")
def test_writes_to_inference_tensors_are_seen_as_well() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        bias = torch.full((8,), 0.5)
    part(model, QuantizedConvolution).bias = bias
    before = model(x)
    with torch.inference_mode():
        bias.mul_(-1)
    after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(model)(x))


def test_runs_stay_in_use_while_nothing_changes() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    model(x)
    runs = model._runs
    if not runs:
        pytest.skip("the native kernels do not run here")
    model(x)
    with torch.inference_mode():
        model(x[:1])
    assert model._runs is runs
    with torch.no_grad():
        part(model, QuantizedConvolution).bias.add_(1.0)
    model(x)
    made = model._runs
    model(x)
    assert made is not runs
    assert model._runs is made


def test_layers_quantized_in_inference_mode_hold_tensors_that_count_their_versions() -> None:
    with torch.inference_mode():
        model = network()
    assert not any(buffer.is_inference() for buffer in model.buffers())


@pytest.mark.skipif("native" not in ops.available_backends(), reason="the native kernels do not run here")
def test_a_layer_in_two_places_runs_by_itself_and_leaves_runs_in_use() -> None:
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Conv2d(4, 4, 3), nn.ReLU())))
    x = torch.randn(4, 4, 12, 12)
    graph, _ = quantize_static(model.eval(), x, StaticOptions())
    assert isinstance(graph, StaticGraph)
    places = [place for place, layer in enumerate(graph.layers) if isinstance(layer, QuantizedConvolution)]
    graph.layers[places[1]] = graph.layers[places[2]]
    with ops.use_backend("reference"):
        wanted = graph(x)
    with ops.use_backend("native"):
        torch.testing.assert_close(graph(x), wanted, rtol=1e-5, atol=1e-5)
        runs = graph._runs
        graph(x)
        assert graph._runs is runs
