"""What layers are called with: a cache under either of its names, and arguments that no operator knows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mono_quant import ops
from mono_quant.modules import call_arguments, layer_stack, notices
from mono_quant.modules.call_arguments import (
    CACHE_NAMES,
    cache_in,
    cache_name_among,
    cache_names,
    name_of_place,
    parameter_names,
)
from mono_quant.ops import native
from tests.modules.test_decoder_layer import Counter, build, close, keeping, logits, quantized, unfused, words
from tests.ops.operands import same_bits


class New(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None, **kwargs: Any) -> Tensor:
        return x


class Old(nn.Module):
    def forward(self, x: Tensor, past_key_values: Any = None, **kwargs: Any) -> Tensor:
        return x


class HandsOn(New):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class Wrapped(New):
    @functools.wraps(New.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class TestNames:
    @pytest.mark.parametrize("kind", [New, HandsOn, Wrapped])
    def test_are_those_of_the_forward_that_is_reached(self, kind: type[nn.Module]) -> None:
        assert parameter_names(kind) == ("x", "mask", "cache", "kwargs")
        assert cache_names(kind) == ("cache", "past_key_values")
        assert name_of_place(kind, 1) == "mask"
        assert name_of_place(kind, 7) == "argument 8"

    def test_of_a_class_that_names_nothing_are_the_old_ones(self) -> None:
        assert parameter_names(nn.Module) == ()
        assert cache_names(nn.Module) == cache_names(Old) == ("past_key_values",)

    def test_among_others(self) -> None:
        assert cache_name_among(["x", "past_key_values"]) == "past_key_values"
        assert cache_name_among(["past_key_values", "cache"]) == "cache"
        assert cache_name_among(["x", "cache_position"]) is None


@pytest.mark.parametrize(
    ("kwargs", "new", "old"),
    [
        ({}, None, None),
        ({"cache": 1}, 1, None),
        ({"past_key_values": 2}, 2, 2),
        ({"cache": 1, "past_key_values": 2}, 1, 2),
        ({"cache": None, "past_key_values": 2}, None, 2),
    ],
)
def test_the_cache_is_the_one_that_the_layer_uses(kwargs: dict[str, Any], new: Any, old: Any) -> None:
    assert cache_in(New, kwargs) == new
    assert cache_in(Old, kwargs) == old


OWN_NAME = cache_names(LlamaDecoderLayer)[0]


def takes_new_name() -> Callable[..., Any]:
    """Answer a ``forward`` of Llama's layers that takes a cache as later versions do."""
    own = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        older = kwargs.pop("past_key_values", None)
        kept = {OWN_NAME: older if cache is None else cache}
        return own(self, hidden_states, attention_mask=attention_mask, **kept, **kwargs)

    return forward


def takes_old_name() -> Callable[..., Any]:
    """Answer a ``forward`` of Llama's layers that takes a cache as earlier versions do."""
    own = LlamaDecoderLayer.forward

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        kwargs.pop("cache", None)
        return own(self, hidden_states, attention_mask=attention_mask, **{OWN_NAME: past_key_values}, **kwargs)

    return forward


@pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())
class TestLayers:
    @pytest.fixture(autouse=True)
    def native_backend(self) -> Iterator[None]:
        with ops.use_backend("native"):
            yield
        torch._dynamo.reset()  # or graphs of other tests would count as those of these layers

    @pytest.fixture
    def reports(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
        monkeypatch.setattr(notices, "_reported", set())
        caplog.set_level("WARNING", logger="mono_quant")
        return lambda: [record.message for record in caplog.records if record.name == "mono_quant"]

    @pytest.fixture(params=["cache", "past_key_values"])
    def name(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        """The name under which Llama's layers take a cache in this test."""
        forward = takes_new_name() if request.param == "cache" else takes_old_name()
        for known in ("_parameters", "_cache_names"):
            monkeypatch.setattr(call_arguments, known, {})
        # As if transformers had written it.
        forward.__module__, forward.__qualname__ = LlamaDecoderLayer.__module__, "LlamaDecoderLayer.forward"
        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
        return str(request.param)

    @pytest.fixture
    def model(self) -> Any:
        return quantized(build())

    @staticmethod
    def angles(model: Any, start: int, stop: int) -> Any:
        return model.model.rotary_emb(torch.empty(1), torch.arange(start, stop)[None])

    def run_layer(self, model: Any, cache: dict[str, Any]) -> tuple[Tensor, int]:
        """Answer what the first layer makes of six tokens and one more, and how often it ran as one call."""
        x = torch.randn(2, 7, 36, generator=torch.Generator().manual_seed(1))
        layer, out = model.model.layers[0], []
        with torch.no_grad(), Counter() as counter:
            for start, stop in ((0, 6), (6, 7)):
                causal = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)[None, None]
                angles = self.angles(model, start, stop)
                out.append(layer(x[:, start:stop], attention_mask=causal, position_embeddings=angles, **cache))
        return torch.cat(out, dim=1), counter.calls

    def test_run_whole_with_a_cache_of_their_own_name(self, name: str, model: Any) -> None:
        assert cache_names(type(model.model.layers[0]))[0] == name
        first, second = DynamicCache(), DynamicCache()
        found, calls = self.run_layer(model, {name: first})
        wanted, none = self.run_layer(unfused(model), {name: second})
        assert (calls, none) == (2, 0)
        assert close(found, wanted)
        assert first.layers[0].keys.shape == (2, 2, 7, 6)
        assert close(first.layers[0].keys, second.layers[0].keys)

    def test_run_whole_with_an_older_name_that_their_class_still_takes(self, name: str, model: Any) -> None:
        cache = DynamicCache()
        assert self.run_layer(model, {"past_key_values": cache})[1] == 2
        assert cache.get_seq_length() == 7

    def test_run_whole_with_one_cache_under_both_names(self, name: str, model: Any) -> None:
        cache = DynamicCache()
        assert self.run_layer(model, dict.fromkeys(CACHE_NAMES, cache))[1] == 2
        assert cache.get_seq_length() == 7

    def test_run_part_by_part_with_two_caches(self, name: str, model: Any, reports: Callable[[], list[str]]) -> None:
        caches = {each: DynamicCache() for each in CACHE_NAMES}
        assert self.run_layer(model, caches)[1] == 0
        (other,) = set(CACHE_NAMES) - {name}
        assert [caches[each].get_seq_length() for each in (name, other)] == [7, 0]
        reason = f"it is called with {other}, which its operator does not know"
        assert reports() == [f"a FusedLlamaDecoderLayer runs part by part: {reason}"]

    def test_run_in_one_call_together(self, name: str, model: Any) -> None:
        wanted, _ = logits(model, words(), use_cache=False)
        cache = DynamicCache()
        with torch.no_grad(), Counter() as counter:
            x = model.model.embed_tokens(words())
            (all_layers,) = layer_stack._AllAsOne(model.model)[:]
            x = all_layers(x, position_embeddings=self.angles(model, 0, 9), **{name: cache})
            found = model.lm_head(model.model.norm(x))
        assert (counter.together, counter.calls) == (1, 2)
        assert same_bits(found, wanted)
        assert cache.get_seq_length() == 9

    @pytest.mark.parametrize("name", ["cache"], indirect=True)  # which models of any version reach
    @pytest.mark.parametrize("together", [True, False])
    def test_get_their_cache_from_graphs_where_they_run_part_by_part(
        self, name: str, together: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not together:
            monkeypatch.setattr(layer_stack, "_STACKS", {})
        model = quantized(build())
        wanted, _ = logits(model, words(), use_cache=False)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        seen: list[object] = []
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=12)):
            logits(model, words()[:, :8], **keeping(cache))
            seen.clear()
            with torch.no_grad():
                answer = compiled(words()[:, 8:], **keeping(cache)).logits
            assert seen
            assert close(answer, wanted[:, 8:])
            assert cache.get_seq_length() == 9

    def test_name_what_they_are_called_with_and_do_not_know(self, model: Any, reports: Callable[[], list[str]]) -> None:
        model.set_attn_implementation("eager")
        for _ in range(2):
            with torch.no_grad(), Counter() as counter:
                attentions = model(words(), output_attentions=True).attentions
            assert (len(attentions), counter.calls) == (2, 0)
        layer, x, angles = model.model.layers[0], torch.randn(1, 4, 36), self.angles(model, 0, 4)
        with torch.no_grad(), Counter() as counter:
            layer(x, None, position_embeddings=angles)
            with contextlib.suppress(TypeError):
                layer(x)
        assert counter.calls == 0
        assert reports() == [
            f"a FusedLlamaDecoderLayer runs part by part: {reason}"
            for reason in (
                "it is called with output_attentions, which its operator does not know",
                "its attention_mask is not given by name",
                "it is called without position_embeddings",
            )
        ]

    def test_say_nothing_of_training_and_other_backends(self, model: Any, reports: Callable[[], list[str]]) -> None:
        assert logits(model.train(), words(), output_attentions=True)[1] == 0
        with ops.use_backend("torch"):
            assert logits(model.eval(), words(), output_attentions=True)[1] == 0
        assert reports() == []
