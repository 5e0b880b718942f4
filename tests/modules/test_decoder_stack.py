"""Decoders whose layers all run in one call: when they do, when each runs in its own, and what changes later."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaModel, StaticCache

import mono_quant
from mono_quant import ops
from mono_quant.modules import LayerStack, QuantizedLinear, layer_stack, notices, restore_layers
from mono_quant.modules.decoder_stack import DecoderStack
from mono_quant.ops import native
from tests.modules.test_decoder_layer import Counter, build, close, keeping, logits, quantized, unfused, words
from tests.ops.operands import same_bits

pytestmark = pytest.mark.usefixtures("native_backend")


@pytest.fixture
def model() -> Any:
    return quantized(build(num_hidden_layers=3))


def calls(model: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Answer the calls of all layers together, and how many layers ran as one operator."""
    with torch.no_grad(), Counter() as counter:
        model(*args, **kwargs)
    return counter.together, counter.calls


def new_cache(kind: Any, model: Any) -> Any:
    return StaticCache(model.config, max_cache_len=30) if kind is StaticCache else DynamicCache(config=model.config)


def other_linear() -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(70, 36, bias=False)).eval()


class TestOneCall:
    @pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
    def test_gives_the_answers_of_one_layer_after_the_other_to_the_bit(
        self, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = build(family)
        together = quantized(copy.deepcopy(source))
        monkeypatch.setattr(layer_stack, "_STACKS", {})
        one_by_one = quantized(source)
        assert calls(together, words()) == (1, 2)
        assert calls(one_by_one, words()) == (0, 2)
        for kind in (DynamicCache, StaticCache):
            caches = [new_cache(kind, source) for _ in range(2)]
            for start, stop in ((0, 6), (6, 7), (7, 9)):
                ids = words()[:, start:stop]
                found, _ = logits(together, ids, **keeping(caches[0]))
                wanted, _ = logits(one_by_one, ids, **keeping(caches[1]))
                assert same_bits(found, wanted)
            for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
                assert same_bits(a.keys, b.keys)
                assert same_bits(a.values, b.values)
                assert getattr(a, "cumulative_length", None) == getattr(b, "cumulative_length", None)

    def test_threads_have_loops_and_caches_of_their_own(self, model: Any) -> None:
        lengths = [1, 3, 9, 5] * 4
        wanted = {length: logits(model, words(length=length))[0] for length in set(lengths)}
        with ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(lambda length: logits(model, words(length=length))[0], lengths))
        assert all(same_bits(a, wanted[length]) for a, length in zip(answers, lengths, strict=True))

    def test_the_class_is_one_of_the_models_own(self, model: Any) -> None:
        inner = model.model
        assert isinstance(inner, LayerStack)
        assert isinstance(inner, LlamaModel)
        assert type(inner).__name__ == "LlamaModel"
        assert isinstance(inner.layers, nn.ModuleList)
        assert len(inner.layers) == 3
        restore_layers(model)
        assert type(inner) is LlamaModel
        assert calls(model, words()) == (0, 0)

    def test_a_model_without_a_head_keeps_its_name_in_its_configuration(self, tmp_path: Path) -> None:
        inner = build().model
        result = mono_quant.quantize(inner)
        assert isinstance(result.model, LayerStack)
        result.save(tmp_path / "model")
        assert '"LlamaModel"' in (tmp_path / "model" / "config.json").read_text()
        loaded = mono_quant.load_model(tmp_path / "model")
        with torch.no_grad():
            assert same_bits(loaded(words()).last_hidden_state, result.model(words()).last_hidden_state)

    def test_copies_and_pickles_have_weights_of_their_own(self, model: Any) -> None:
        wanted, _ = logits(model, words())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert calls(twin, words()) == (1, 3)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.mul_(1.5)
            assert not torch.equal(logits(twin, words())[0], wanted)
        assert same_bits(logits(model, words())[0], wanted)

    def test_weights_are_let_go_with_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = quantized(build())
        released: list[int] = []
        monkeypatch.setattr(native, "release_decoder_layers", released.append)
        logits(model, words())
        number = model.model.__dict__["_stack_operands"].held.number
        assert not released
        del model
        gc.collect()
        assert released == [number]
        monkeypatch.undo()
        native.release_decoder_layers(number)


class TestOneByOne:
    def test_where_a_layer_has_a_float_part(self) -> None:
        found = mono_quant.quantize(build(), skip=["model.layers.1.mlp.up_proj"]).model
        assert not isinstance(found.model, LayerStack)
        assert calls(found, words()) == (0, 1)

    def test_where_layers_are_of_several_kinds(self, caplog: pytest.LogCaptureFixture) -> None:
        source = build("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
        notices._reported.clear()
        with caplog.at_level(logging.WARNING, "mono_quant"):
            found = quantized(source)
            quantized(source)
        assert caplog.messages == ["the layers of a Qwen2Model run one by one: its layers are of several kinds"]
        assert not isinstance(found.model, LayerStack)
        assert close(logits(found, words())[0], logits(unfused(found), words())[0])

    @pytest.mark.parametrize("place", ["layer", "part"])
    def test_where_something_is_watched_and_only_then(
        self, model: Any, place: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        notices._reported.clear()
        wanted, _ = logits(model, words())
        seen = []
        layer = model.model.layers[1]
        watched = layer if place == "layer" else layer.mlp.down_proj
        handle = watched.register_forward_hook(lambda *_: seen.append(1))
        with caplog.at_level(logging.WARNING, "mono_quant"):
            answer, _ = logits(model, words())
        assert seen
        assert close(answer, wanted)
        assert sum("run one by one" in record.message for record in caplog.records) == 1
        handle.remove()
        assert calls(model, words()) == (1, 3)

    def test_where_hidden_states_are_asked_for_and_only_then(self, model: Any) -> None:
        with torch.no_grad(), Counter() as counter:
            answer = model(words(), output_hidden_states=True)
        assert (counter.together, counter.calls) == (0, 3)
        assert len(answer.hidden_states) == 4
        assert not torch.equal(answer.hidden_states[1], answer.hidden_states[2])
        assert calls(model, words()) == (1, 3)

    def test_where_fewer_layers_are_asked_for(self, model: Any) -> None:
        whole, _ = logits(model, words())
        model.config.num_hidden_layers = 2
        shorter, twin = logits(model, words())[0], unfused(model)
        assert calls(model, words()) == (0, 2)
        assert close(shorter, logits(twin, words())[0])
        assert not close(shorter, whole)

    def test_where_caches_of_the_layers_differ(self, model: Any, caplog: pytest.LogCaptureFixture) -> None:
        cache = DynamicCache()
        logits(model, words(), **keeping(cache))
        cache.layers[1].crop(-4)
        notices._reported.clear()
        with caplog.at_level(logging.WARNING, "mono_quant"):
            for _ in range(2):
                assert calls(model, words(2, 1), **keeping(cache)) == (0, 3)
        reason = "their caches are of several kinds or hold different numbers of tokens"
        assert caplog.messages == [f"the layers of a LlamaModel run one by one: {reason}"]

    def test_outside_of_the_models_loop(self, model: Any) -> None:
        layers = list(model.model.layers[:])
        assert layers == list(model.model.layers)
        assert layers == [model.model.get_submodule(f"layers.{i}") for i in range(3)]

    def test_for_training_and_gradients(self, model: Any) -> None:
        assert calls(copy.deepcopy(model).train(), words()) == (0, 0)
        with Counter() as counter:
            model(inputs_embeds=torch.randn(1, 4, 36, requires_grad=True))
        assert counter.calls == 0


class TestChanges:
    def test_modules_and_weights_that_are_replaced_are_seen(self, model: Any) -> None:
        before, _ = logits(model, words())
        layer = model.model.layers[2]
        layer.mlp.down_proj = other_linear()
        replaced, _ = logits(model, words())
        assert calls(model, words()) == (1, 3)
        assert close(replaced, logits(unfused(model), words())[0])
        assert not close(replaced, before)
        layer.load_state_dict({name: torch.zeros_like(t) for name, t in layer.state_dict().items()})
        emptied, _ = logits(model, words())
        assert close(emptied, logits(unfused(model), words())[0])

    def test_a_list_of_other_layers_is_seen(self, model: Any) -> None:
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 2)])
        model.config.num_hidden_layers = 2
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
        assert calls(model, words()) == (1, 2)
        assert close(logits(model, words())[0], logits(unfused(model), words())[0])

    def test_a_list_of_as_many_other_layers_is_seen(self, model: Any) -> None:
        before, _ = logits(model, words())
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in (2, 1, 0)])
        after, _ = logits(model, words())
        assert calls(model, words(), use_cache=False) == (1, 3)
        assert close(after, logits(unfused(model), words())[0])
        assert not close(after, before)

    def test_biases_that_are_loaded_are_seen_in_bfloat16(self) -> None:
        model = quantized(build("Qwen2").bfloat16(), bits=4, group_size=2)
        before, _ = logits(model, words())
        state = {name: t.clone() for name, t in model.state_dict().items()}
        model.load_state_dict({name: t + 3 if name.endswith("proj.bias") else t for name, t in state.items()})
        after, _ = logits(model, words())
        assert calls(model, words()) == (1, 2)
        assert close(after, logits(unfused(model), words())[0])
        assert not close(after, before)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_weights_that_move_into_shared_memory_are_seen_there(self, bits: int) -> None:
        model = quantized(build(), bits=bits, **({"group_size": 2} if bits == 4 else {}))
        before, _ = logits(model, words())
        for buffer in model.buffers():
            buffer.share_memory_()
        noise = [torch.randn(4, 1000) for _ in range(200)]  # where the weights were
        assert same_bits(logits(model, words())[0], before)
        del noise

    def test_numbers_that_layers_hold_are_read_again(self, model: Any) -> None:
        before, _ = logits(model, words())
        for layer in model.model.layers:
            layer.input_layernorm.variance_epsilon = 10.0
            layer.self_attn.scaling *= 3
        after, _ = logits(model, words())
        assert calls(model, words()) == (1, 3)
        assert close(after, logits(unfused(model), words())[0])
        assert not close(after, before)

    def test_attention_of_another_kind_runs_part_by_part(self, model: Any) -> None:
        logits(model, words())
        model.config._attn_implementation = "flex_attention"
        assert not any(layer.operands() for layer in model.model.layers)

    def test_a_norm_of_another_dtype_runs_part_by_part(self, model: Any) -> None:
        logits(model, words())
        model.model.layers[0].input_layernorm.to(torch.bfloat16)
        assert calls(model, words()) == (0, 2)
        assert close(logits(model, words())[0], logits(unfused(model), words())[0])

    def test_layers_that_get_their_own_class_back_are_called(self, model: Any) -> None:
        logits(model, words())
        restore_layers(model.model.layers[1])
        assert calls(model, words()) == (0, 2)

    def test_moving_the_model_lets_the_tiles_go(self, model: Any) -> None:
        logits(model, words())
        assert "_stack_operands" in model.model.__dict__
        model.double()
        assert "_stack_operands" not in model.model.__dict__
        model.float()
        assert calls(model, words()) == (1, 3)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def forget_graphs(self) -> Iterator[None]:
        yield
        torch._dynamo.reset()  # or those of other tests would count as graphs of these models

    @pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
    def test_a_graph_sees_hooks_and_modules_that_come_later(self, model: Any, kind: Any) -> None:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        def run() -> torch.Tensor:
            cache = new_cache(kind, model)
            with torch.no_grad():
                model(words()[:, :8], **keeping(cache))
                answer: torch.Tensor = compiled(words()[:, 8:], **keeping(cache)).logits
            return answer

        first, seen = run(), []
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        assert close(run(), first)
        assert len(seen) == 2
        model.model.layers[0].mlp.down_proj = other_linear()
        wanted = logits(unfused(model), words())[0][:, 8:]
        assert close(run(), wanted)

    @pytest.mark.filterwarnings("ignore:mono_quant..linear_dynamic:UserWarning")
    def test_on_another_backend_graphs_hold_the_parts(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted, _ = logits(model, words())
        monkeypatch.setattr(DecoderStack, "run_layers", None)
        with ops.use_backend("torch"), torch.no_grad():
            answer = torch.compile(model, backend="aot_eager", fullgraph=True)(words(), use_cache=False).logits
        assert close(answer, wanted)

    def test_a_hook_of_a_layer_is_part_of_the_graph(self, model: Any, caplog: pytest.LogCaptureFixture) -> None:
        def double(*args: Any) -> Any:
            return args[-1] * 2

        model.model.layers[1].register_forward_hook(double)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        notices._reported.clear()
        with torch.no_grad(), caplog.at_level(logging.WARNING, "mono_quant"):
            answer = compiled(words(), use_cache=False).logits
        reason = "a FusedLlamaDecoderLayer in it has hooks, which want to be called"
        assert caplog.messages == [f"the layers of a LlamaModel run one by one: {reason}"]
        assert close(answer, logits(model, words())[0])

    def test_exported_programs_hold_the_parts(self, model: Any) -> None:
        program = torch.export.export(model, (words(),), {"use_cache": False}, strict=False)
        assert not any("decoder_layer" in str(node.target) for node in program.graph.nodes)
        with torch.no_grad():
            answer = program.module()(words(), use_cache=False).logits
        assert close(answer, logits(model, words())[0])
