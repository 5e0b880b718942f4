"""Encoders whose layers all run in one call: when they do, when each runs in its own, and what changes later."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.bert.modeling_bert import BertEncoder, BertLayer, BertSelfAttention

import mono_quant
from mono_quant import ops
from mono_quant.modules import LayerStack, layer_stack, notices, quantize_linear_module, restore_layers
from mono_quant.ops import native
from mono_quant.ops.encoder_stack_reference import release_encoder_layers
from tests.integrations.encoder_models import (
    ENCODERS,
    Counter,
    bert,
    close,
    hidden,
    padding,
    part_by_part,
    quantized,
    words,
)
from tests.ops.operands import same_bits

pytestmark = pytest.mark.usefixtures("native_backend")


@pytest.fixture
def model() -> Any:
    return quantized(bert(num_hidden_layers=3))


def calls(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Answer the calls of all layers together, and of single ones."""
    with Counter() as counter:
        hidden(model, *args, **kwargs)
    return counter.together, counter.calls


def stack_in(model: nn.Module) -> Any:
    (found,) = (module for module in model.modules() if isinstance(module, LayerStack))
    return found


def traced(encoder: Any, x: torch.Tensor) -> Any:
    return make_fx(lambda x: encoder(x).last_hidden_state)(x)


class TestOneCall:
    @pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gives_the_answers_of_one_layer_after_the_other_to_the_bit(
        self, make: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = make().to(dtype)
        together = quantized(copy.deepcopy(source))
        monkeypatch.setattr(layer_stack, "_STACKS", {})
        one_by_one = quantized(source)
        for samples, length in ((1, 1), (3, 11), (2, 20)):
            ids, mask = words(samples, length), padding(samples, length).clamp(min=0)
            mask[:, 0] = 1
            for options in ({}, {"attention_mask": mask}):
                assert calls(together, ids, **options) == (1, 0)
                assert calls(one_by_one, ids, **options) == (0, 2)
                assert same_bits(hidden(together, ids, **options), hidden(one_by_one, ids, **options))

    def test_the_class_is_one_of_the_encoders_own(self, model: Any) -> None:
        encoder, own = model.encoder, type(bert().encoder)
        assert isinstance(encoder, LayerStack)
        assert isinstance(encoder, own)
        assert type(encoder).__name__ == own.__name__
        assert isinstance(encoder.layer, nn.ModuleList)
        assert list(encoder.layer) == [model.get_submodule(f"encoder.layer.{i}") for i in range(3)]
        restore_layers(model)
        assert type(encoder) is own
        assert calls(model, words()) == (0, 0)

    def test_threads_have_loops_of_their_own(self, model: Any) -> None:
        lengths = [1, 3, 9, 5] * 4
        wanted = {length: hidden(model, words(2, length)) for length in set(lengths)}
        with ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(lambda length: hidden(model, words(2, length)), lengths))
        assert all(same_bits(a, wanted[length]) for a, length in zip(answers, lengths, strict=True))

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        result = mono_quant.quantize(bert())
        result.save(tmp_path / "model.safetensors")
        loaded = mono_quant.load_model(tmp_path / "model.safetensors", bert())
        assert calls(loaded, words()) == (1, 0)
        assert same_bits(hidden(loaded, words()), hidden(result.model, words()))

    def test_copies_and_pickles_have_weights_of_their_own(self, model: Any) -> None:
        wanted = hidden(model, words())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert calls(twin, words()) == (1, 0)
            with torch.no_grad():
                for parameter in twin.encoder.parameters():
                    parameter.mul_(1.5)
            assert not torch.equal(hidden(twin, words()), wanted)
        assert same_bits(hidden(model, words()), wanted)

    def test_weights_are_let_go_with_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = quantized(bert())
        released: list[int] = []
        monkeypatch.setattr(native, "release_encoder_layers", released.append)
        hidden(model, words())
        number = stack_in(model).__dict__["_stack_operands"].held.number
        assert not released
        del model
        gc.collect()
        assert released == [number]
        monkeypatch.undo()
        native.release_encoder_layers(number)

    def test_the_encoder_alone(self, model: Any) -> None:
        x = torch.randn(2, 5, 36)
        with torch.no_grad(), Counter() as counter:
            answer = model.encoder(x).last_hidden_state
        assert counter.together == 1
        with torch.no_grad():
            assert close(answer, part_by_part(model).encoder(x).last_hidden_state)


class TestWhoseWeights:
    """No call computes with the weights of another model, whatever became of its own."""

    @pytest.fixture
    def other(self) -> Iterator[Any]:
        """Another model that has run, and runs on as it did."""
        other = quantized(bert(num_hidden_layers=3))
        wanted = hidden(other, words())
        yield other
        gc.collect()
        assert calls(other, words()) == (1, 0)
        assert same_bits(hidden(other, words()), wanted)

    def test_where_a_norm_is_on_another_device(self, model: Any, other: Any) -> None:
        model.encoder.layer[0].output.LayerNorm.to("meta")
        assert other is not model
        with pytest.raises(RuntimeError, match="device"):
            hidden(model, words())

    @pytest.mark.parametrize("biases", [True, False])
    def test_where_another_device_is_the_default_one_in_the_first_call(
        self, model: Any, other: Any, biases: bool
    ) -> None:
        if not biases:
            for layer in model.encoder.layer:
                layer.output.dense.set_tensor("bias", None)
        wanted = hidden(copy.deepcopy(model), words())
        embeddings = torch.randn(2, 5, 36)
        with torch.no_grad(), torch.device("meta"):
            model.encoder(embeddings)
        assert calls(model, words()) == (1, 0)
        assert same_bits(hidden(model, words()), wanted)

    def test_where_another_dtype_is_the_default_one_in_the_first_call(self, model: Any) -> None:
        for layer in model.encoder.layer:
            layer.output.dense.set_tensor("bias", None)
        wanted = hidden(copy.deepcopy(model), words())
        torch.set_default_dtype(torch.float64)
        try:
            assert same_bits(hidden(model, words()), wanted)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_numbers_of_the_specification_are_others(self, model: Any) -> None:
        operands = model.encoder.operands()
        with ops.use_backend("reference"):
            number = torch.ops.mono_quant.hold_encoder_layers.default(
                [t for layer in model.encoder.layer for t in layer.operands().weights], 3, 0.3, [1e-5] * 6, "gelu"
            )
        release_encoder_layers(number)
        assert number < 0 <= operands.held.number


class TestOneByOne:
    @pytest.mark.parametrize("kind", ["norm's weight", "norm's bias", "bias", "scale"])
    def test_where_data_lies_in_another_way(self, model: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
        notices._reported.clear()
        hidden(model, words())
        part = model.encoder.layer[1].output
        tensor = {
            "norm's weight": part.LayerNorm.weight, "norm's bias": part.LayerNorm.bias, "bias": part.dense.bias,
            "scale": part.dense.weight_scale,
        }[kind]  # fmt: skip
        shape = tensor.shape
        tensor.data = torch.rand(2 * tensor.numel())[::2].reshape(shape)
        assert not tensor.is_contiguous()
        with caplog.at_level(logging.WARNING, "mono_quant"):
            answer = hidden(model, words())
        assert close(answer, hidden(part_by_part(model), words()))
        reason = "a tensor has been given data of another layout, dtype or device"
        assert caplog.messages == [f"the layers of a BertEncoder run one by one: {reason}"]

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_where_the_forward_of_the_class_has_been_replaced(
        self, when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def skip_the_first(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            for index, layer in enumerate(self.layer):
                if index:
                    hidden_states = layer(hidden_states, attention_mask)
            return answer_type(last_hidden_state=hidden_states)

        notices._reported.clear()
        answer_type = type(bert().encoder(torch.zeros(1, 1, 36)))
        model = None
        if when == "after":
            model = quantized(bert())
            hidden(model, words())
        monkeypatch.setattr(BertEncoder, "forward", skip_the_first)
        model = model or quantized(bert())
        with caplog.at_level(logging.WARNING, "mono_quant"):
            assert calls(model, words()) == (0, 1)
        assert close(hidden(model, words()), hidden(part_by_part(model), words()))
        if when == "after":
            assert caplog.messages == [
                "the layers of a BertEncoder run one by one: the forward of the class has been replaced"
            ]

    def test_where_it_had_been_replaced_before_the_model_was_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pickled = pickle.dumps(quantized(bert()))
        own = BertEncoder.forward
        monkeypatch.setattr(layer_stack, "_STACKED", {})
        monkeypatch.setattr(BertEncoder, "forward", lambda *args, **kwargs: own(*args, **kwargs))
        assert calls(pickle.loads(pickled), words()) == (0, 2)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("kind", [BertLayer, BertSelfAttention])
    def test_where_the_forward_of_a_part_has_been_replaced(
        self, when: str, kind: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = kind.forward
        model = quantized(bert()) if when == "after" else None
        if model is not None:
            hidden(model, words())

        def negate(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return own(self, -hidden_states, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", negate)
        model = model or quantized(bert())
        assert calls(model, words()) == (0, 0)
        assert close(hidden(model, words()), hidden(part_by_part(model), words()))
        monkeypatch.undo()

    def test_a_decorator_that_names_what_it_wraps_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own, seen = BertLayer.forward, []

        @functools.wraps(own)
        def watch(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return own(*args, **kwargs)

        monkeypatch.setattr(BertLayer, "forward", watch)
        assert calls(quantized(bert()), words()) == (1, 0)

    def test_where_a_graph_is_traced_that_outlives_the_model(self) -> None:
        model = quantized(bert())
        embeddings = torch.randn(2, 5, 36)
        with torch.no_grad():
            wanted = model.encoder(embeddings).last_hidden_state
            graph = traced(model.encoder, embeddings)
            del model
            gc.collect()
            assert same_bits(graph(embeddings), wanted)

    def test_where_a_hook_gives_the_class_back(self, model: Any) -> None:
        wanted = hidden(part_by_part(model), words())
        model.encoder.register_forward_pre_hook(lambda encoder, _: restore_layers(encoder))
        assert close(hidden(model, words()), wanted)

    def test_for_inputs_that_are_not_dense(self, model: Any) -> None:
        with torch.no_grad(), Counter() as counter, pytest.raises((RuntimeError, NotImplementedError)) as error:
            model.encoder(torch.randn(2, 5, 36).to_sparse())
        assert (counter.together, counter.calls) == (0, 0)
        assert "encoder layers of number" not in str(error.value)

    def test_where_a_layer_has_a_float_part(self) -> None:
        found = mono_quant.quantize(bert(), skip=["encoder.layer.1.output.dense"]).model
        assert not any(isinstance(module, LayerStack) for module in found.modules())
        assert calls(found, words()) == (0, 1)

    @pytest.mark.parametrize("place", ["layer", "part"])
    def test_where_something_is_watched_and_only_then(
        self, model: Any, place: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        notices._reported.clear()
        wanted = hidden(model, words())
        seen = []
        layer = model.encoder.layer[1]
        watched = layer if place == "layer" else layer.output.dense
        handle = watched.register_forward_hook(lambda *_: seen.append(1))
        with caplog.at_level(logging.WARNING, "mono_quant"):
            answer = hidden(model, words())
        assert seen == [1]
        assert close(answer, wanted)
        assert sum("of a BertEncoder run one by one" in record.message for record in caplog.records) == 1
        handle.remove()
        assert calls(model, words()) == (1, 0)

    def test_what_a_hook_finds_are_the_layers(self, model: Any) -> None:
        found: list[list[Any]] = []
        layers = list(model.encoder.layer)
        handles = [
            module.register_forward_hook(lambda *_: found.append(list(model.encoder.layer)))
            for module in (model.embeddings, layers[0], layers[2])
        ]
        hidden(model, words())
        assert found == [layers] * 3
        for handle in handles:
            handle.remove()

    def test_where_hidden_states_are_asked_for_and_only_then(self, model: Any) -> None:
        with torch.no_grad(), Counter() as counter:
            answer = model(words(), output_hidden_states=True)
        assert (counter.together, counter.calls) == (0, 3)
        assert len(answer.hidden_states) == 4
        assert same_bits(answer.hidden_states[3], answer.last_hidden_state)
        assert not torch.equal(answer.hidden_states[1], answer.hidden_states[2])
        assert calls(model, words()) == (1, 0)

    def test_where_attentions_are_asked_for(self) -> None:
        model = quantized(bert(attn_implementation="eager"))
        with torch.no_grad(), Counter() as counter:
            answer = model(words(), output_attentions=True)
        assert (counter.together, counter.calls) == (0, 0)
        assert len(answer.attentions) == 2
        assert close(answer.last_hidden_state, hidden(model, words()))

    def test_where_layers_differ(self, model: Any, caplog: pytest.LogCaptureFixture) -> None:
        notices._reported.clear()
        model.encoder.layer[1].attention.self.scaling *= 2
        with caplog.at_level(logging.WARNING, "mono_quant"):
            for _ in range(2):
                assert calls(model, words()) == (0, 3)
        reason = "their sizes, heads, dtypes, attention or activations differ"
        assert caplog.messages == [f"the layers of a BertEncoder run one by one: {reason}"]
        assert close(hidden(model, words()), hidden(part_by_part(model), words()))

    def test_a_mask_that_operators_do_not_take(self, model: Any) -> None:
        x, mask = torch.randn(2, 5, 36), torch.zeros(2, 3, 5, 5)  # for each head its own
        with torch.no_grad(), Counter() as counter:
            answer = model.encoder(x, mask).last_hidden_state
        assert (counter.together, counter.calls) == (0, 0)
        with torch.no_grad():
            assert same_bits(answer, part_by_part(model).encoder(x, mask).last_hidden_state)

    def test_for_training_and_gradients(self, model: Any) -> None:
        assert calls(copy.deepcopy(model).train(), words()) == (0, 0)
        embeddings = torch.randn(1, 4, 36, requires_grad=True)
        with Counter() as counter:
            model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
        assert (counter.together, counter.calls) == (0, 0)
        assert embeddings.grad is not None

    def test_graphs_call_each_layer(self, model: Any) -> None:
        wanted = hidden(model, words())
        assert same_bits(hidden(torch.compile(model, fullgraph=True, backend="aot_eager"), words()), wanted)
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend_name", ["torch", "reference"])
    def test_on_another_backend(self, model: Any, backend_name: str) -> None:
        with ops.use_backend(backend_name):
            assert calls(model, words()) == (0, 0)


def _other_linear() -> nn.Module:
    return quantize_linear_module(nn.Linear(70, 36).eval(), symmetric=True)


CHANGES: dict[str, Callable[[Any], object]] = {
    "linear replaced": lambda layers: setattr(layers[2].output, "dense", _other_linear()),
    "norm replaced": lambda layers: setattr(layers[0].output, "LayerNorm", nn.LayerNorm(36, eps=1.0).eval()),
    "norm in place": lambda layers: layers[0].output.LayerNorm.weight.mul_(2),
    "norm's epsilon": lambda layers: setattr(layers[1].output.LayerNorm, "eps", 1.0),
    "all scalings": lambda layers: [setattr(layer.attention.self, "scaling", 4.0) for layer in layers],
    "bias in place": lambda layers: layers[1].output.dense.bias.add_(torch.randn(36)),
    "codes": lambda layers: layers[2].output.dense.set_tensor("weight", -layers[2].output.dense.codes),
    "layer's state": lambda layers: layers[1].load_state_dict(layers[2].state_dict()),
    "layer replaced": lambda layers: layers.__setitem__(1, copy.deepcopy(layers[2])),
}


class TestChanges:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_a_change_is_seen_by_the_next_call(self, model: Any, change: Callable[[Any], object]) -> None:
        before = hidden(model, words())
        change(model.encoder.layer)
        answer = hidden(model, words())
        assert calls(model, words()) == (1, 0)
        assert not close(answer, before)
        assert close(answer, hidden(part_by_part(model), words()))

    def test_lists_of_other_layers_are_seen(self, model: Any) -> None:
        for order in ((2, 1, 0), (0, 2), (1,)):
            twin = copy.deepcopy(model)
            before = hidden(twin, words())
            twin.encoder.layer = nn.ModuleList([twin.encoder.layer[i] for i in order])
            after = hidden(twin, words())
            assert calls(twin, words()) == (1, 0)
            assert close(after, hidden(part_by_part(twin), words()))
            assert not close(after, before)

    def test_the_order_in_which_a_list_is_gone_through_is_seen(self, model: Any) -> None:
        class Ordered(nn.ModuleList):
            order = (0, 1, 2)

            def __iter__(self) -> Iterator[nn.Module]:
                return (self[i] for i in self.order)

        model.encoder.layer = Ordered(model.encoder.layer)
        before = hidden(model, words())
        model.encoder.layer.order = (2, 1, 0)
        after = hidden(model, words())
        assert calls(model, words()) == (1, 0)
        assert close(after, hidden(part_by_part(model), words()))
        assert not close(after, before)

    def test_a_list_can_be_taken_away_and_be_another_thing(self, model: Any) -> None:
        encoder, wanted = model.encoder, hidden(model, words())
        layers = encoder.layer
        del encoder.layer
        assert not hasattr(encoder, "layer")
        encoder.layer = list(layers)
        assert close(hidden(model, words()), wanted)
        del encoder.layer
        encoder.add_module("layer", layers)
        assert calls(model, words()) == (1, 0)
        assert same_bits(hidden(model, words()), wanted)

    def test_a_list_without_layers_answers_the_embeddings(self, model: Any) -> None:
        hidden(model, words())
        model.encoder.layer = nn.ModuleList()
        with torch.no_grad():
            assert same_bits(hidden(model, words()), model.embeddings(words()))

    def test_weights_that_move_into_shared_memory_are_seen_there(self, model: Any) -> None:
        before = hidden(model, words())
        for tensor in (*model.buffers(), *model.parameters()):
            tensor.share_memory_()
        noise = [torch.randn(4, 1000) for _ in range(200)]  # where the weights were
        assert same_bits(hidden(model, words()), before)
        del noise

    def test_layers_that_get_their_own_class_back_are_called(self, model: Any) -> None:
        hidden(model, words())
        restore_layers(model.encoder.layer[1])
        assert calls(model, words()) == (0, 2)

    def test_moving_the_model_lets_the_tiles_go(self, model: Any) -> None:
        hidden(model, words())
        assert "_stack_operands" in model.encoder.__dict__
        model.double()
        assert "_stack_operands" not in model.encoder.__dict__
        assert calls(model.float(), words()) == (1, 0)
