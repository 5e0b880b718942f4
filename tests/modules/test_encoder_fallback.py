"""Layers that run as one operator run part by part wherever that may make a difference, and say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant import InputError, ops
from mono_quant.modules import notices
from tests.integrations.encoder_models import (
    bert,
    count,
    from_parts,
    fused_names,
    hidden,
    quantized,
    run,
)
from tests.integrations.encoder_models import words as ids
from tests.io.models import same_bits

Reports = Callable[[], list[str]]

pytestmark = pytest.mark.usefixtures("native_backend")


@pytest.fixture
def layer() -> Any:
    return quantized(bert()).encoder.layer[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, 36)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Reports:
    """Answers what was reported, as if nothing had been before the test."""
    monkeypatch.setattr(notices, "_reported", set())
    caplog.set_level("WARNING", logger="mono_quant")
    prefix = "a FusedBertLayer runs part by part: "
    return lambda: [r.getMessage().removeprefix(prefix) for r in caplog.records if r.name == "mono_quant"]


def _hook(_: nn.Module, *arguments: Any) -> None:
    return None


def _patched(layer: Any) -> None:
    before = layer.attention.forward
    layer.attention.forward = lambda *args, **kwargs: before(*args, **kwargs)


STATES: dict[str, tuple[Callable[[Any], object], str | None]] = {
    "training": (lambda layer: layer.train(), None),
    "dropout in training": (lambda layer: layer.output.dropout.train(), "a Dropout in it is in training mode"),
    "attention in training": (
        lambda layer: layer.attention.self.train(), "a BertSelfAttention in it is in training mode",
    ),
    "forward hook": (
        lambda layer: layer.output.dense.register_forward_hook(_hook),
        "a QuantizedLinear in it has hooks, which want to be called",
    ),
    "forward pre-hook": (
        lambda layer: layer.attention.self.register_forward_pre_hook(_hook),
        "a BertSelfAttention in it has hooks, which want to be called",
    ),
    "patched forward": (_patched, "a BertAttention in it has a forward of its own"),
    "float layer": (
        lambda layer: setattr(layer.output, "dense", nn.Linear(70, 36)), "output.dense is not an int8 linear layer",
    ),
    "trainable bias": (
        lambda layer: setattr(layer.output.dense, "bias", nn.Parameter(torch.randn(36))),
        "output.dense has a bias that is a parameter",
    ),
    "other norm": (
        lambda layer: setattr(layer.output, "LayerNorm", nn.RMSNorm(36)),
        "output.LayerNorm is not a layer norm over rows",
    ),
    "activation": (
        lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.GELU().eval()),
        "intermediate.intermediate_act_fn is not computed by intermediate.dense",
    ),
}  # fmt: skip


@torch.no_grad()
def test_parameters_of_a_norm_are_told_apart_by_their_names(layer: Any, x: Tensor) -> None:
    norm = layer.output.LayerNorm
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert run(layer, x)[1]
    norm.weight, weight = None, norm.weight
    del norm.weight
    norm.weight = weight
    assert list(norm._parameters) == ["bias", "weight"]
    answer, fused = run(layer, x)
    assert fused
    assert torch.allclose(answer, from_parts(layer, x), atol=0.05)


@torch.no_grad()
def test_numbers_that_a_layer_holds_and_biases_are_read_again(layer: Any, x: Tensor) -> None:
    before = run(layer, x)[0]
    for change in (
        lambda: setattr(layer.attention.self, "scaling", 3.0),
        lambda: setattr(layer.output.LayerNorm, "eps", 2.0),
        lambda: layer.output.dense.bias.add_(torch.randn(36)),
        lambda: setattr(layer.output.dense.weight_scale, "data", layer.output.dense.weight_scale * 5),
    ):
        change()
        answer, fused = run(layer, x)
        assert fused
        assert torch.allclose(answer, from_parts(layer, x), atol=0.05)
        assert not torch.allclose(answer, before, atol=0.05)
        before = answer


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize(("change", "reason"), STATES.values(), ids=STATES)
@torch.no_grad()
def test_states_in_which_the_parts_run(
    layer: Any,
    x: Tensor,
    reports: Reports,
    change: Callable[[Any], object],
    reason: str | None,
    used_before: bool,
) -> None:
    if used_before:
        assert run(layer, x)[1]
    change(layer)
    torch.manual_seed(1)
    answer, fused = run(layer, x)
    assert not fused
    torch.manual_seed(1)
    assert same_bits(answer, from_parts(layer, x))
    layer(x)
    assert reports() == ([] if reason is None else [reason])


class TestFallingBack:
    """What the operator does not take goes through the layer's own class, and is reported once."""

    @pytest.mark.parametrize("backend_name", ["torch", "reference"])
    @torch.no_grad()
    def test_on_other_backends(self, layer: Any, x: Tensor, backend_name: str) -> None:
        layer(x)
        with ops.use_backend(backend_name):
            answer, fused = run(layer, x)
            assert not fused
            assert same_bits(answer, from_parts(layer, x))
        assert run(layer, x)[1]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_in_other_dtypes(self, dtype: torch.dtype, reports: Reports) -> None:
        small = quantized(bert())
        before = hidden(small, ids())
        small.to(dtype)
        assert count(small, ids()) == 0
        apart = (hidden(small, ids()).float() - before).norm() / before.norm()
        assert float(apart) < 0.02 + 4 * torch.finfo(dtype).eps
        assert reports() == [f"its input is a Tensor of {dtype} with 3 dimensions on cpu"]
        assert count(small.float(), ids()) == len(fused_names(small))

    @pytest.mark.parametrize("of", ["input", "norm"])
    def test_where_gradients_are_recorded(self, layer: Any, x: Tensor, reports: Reports, of: str) -> None:
        layer.requires_grad_(of == "norm")
        x.requires_grad_(of == "input")
        answer, fused = run(layer, x)
        assert not fused
        assert answer.requires_grad
        with torch.no_grad():
            assert run(layer, x)[1]
        assert reports() == ["gradients are recorded; call the model under torch.no_grad() or torch.inference_mode()"]

    def test_nothing_to_differentiate_runs_as_one_call_whatever_the_mode(self, layer: Any, x: Tensor) -> None:
        assert run(layer.requires_grad_(False), x)[1]

    @pytest.mark.parametrize(
        "mask",
        [
            torch.zeros(3, 7), torch.zeros(3, 3, 7, 7), torch.zeros(3, 1, 7, 7).double(), torch.zeros(1, 7, 7),
        ],
        ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype}",
    )  # fmt: skip
    @torch.no_grad()
    def test_with_other_masks(self, layer: Any, x: Tensor, reports: Reports, mask: Tensor) -> None:
        # What the parts make of the mask is up to them.
        try:
            wanted: Tensor | None = from_parts(layer, x, mask)
        except Exception as error:
            wanted = None
            with pytest.raises(type(error)):
                layer(x, mask)
        if wanted is not None:
            answer, fused = run(layer, x, mask)
            assert not fused
            assert same_bits(answer, wanted)
        assert reports() == [f"its mask is {mask.dtype} of shape {tuple(mask.shape)}"]

    @torch.no_grad()
    def test_with_a_mask_that_is_no_tensor(self, layer: Any, x: Tensor, reports: Reports) -> None:
        with pytest.raises(Exception, match=r"attn_mask|attention"):
            layer(x, "all of it")
        assert reports() == ["its mask is a str"]

    @torch.no_grad()
    def test_with_arguments_that_the_operator_does_not_know(self, layer: Any, x: Tensor, reports: Reports) -> None:
        for kwargs in ({"output_attentions": True}, {"is_causal": True}):
            for _ in range(2):
                answer, fused = run(layer, x, **kwargs)
                assert not fused
                assert same_bits(answer, from_parts(layer, x, **kwargs))
        assert not run(layer, x, None, x)[1]
        assert reports() == [
            f"it is called with {name}, which its operator does not know"
            for name in ("output_attentions", "is_causal", "encoder_hidden_states")
        ]

    @torch.no_grad()
    def test_rows_of_another_width_are_refused_by_the_layer_that_reads_them(self, layer: Any) -> None:
        for used_before in (False, True):
            if used_before:
                layer(torch.zeros(1, 2, 36))
            with pytest.raises(InputError, match="36"):
                layer(torch.zeros(2, 5, 35))

    @pytest.mark.filterwarnings("ignore")
    @torch.no_grad()
    def test_when_traced(self, layer: Any, x: Tensor) -> None:
        wanted = from_parts(layer, x)
        traced = torch.jit.trace(layer, (x,))  # type: ignore[no-untyped-call]
        assert same_bits(traced(x), wanted)

    @torch.no_grad()
    def test_under_hooks_on_all_modules(self, layer: Any, x: Tensor, reports: Reports) -> None:
        called = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
        try:
            assert not run(layer, x)[1]
        finally:
            handle.remove()
        assert called.count("QuantizedLinear") == 6
        assert reports() == ["there are hooks on all modules, which want to be called"]
        assert run(layer, x)[1]

    @torch.no_grad()
    def test_hooks_on_the_layer_itself_are_called_around_the_one_call(self, layer: Any, x: Tensor) -> None:
        seen: list[Tensor] = []
        layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
        layer.register_forward_pre_hook(_hook)
        answer, fused = run(layer, x)
        assert fused
        assert seen[0] is answer

    @torch.no_grad()
    def test_hooks_that_are_removed_are_forgotten(self, layer: Any, x: Tensor) -> None:
        wanted = layer(x)
        handle = layer.output.dense.register_forward_hook(_hook)
        assert not run(layer, x)[1]
        handle.remove()
        answer, fused = run(layer, x)
        assert fused
        assert same_bits(answer, wanted)
