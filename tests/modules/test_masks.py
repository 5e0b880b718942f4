"""Masks of bools: hidden by in scaled-dot-product attention, added as 0 and 1 in transformers' eager attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from mono_quant.modules import layer_stack, notices
from tests.integrations import encoder_models
from tests.integrations.encoder_models import ENCODERS, from_parts, run
from tests.modules.test_decoder_layer import FAMILIES, build, close, keeping, logits, quantized, unfused, words
from tests.ops.operands import same_bits

pytestmark = pytest.mark.usefixtures("native_backend")

ADDED = "its mask is of bools, which its attention adds to the scores"


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    monkeypatch.setattr(notices, "_reported", set())
    caplog.set_level("WARNING", logger="mono_quant")
    return lambda: [r.getMessage().partition(": ")[2] for r in caplog.records if r.name == "mono_quant"]


def seen(queries: int, keys: int) -> Tensor:
    """A mask in which each of the last ``queries`` tokens sees those before it."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("name", ENCODERS)
class TestEncoders:
    @torch.no_grad()
    def test_eager_attention_adds_bools(self, name: str, reasons: Any) -> None:
        model = encoder_models.quantized(ENCODERS[name](attn_implementation="eager"))
        layer = encoder_models.fused_names(model)[0]
        x, mask = torch.randn(3, 7, 36), seen(7, 7)
        layer = model.get_submodule(layer)
        for used_before in (False, True):
            answer, fused = run(layer, x, mask)
            assert not fused
            assert same_bits(answer, from_parts(layer, x, mask))
            if not used_before:
                # Floats are added by both.
                added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
                answer, fused = run(layer, x, added)
                assert fused
                assert encoder_models.close(answer, from_parts(layer, x, added))
        assert reasons() == [ADDED]

    @torch.no_grad()
    def test_what_attention_does_is_read_again(self, name: str, reasons: Any) -> None:
        model = encoder_models.quantized(ENCODERS[name](attn_implementation="sdpa"))
        layer, x, mask = model.get_submodule(encoder_models.fused_names(model)[0]), torch.randn(3, 7, 36), seen(7, 7)
        hidden, fused = run(layer, x, mask)
        assert fused
        assert encoder_models.close(hidden, from_parts(layer, x, mask))
        assert not reasons()
        model.set_attn_implementation("eager")
        added, fused = run(layer, x, mask)
        assert not fused
        assert same_bits(added, from_parts(layer, x, mask))
        assert not encoder_models.close(added, hidden)
        model.set_attn_implementation("sdpa")
        assert same_bits(run(layer, x, mask)[0], hidden)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
class TestDecoders:
    @pytest.fixture(autouse=True)
    def stacks(self, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not together:
            monkeypatch.setattr(layer_stack, "_STACKS", {})

    @pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
    def test_eager_attention_adds_bools(self, family: str, kind: Any, reasons: Any) -> None:
        model = quantized(build(family, attn_implementation="eager"))
        twin = unfused(model)
        caches = [kind(config=model.config, **{"max_cache_len": 12} if kind is StaticCache else {}) for _ in range(2)]
        for start, stop in ((0, 6), (6, 7)):
            mask = seen(12, 12)[..., start:stop, : 12 if kind is StaticCache else stop]
            part = words()[:, start:stop]
            found, calls = logits(model, part, attention_mask=mask, **keeping(caches[0]))
            wanted, _ = logits(twin, part, attention_mask=mask, **keeping(caches[1]))
            assert calls == 0
            assert same_bits(found, wanted)
        assert reasons() == [ADDED]

    def test_scaled_dot_product_attention_hides_by_them(self, family: str, reasons: Any) -> None:
        model = quantized(build(family, attn_implementation="sdpa"))
        mask = seen(9, 9)
        found, calls = logits(model, words(), attention_mask=mask)
        assert calls == 2
        assert close(found, logits(unfused(model), words(), attention_mask=mask)[0])
        assert not reasons()
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        answer, calls = logits(eager, words(), attention_mask=mask)
        assert calls == 0
        assert not close(answer, found)

    def test_compiled_graphs_add_bools(self, family: str, together: bool) -> None:
        if family != "Llama":
            pytest.skip("the others compile alike")
        model = quantized(build(family, attn_implementation="eager"))
        mask = seen(9, 9)
        wanted = logits(unfused(model), words(), attention_mask=mask)[0]
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            assert close(compiled(words(), attention_mask=mask).logits, wanted)
