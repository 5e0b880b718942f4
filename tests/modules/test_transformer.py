"""Transformer layers must run their quantized parts, not a fused float kernel on the weights read from them."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant.modules import disable_fused_path, quantize_linear_module, restore_fused_path
from tests.modules.layers import sqnr


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def integer_products(self) -> int:
        return sum(count for name, count in self.counts.items() if name.startswith("mono_quant::linear_dynamic"))

    @property
    def fused(self) -> int:
        return self.counts["aten::_transformer_encoder_layer_fwd"]


def count(run: Callable[[], object]) -> Calls:
    with torch.no_grad(), Calls() as calls:
        run()
    return calls


def quantized(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    result = copy.deepcopy(layer)
    result.linear1 = quantize_linear_module(result.linear1)  # type: ignore[assignment]
    result.linear2 = quantize_linear_module(result.linear2)  # type: ignore[assignment]
    return result


def encoder_layer(activation: Any = "gelu") -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True).eval()


def encoder(nested: bool = True) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(quantized(encoder_layer()), 2, enable_nested_tensor=nested).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 16)


def test_pytorchs_fused_path_would_go_around_the_quantized_layers(x: Tensor) -> None:
    layer = quantized(encoder_layer())
    calls = count(lambda: layer(x))
    assert calls.fused == 1
    assert calls.integer_products == 0


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU(), nn.GELU()])
def test_without_it_the_integer_products_run(activation: Any, x: Tensor) -> None:
    reference = encoder_layer(activation)
    layer = quantized(reference)
    assert disable_fused_path(layer) == [""]
    calls = count(lambda: layer(x))
    assert calls.fused == 0
    assert calls.integer_products == 2
    with torch.no_grad():
        assert sqnr(reference(x), layer(x)) > 35


def test_every_layer_of_a_model_is_named_once(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(16, 16), encoder())
    assert disable_fused_path(model) == ["1", "1.layers.0", "1.layers.1"]
    assert disable_fused_path(model) == []
    assert count(lambda: model(x)).integer_products == 4


def test_layers_without_quantized_parts_stay_as_they_are(x: Tensor) -> None:
    model = nn.ModuleDict({"plain": encoder_layer(), "quantized": quantized(encoder_layer())})
    assert disable_fused_path(model) == ["quantized"]
    assert count(lambda: model["plain"](x)).fused == 1


def test_a_layer_that_never_was_fused_is_not_named() -> None:
    assert disable_fused_path(quantized(encoder_layer(torch.tanh))) == []


def test_padded_batches_do_not_become_nested_tensors(x: Tensor) -> None:
    model = encoder()
    assert model.use_nested_tensor
    disable_fused_path(model)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    padding[2, 1:] = True
    calls = count(lambda: model(x, src_key_padding_mask=padding))
    assert calls.integer_products == 4
    assert not any("nested" in name for name in calls.counts)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=padding)
        alone = model(x[2:, :1])
    torch.testing.assert_close(out[2, 0], alone[0, 0], rtol=1e-4, atol=1e-4)


def test_an_encoder_without_nested_tensors_is_not_named() -> None:
    assert disable_fused_path(encoder(nested=False)) == ["layers.0", "layers.1"]


def test_a_whole_transformer_works() -> None:
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    expected = copy.deepcopy(model)
    for layer in (model.encoder.layers[0], model.decoder.layers[0]):
        layer.linear1 = quantize_linear_module(layer.linear1)
        layer.linear2 = quantize_linear_module(layer.linear2)
    assert disable_fused_path(model) == ["encoder", "encoder.layers.0"]
    source, target = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    assert count(lambda: model(source, target)).integer_products == 4
    with torch.no_grad():
        assert sqnr(expected(source, target), model(source, target)) > 30


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_choice_survives_copies_and_pickles(carry: Callable[[nn.Module], nn.Module], x: Tensor) -> None:
    model = encoder()
    disable_fused_path(model)
    other = carry(model)
    assert count(lambda: other(x)).integer_products == 4
    assert torch.equal(other(x), model(x))


def test_the_choice_survives_training_and_back(x: Tensor) -> None:
    model = encoder()
    disable_fused_path(model)
    model.train().eval()
    assert count(lambda: model(x)).integer_products == 4


def test_one_compiled_graph_holds_the_integer_products(x: Tensor) -> None:
    torch._dynamo.reset()
    layer = quantized(encoder_layer())
    disable_fused_path(layer)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        out = torch.compile(layer, fullgraph=True, backend=keep)(x)
        torch.testing.assert_close(out, layer(x))
    assert len(graphs) == 1
    assert graphs[0].count("mono_quant.linear_dynamic") == 2


def test_what_is_float_again_gets_its_fused_path_back(x: Tensor) -> None:
    model = encoder()
    disable_fused_path(model)
    assert restore_fused_path(model) == []  # the layers are quantized still
    for layer in model.layers:
        layer.linear1, layer.linear2 = layer.linear1.to_float(), layer.linear2.to_float()
    assert restore_fused_path(model) == ["", "layers.0", "layers.1"]
    assert restore_fused_path(model) == []
    assert model.use_nested_tensor
    assert count(lambda: model(x)).fused == 2
    assert set(vars(model)) == set(vars(nn.TransformerEncoder(encoder_layer(), 2)))
