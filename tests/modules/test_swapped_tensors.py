"""Conversions that swap the contents of tensors, as ``torch.__future__`` offers: who holds one lets go first."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import mono_quant
from mono_quant import ops
from mono_quant.modules import (
    QuantizedLinear,
    WeightOnlyLinear,
    decoder_stack,
    encoder_stack,
    layer_stack,
    swapped_tensors,
)
from mono_quant.ops import native
from tests.integrations import encoder_models
from tests.modules.test_decoder_layer import build, close, keeping, logits, quantized, unfused, words
from tests.ops.operands import same_bits


@pytest.fixture(autouse=True)
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


LINEARS = (QuantizedLinear, WeightOnlyLinear)


def load(module: nn.Module, **options: Any) -> None:
    """Load what a module holds, but for norms, which are moved."""
    state = module.state_dict()
    moved = {name: t * 1.5 if "norm" in name.lower() and t.is_floating_point() else t for name, t in state.items()}
    module.load_state_dict(moved, **options)


CHANGES: dict[str, Callable[[nn.Module, list[nn.Module]], object]] = {
    "model loaded": lambda model, layers: load(model),
    "model assigned": lambda model, layers: load(model, assign=True),
    "layer loaded": lambda model, layers: load(layers[1]),
    "linear layers loaded": lambda model, layers: [load(m) for m in layers[0].modules() if type(m) in LINEARS],
    "model moved": lambda model, layers: model.to(torch.bfloat16),
    "moved and back": lambda model, layers: model.to(torch.bfloat16).to(torch.float32),
    "layer moved and back": lambda model, layers: layers[0].to(torch.bfloat16).to(torch.float32),
    "parts moved and back": lambda model, layers: [
        part.to(torch.bfloat16).to(torch.float32)
        for part in layers[1].children()
        if any(type(inside) in LINEARS for inside in part.modules())
    ],
}


def change(name: str, model: Any) -> None:
    inner = model.encoder.layer if hasattr(model, "encoder") else model.model.layers
    CHANGES[name](model, list(inner))


@pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CHANGES)
class TestWholeLayers:
    @pytest.fixture(autouse=True)
    def native_backend(self) -> Iterator[None]:
        with ops.use_backend("native"):
            yield

    @pytest.mark.parametrize("together", [True, False])
    @pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}], ids=str)
    def test_of_decoders(
        self, name: str, mode: Any, together: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not together:
            monkeypatch.setattr(layer_stack, "_STACKS", {})
        model = quantized(build(hidden_size=96, intermediate_size=160), **options)
        with mode():
            logits(model, words())
        twin = unfused(model)
        for each in (model, twin):
            change(name, each)
        with mode():
            (found, calls), (wanted, _) = logits(model, words()), logits(twin, words())
        assert calls == 2
        assert close(found, wanted)

    @pytest.mark.parametrize("together", [True, False])
    def test_of_encoders(self, name: str, mode: Any, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not together:
            monkeypatch.setattr(layer_stack, "_STACKS", {})
        model = encoder_models.quantized(encoder_models.bert())
        encoder_models.hidden(model, encoder_models.words())
        twin = encoder_models.part_by_part(model)
        for each in (model, twin):
            change(name, each)
        with mode():
            found, wanted = (encoder_models.hidden(each, encoder_models.words()).float() for each in (model, twin))
            assert encoder_models.count(model, encoder_models.words()) == 2
        assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layer", [nn.Linear(36, 8), nn.Conv1d(5, 8, 3, groups=1)], ids=["linear", "convolution"])
@torch.no_grad()
def test_layers_that_have_run_can_be_loaded(layer: nn.Module) -> None:
    model, x = mono_quant.quantize(nn.Sequential(layer)).model, torch.randn(3, 5, 36)
    before, twin = model(x), copy.deepcopy(model)
    half = {name: t // 2 if name.endswith("weight") else t for name, t in model.state_dict().items()}
    for each in (model, twin):
        each.load_state_dict(half)
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), twin(x))
    assert torch.equal(model.to("cpu")(x), twin(x))


@pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())
@pytest.mark.parametrize("kind", ["encoder", "decoder", "decoder with a static cache"])
def test_a_model_is_loaded_while_another_is_called(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = encoder_models.quantized(encoder_models.bert()) if kind == "encoder" else quantized(build())

    def run() -> torch.Tensor:
        if kind == "encoder":
            return encoder_models.hidden(model, encoder_models.words())
        cache = StaticCache(model.config, max_cache_len=30) if "static" in kind else DynamicCache()
        logits(model, words()[:, :5], **keeping(cache))
        return logits(model, words()[:, 5:], **keeping(cache))[0]

    other = mono_quant.quantize(nn.Sequential(nn.Linear(4, 4))).model
    owner = encoder_stack if kind == "encoder" else decoder_stack
    look = owner.why_parts
    loaded = []

    def load_between(operands: Any) -> Any:
        # After a call has looked at its weights, and before it computes with them.
        loaded.append(other.load_state_dict(other.state_dict()))
        return look(operands)

    with ops.use_backend("native"):
        wanted = run()
        monkeypatch.setattr(owner, "why_parts", load_between)
        assert close(run(), wanted)
        assert loaded
        monkeypatch.undo()
        assert same_bits(run(), wanted)


def test_holders_come_while_others_let_go() -> None:
    class Held:
        let = False

        def let_go(self) -> None:
            self.let = True

    stop = threading.Event()
    errors: list[Exception] = []

    def keep_asking() -> None:
        while not stop.is_set():
            held = Held()
            swapped_tensors.ask_before_swaps(held)

    def keep_letting_go() -> None:
        try:
            for _ in range(20_000):
                swapped_tensors.let_go_before_swaps()
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    asking, letting = threading.Thread(target=keep_asking), threading.Thread(target=keep_letting_go)
    try:
        asking.start()
        letting.start()
        letting.join()
    finally:
        stop.set()
        asking.join()
        sys.setswitchinterval(before)
    assert not errors
    held = Held()
    swapped_tensors.ask_before_swaps(held)
    swapped_tensors.let_go_before_swaps()
    assert held.let
