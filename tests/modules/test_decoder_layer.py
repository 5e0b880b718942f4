"""Decoder layers that run as one operator: the same tokens, the same cache, and the parts where those are wanted."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

import mono_quant
from mono_quant import ops
from mono_quant.errors import ConfigurationError
from mono_quant.modules import (
    FusedLayer,
    LayerStack,
    WeightOnlyLinear,
    compiled_layer,
    layer_stack,
    notices,
    restore_layers,
)
from mono_quant.modules.call_arguments import cache_name_among
from mono_quant.ops import native
from tests.ops.operands import same_bits

pytestmark = pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())

FAMILIES: dict[str, tuple[Any, Any]] = {
    "Llama": (LlamaForCausalLM, LlamaConfig),
    "Mistral": (MistralForCausalLM, MistralConfig),
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config),
}


@pytest.fixture(autouse=True, params=["together", "one by one"])
def native_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All layers of a model in one call, and each in its own."""
    if request.param == "one by one":
        monkeypatch.setattr(layer_stack, "_STACKS", {})
    with ops.use_backend("native"):
        yield


def build(family: str = "Llama", **options: Any) -> Any:
    model_type, config_type = FAMILIES[family]
    sizes = {"vocab_size": 50, "hidden_size": 36, "intermediate_size": 70, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
             "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    if family == "Mistral":
        sizes["sliding_window"] = None  # a window has a cache of its own kind
    return model_type(config_type(**sizes | options)).eval()


def quantized(model: Any, **options: Any) -> Any:
    return mono_quant.quantize(model, run_validation=False, **options).model


@pytest.fixture
def model() -> Any:
    return quantized(build())


def unfused(model: Any) -> Any:
    twin = copy.deepcopy(model)
    restore_layers(twin)
    return twin


def words(samples: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 50, (samples, length), generator=torch.Generator().manual_seed(length))


class Counter(TorchDispatchMode):
    """Counts the layers that run as one operator each, or together."""

    SINGLE = (
        torch.ops.mono_quant.decoder_layer.default,
        torch.ops.mono_quant.decoder_layer_static_cache.default,
    )
    TOGETHER = (
        torch.ops.mono_quant.decoder_layers.default,
        torch.ops.mono_quant.decoder_layers_static_cache.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.together = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.TOGETHER:
            self.together += 1
            self.calls += len(args[2])
        self.calls += func in self.SINGLE
        return func(*args, **kwargs or {})


def keeping(cache: Any) -> dict[str, Any]:
    """Answer what a model is called with to use ``cache``, under the name that this transformers has for it."""
    name = cache_name_among(inspect.signature(LlamaForCausalLM.forward).parameters)
    assert name is not None
    return {name: cache, "use_cache": cache is not None}


def logits(model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
    """Answer the logits and how many layers ran as one call."""
    with torch.no_grad(), Counter() as counter:
        answer: Tensor = model(*args, **kwargs).logits
    return answer, counter.calls


def compiled_logits(compiled: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        answer: Tensor = compiled(*args, **kwargs).logits
    return answer


def numbers(model: Any) -> list[int]:
    """Answer the numbers by which graphs call the layers of ``model``."""
    if isinstance(model.model, LayerStack):
        return [model.model.number]
    return [layer.number for layer in model.model.layers]


@pytest.fixture
def graph_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the layers that compiled graphs call. Compiled code cannot run under a :class:`Counter`."""
    calls: list[int] = []
    layer_of = compiled_layer.layer_of

    def counted(number: int) -> Any:
        calls.append(number)
        return layer_of(number)

    monkeypatch.setattr(compiled_layer, "layer_of", counted)
    return calls


def close(first: Tensor, second: Tensor) -> bool:
    """Whether logits agree but for codes that rounding has flipped: a few in the hundred of their size."""
    return float((first.float() - second.float()).norm() / second.float().norm()) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_layers_run_as_one_call_and_answer_the_same(self, family: str) -> None:
        model = quantized(build(family))
        assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)
        assert type(model.model.layers[0]).__name__ == f"Fused{family}DecoderLayer"
        twin = unfused(model)
        assert model.state_dict().keys() == twin.state_dict().keys()
        (found, calls), (wanted, none) = logits(model, words()), logits(twin, words())
        assert (calls, none) == (2, 0)
        assert close(found, wanted)

    def test_generation_with_padding_gives_the_tokens_of_the_parts(self, family: str) -> None:
        model = quantized(build(family))
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, :4] = 0
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        found, wanted = model.generate(words(), **options), unfused(model).generate(words(), **options)
        assert found.shape == wanted.shape
        # Random models have nearly level logits: a flipped code may choose another token, and all that follow.
        assert float((found == wanted).double().mean()) > 0.7

    def test_beams_are_reordered(self, family: str) -> None:
        model = quantized(build(family))
        answer = model.generate(words(), max_new_tokens=5, num_beams=3, do_sample=False)
        assert answer.shape == (2, 14)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"bits": 4, "symmetric": True}], ids=str)
class TestFewBits:
    def test_layers_run_as_one_call_and_answer_the_same(self, family: str, options: dict[str, Any]) -> None:
        model = quantized(build(family, hidden_size=96, intermediate_size=160), group_size=32, **options)
        assert all(isinstance(layer.mlp.gate_proj, WeightOnlyLinear) for layer in model.model.layers)
        (found, calls), (wanted, none) = logits(model, words()), logits(unfused(model), words())
        assert (calls, none) == (2, 0)
        assert close(found, wanted)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            answer, calls = logits(copied, words())
            assert calls == 2
            assert same_bits(answer, found)

    def test_int8_and_few_bits_may_be_in_one_layer(self, family: str, options: dict[str, Any]) -> None:
        model = build(family, hidden_size=96, intermediate_size=160)
        options = {"bits": options["bits"], "group_size": 32}
        for skip in (["*.mlp.*"], ["*.self_attn.*", "*.mlp.down_proj"]):
            mixed = quantized(model, skip=skip, **options)
            mixed = quantized(mixed, include=skip)
            (found, calls), (wanted, none) = logits(mixed, words()), logits(unfused(mixed), words())
            assert (calls, none) == (2, 0)
            assert close(found, wanted)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}], ids=str)
class TestBFloat16:
    @pytest.fixture
    def half(self, options: dict[str, Any]) -> Any:
        return quantized(build(hidden_size=96, intermediate_size=160), compute_dtype=torch.bfloat16, **options)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_layers_run_as_one_call_and_answer_the_same(self, family: str, options: dict[str, Any]) -> None:
        single = build(family, hidden_size=96, intermediate_size=160)
        half = quantized(single, compute_dtype=torch.bfloat16, **options)
        (found, calls), (wanted, none) = logits(half, words()), logits(unfused(half), words())
        assert (calls, none) == (2, 0)
        assert found.dtype == wanted.dtype == torch.bfloat16
        assert close(found, wanted)
        # Nearer to the model in float32 than its parts are, or as near: there is less that is rounded.
        exact = logits(quantized(single, **options), words())[0]
        assert float((found - exact).norm()) < 1.2 * float((wanted - exact).norm())

    def test_both_caches_hold_bfloat16_and_give_the_same_tokens(self, half: Any, options: dict[str, Any]) -> None:
        ids = words()
        growing, static = DynamicCache(), StaticCache(half.config, max_cache_len=32)
        for start, stop in ((0, 6), (6, 7), (7, 9)):
            part = ids[:, start:stop]
            (first, calls), (second, more) = (logits(half, part, **keeping(cache)) for cache in (growing, static))
            assert (calls, more) == (2, 2)
            assert close(first, second)
        for cache in (growing, static):
            assert all(layer.keys.dtype == torch.bfloat16 for layer in cache.layers)
        assert same_bits(growing.layers[1].values, static.layers[1].values[:, :, :9].contiguous())

    def test_compiled_layers_run_whole(self, half: Any, options: dict[str, Any], graph_calls: list[int]) -> None:
        compiled = torch.compile(half, backend="aot_eager", fullgraph=True)
        cache = DynamicCache()
        answer = compiled_logits(compiled, words(), **keeping(cache))
        assert same_bits(answer, logits(half, words())[0])
        assert graph_calls == numbers(half)
        torch._dynamo.reset()

    def test_a_model_may_be_moved_to_it_and_back(self, options: dict[str, Any]) -> None:
        model = quantized(build(hidden_size=96, intermediate_size=160), **options)
        before = logits(model, words())[0]
        half, calls = logits(model.bfloat16(), words())
        assert calls == 2
        assert half.dtype == torch.bfloat16
        after, calls = logits(model.float(), words())
        assert calls == 2
        assert close(half, before)
        assert close(after, before)


class TestCache:
    def test_it_grows_by_each_token_and_serves_the_parts_as_well(self, model: Any) -> None:
        twin, ids = unfused(model), words(2, 12)
        whole, _ = logits(twin, ids)
        cache = DynamicCache()
        for start, stop in ((0, 7), (7, 8), (8, 9)):
            step, calls = logits(model, ids[:, start:stop], **keeping(cache))
            assert calls == 2
            assert cache.get_seq_length() == stop
            assert cache.layers[1].keys.shape == (2, 2, stop, 6)
            assert close(step, whole[:, start:stop])
        step, calls = logits(twin, ids[:, 9:], **keeping(copy.deepcopy(cache)))
        assert close(step, whole[:, 9:])
        again, _ = logits(model, ids[:, 9:], **keeping(cache))
        assert close(again, step)

    def test_what_was_cropped_is_not_written_to(self, model: Any) -> None:
        cache, ids = DynamicCache(), words(1, 10)
        logits(model, ids, **keeping(cache))
        kept = cache.layers[0].keys
        before = kept.clone()
        cache.crop(-4)
        step, calls = logits(model, ids[:, 6:7], **keeping(cache))
        assert calls == 2
        assert torch.equal(kept, before)
        assert close(step[:, -1], logits(model, ids)[0][:, 6])

    def test_a_static_cache_is_written_in_place(self, model: Any) -> None:
        ids, cache = words(), StaticCache(model.config, max_cache_len=32)
        whole, _ = logits(model, ids)
        first, calls = logits(model, ids[:, :6], **keeping(cache))
        assert calls == 2
        assert close(first, whole[:, :6])
        places = [layer.keys.data_ptr() for layer in cache.layers]
        for at in range(6, ids.shape[1]):
            answer, calls = logits(model, ids[:, at : at + 1], **keeping(cache))
            assert calls == 2
            assert close(answer[:, -1], whole[:, at])
        assert [layer.keys.data_ptr() for layer in cache.layers] == places
        assert [int(layer.cumulative_length) for layer in cache.layers] == [ids.shape[1]] * 2

    def test_a_static_cache_that_is_full_says_so(self, model: Any) -> None:
        cache = StaticCache(model.config, max_cache_len=4)
        mask = torch.ones(1, 1, 9, 4, dtype=torch.bool)
        with pytest.raises(RuntimeError, match="a cache for 4 tokens got 9 at position 0"):
            logits(model, words(), attention_mask=mask, **keeping(cache))

    def test_a_cache_of_another_kind_serves_the_parts_and_that_is_said_once(
        self, model: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        class OtherCache(DynamicCache):
            pass

        notices._reported.clear()
        with caplog.at_level(logging.WARNING, "mono_quant"):
            answer, calls = logits(model, words(), **keeping(OtherCache()))
            logits(model, words(), **keeping(OtherCache()))
        assert calls == 0
        assert close(answer, logits(model, words())[0])
        assert sum("OtherCache" in record.message for record in caplog.records) == 1

    def test_a_cache_for_other_sequences_is_named_as_the_reason(
        self, model: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        notices._reported.clear()
        cache = StaticCache(model.config, max_cache_len=20)
        logits(model, words(2), **keeping(cache))
        with caplog.at_level(logging.WARNING, "mono_quant"), pytest.raises((RuntimeError, ValueError)):
            logits(model, words(1), **keeping(cache))
        assert "for 2 sequences where 1 are read" in caplog.text

    def test_a_cache_of_another_dtype_is_named_as_the_reason(
        self, model: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        notices._reported.clear()
        cache = DynamicCache()
        logits(model, words(), **keeping(cache))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
        with caplog.at_level(logging.WARNING, "mono_quant"), contextlib.suppress(RuntimeError):
            logits(model, words(2, 1), **keeping(cache))
        assert "its cache holds torch.float64 on cpu" in caplog.text


class TestTheParts:
    def test_take_over_in_training_and_other_dtypes(self, model: Any) -> None:
        assert logits(copy.deepcopy(model).train(), words())[1] == 0
        assert logits(copy.deepcopy(model).half(), words())[1] == 0
        assert logits(copy.deepcopy(model).double(), words())[1] == 0

    def test_take_over_where_the_input_and_the_norms_differ(self, model: Any, caplog: pytest.LogCaptureFixture) -> None:
        notices._reported.clear()
        embedded = torch.randn(1, 4, 36, dtype=torch.bfloat16)
        with caplog.at_level(logging.WARNING, "mono_quant"):
            _, calls = logits(model, inputs_embeds=embedded)
        assert calls == 1  # the first layer answers float32
        assert "its input is torch.bfloat16, its norms are torch.float32" in caplog.text

    def test_take_over_where_a_module_inside_is_watched(self, model: Any) -> None:
        seen = []
        handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
        assert logits(model, words())[1] == 1
        assert seen
        handle.remove()
        assert logits(model, words())[1] == 2

    def test_take_over_for_gradients_of_the_input(self, model: Any) -> None:
        embedded = torch.randn(1, 4, 36, requires_grad=True)
        with Counter() as counter:
            model(inputs_embeds=embedded)
        assert counter.calls == 0

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_take_over_on_other_backends(self, model: Any, backend: str) -> None:
        wanted, _ = logits(model, words())
        with ops.use_backend(backend):
            answer, calls = logits(model, words())
        assert calls == 0
        assert close(answer, wanted)

    def test_are_not_wanted_for_hidden_states_of_every_layer(self, model: Any) -> None:
        with torch.no_grad(), Counter() as counter:
            answer = model(words(), output_hidden_states=True)
        assert len(answer.hidden_states) == 3
        assert counter.calls == 2


class TestCompiled:
    @pytest.fixture(autouse=True)
    def forget_graphs(self) -> Iterator[None]:
        yield
        torch._dynamo.reset()  # or those of other tests would count as graphs of these models

    def test_layers_run_whole(self, model: Any, graph_calls: list[int]) -> None:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for cache in (None, DynamicCache()):
            answer = compiled_logits(compiled, words(), **keeping(cache))
            assert same_bits(answer, logits(model, words())[0])
        assert graph_calls == numbers(model) * 2

    def test_a_static_cache_is_written_in_place(self, model: Any, graph_calls: list[int]) -> None:
        ids, cache = words(), StaticCache(model.config, max_cache_len=32)
        whole, _ = logits(model, ids)
        logits(model, ids[:, :6], **keeping(cache))
        places = [layer.keys.data_ptr() for layer in cache.layers]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for at in range(6, ids.shape[1]):
            answer = compiled_logits(compiled, ids[:, at : at + 1], **keeping(cache))
            assert close(answer[:, -1], whole[:, at])
        assert graph_calls == numbers(model) * (ids.shape[1] - 6)
        assert [layer.keys.data_ptr() for layer in cache.layers] == places
        assert [int(layer.cumulative_length) for layer in cache.layers] == [ids.shape[1]] * 2

    def test_what_changes_in_a_layer_later_is_seen(self, model: Any, graph_calls: list[int]) -> None:
        ids = words()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled_logits(compiled, ids)
        other = quantized(build())
        for layer, source in zip(model.model.layers, other.model.layers, strict=True):
            layer.load_state_dict(source.state_dict())
        wanted, _ = logits(model, ids)
        assert close(compiled_logits(compiled, ids), wanted)
        seen: list[object] = []
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        assert close(compiled_logits(compiled, ids), wanted)
        assert seen
        cache = StaticCache(model.config, max_cache_len=32)
        logits(model, ids[:, :8], **keeping(cache))
        answer = compiled_logits(compiled, ids[:, 8:], **keeping(cache))
        assert close(answer[:, -1], wanted[:, 8])
        assert graph_calls

    def test_copies_call_their_own_layers(self, model: Any, graph_calls: list[int]) -> None:
        twin = copy.deepcopy(model)
        assert not set(numbers(model)) & set(numbers(twin))
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled_logits(compiled, words()), logits(twin, words())[0])
        assert graph_calls == numbers(twin)

    @pytest.mark.filterwarnings("ignore:mono_quant..linear_dynamic:UserWarning")
    def test_with_gradients_they_run_part_by_part(
        self, model: Any, graph_calls: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        notices._reported.clear()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with caplog.at_level(logging.WARNING, "mono_quant"):
            answer = compiled(words(), use_cache=False).logits.detach()
        assert not graph_calls
        assert sum("gradients are recorded" in record.message for record in caplog.records) == 1
        assert close(answer, logits(model, words())[0])

    def test_a_layer_that_is_gone_is_named_as_the_reason(self) -> None:
        with pytest.raises(ConfigurationError, match="no longer exists"):
            compiled_layer.layer_of(-1)


class TestWhichLayers:
    def test_a_layer_with_a_float_part_stays_as_it_is(self) -> None:
        result = mono_quant.quantize(build(), skip=["model.layers.1.mlp.up_proj"])
        assert logits(result.model, words())[1] == 1
        assert "model.layers.1" in result.info.unfused_layers

    def test_none_without_fused_activations(self, tmp_path: Path) -> None:
        result = mono_quant.quantize(build(), fuse_activations=False)
        assert logits(result.model, words())[1] == 0
        result.save(tmp_path / "model.safetensors")
        assert logits(mono_quant.load_model(tmp_path / "model.safetensors", build()), words())[1] == 0

    def test_saving_copying_and_pickling_keep_every_bit(self, tmp_path: Path) -> None:
        result = mono_quant.quantize(build())
        wanted, _ = logits(result.model, words())
        result.save(tmp_path / "model.safetensors")
        loaded = mono_quant.load_model(tmp_path / "model.safetensors", build())
        for other in (loaded, copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
            answer, calls = logits(other, words())
            assert calls == 2
            assert same_bits(answer, wanted)
