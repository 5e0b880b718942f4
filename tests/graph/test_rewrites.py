"""Folding, fusing and equalizing change the graph and not what it computes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mono_quant.calibration import Batch
from mono_quant.graph.capture import Captured, NotCapturableError, capture
from mono_quant.graph.equalize import equalize
from mono_quant.graph.float_layers import FloatConv, FloatLayer
from mono_quant.graph.fold import fold
from mono_quant.graph.fuse import fuse
from tests.graph.conftest import Example, leaves
from tests.graph.networks import Residuals, conv_bn, settled


def captured(model: nn.Module, *inputs: Tensor) -> Captured:
    return capture(model, Batch(inputs, {}))


def float_layers(module: fx.GraphModule) -> list[FloatLayer]:
    return [layer for layer in module.modules() if isinstance(layer, FloatLayer)]


def functions(module: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("equalized", [False, True])
def test_the_rewritten_graph_computes_the_same(graph_example: Example, equalized: bool) -> None:
    graph = captured(graph_example.model, *graph_example.inputs(3))
    fold(graph.module)
    fuse(graph.module)
    if equalized:
        equalize(graph.module)
    for batch in (1, 5):
        inputs = graph_example.inputs(batch)
        with torch.no_grad():
            found, expected = graph.module(*inputs), leaves(graph_example.model(*inputs))
        torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-4)


def test_capture_folding_and_fusing_leave_the_model_alone() -> None:
    model = settled(Residuals(), 3, 32, 32)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = captured(model, torch.randn(2, 3, 32, 32))
    fold(graph.module)
    fuse(graph.module)
    equalize(graph.module)
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_norms_sums_and_activations_disappear_into_convolutions() -> None:
    graph = captured(settled(Residuals(), 3, 32, 32), torch.randn(2, 3, 32, 32))
    fold(graph.module)
    fuse(graph.module)
    layers = float_layers(graph.module)
    assert [layer.adds for layer in layers].count(True) == 2
    assert [layer.activation.name for layer in layers].count("relu") == 7
    assert set(functions(graph.module)) == {
        "aten.sym_size.int", "aten.max_pool2d.default", "aten.adaptive_avg_pool2d.default", "aten.reshape.default",
    }  # fmt: skip


class PadsEvenly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.even = nn.Conv2d(4, 4, 2, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.even(self.conv(F.pad(x, [2, 2, 1, 1])))  # type: ignore[no-any-return]


def test_even_padding_goes_into_the_convolution_and_uneven_padding_stays() -> None:
    model, x = PadsEvenly(), torch.randn(2, 2, 8, 8)
    graph = captured(model, x)
    fold(graph.module)
    convs = [layer for layer in float_layers(graph.module) if isinstance(layer, FloatConv)]
    assert [conv.padding for conv in convs] == [[2, 3], [0, 0]]
    assert functions(graph.module)["aten.constant_pad_nd.default"] == 1
    torch.testing.assert_close(graph.module(x)[0], model(x))


class SharedNorm(nn.Module):
    """A convolution that is also used before its norm: the norm must not be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv_bn(3, 6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, F.relu(self.norm(y))


def test_a_norm_after_a_convolution_with_other_users_becomes_a_layer_of_its_own() -> None:
    model = settled(SharedNorm(), 3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    graph = captured(model, x)
    fold(graph.module)
    fuse(graph.module)
    assert len(float_layers(graph.module)) == 2
    torch.testing.assert_close(list(graph.module(x)), list(model(x)), rtol=1e-5, atol=1e-5)


def test_equalizing_balances_ranges() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-3, 3, 8).reshape(-1, 1, 1, 1))
    x = torch.randn(2, 3, 8, 8)
    graph = captured(model, x)
    fold(graph.module)
    fuse(graph.module)
    assert len(equalize(graph.module)) == 1
    first, second = float_layers(graph.module)
    torch.testing.assert_close(
        first.weight.flatten(1).abs().amax(1), second.weight.flatten(2).abs().amax((0, 2)), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(graph.module(x)[0], model(x), rtol=1e-4, atol=1e-4)


def test_layers_that_clamp_are_not_equalized() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    graph = captured(model, torch.randn(2, 3, 8, 8))
    fold(graph.module)
    fuse(graph.module)
    assert equalize(graph.module) == []


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x)  # type: ignore[no-any-return]


class AnswersObject(nn.Module):
    def forward(self, x: Tensor) -> object:
        return {1: x}


class TakesMany(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors)


class FixesBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CountsCalls(), "changes its own buffers"),
        (AnswersObject(), "answers a"),
        (TakesMany(), "variable number"),
        (FixesBatch(), "torch.export cannot capture"),
    ],
)
def test_what_cannot_be_captured_is_said(model: nn.Module, reason: str) -> None:
    with pytest.raises(NotCapturableError, match=reason):
        captured(model, torch.randn(2, 1, 4, 4))


def test_inputs_that_are_no_tensors_are_said() -> None:
    with pytest.raises(NotCapturableError, match="an input is a list"):
        capture(nn.Identity(), Batch(([torch.zeros(2)],), {}))
