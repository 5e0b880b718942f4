"""Layers that run as one operator: same buffers, same answers, and the parts wherever those may make a difference."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from mono_quant.modules import FusedLayer, fuse_layers, quantize_linear_module, restore_layers
from tests.integrations.encoder_models import (
    bert,
    close,
    count,
    from_parts,
    fused_names,
    hidden,
    part_by_part,
    quantized,
    run,
)
from tests.integrations.encoder_models import words as ids
from tests.io.models import same_bits

pytestmark = pytest.mark.usefixtures("native_backend")


@pytest.fixture
def layer() -> Any:
    return quantized(bert()).encoder.layer[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, 36)


class TestTheLayer:
    def test_is_still_of_its_class_and_says_what_it_is(self, layer: Any) -> None:
        assert isinstance(layer, BertLayer)
        assert isinstance(layer, FusedLayer)
        assert repr(layer).startswith("FusedBertLayer(")

    def test_has_the_same_state(self) -> None:
        small = quantized(bert())
        twin = part_by_part(small)
        for _ in range(2):  # plain, and in tiles
            for mine, theirs in (
                (small.state_dict(), twin.state_dict()),
                (dict(small.named_parameters()), dict(twin.named_parameters())),
                (dict(small.named_buffers()), dict(twin.named_buffers())),
            ):
                assert list(mine) == list(theirs)
                assert all(same_bits(mine[name].detach(), theirs[name].detach()) for name in mine)
            assert [name for name, _ in small.named_modules()] == [name for name, _ in twin.named_modules()]
            hidden(small, ids()), hidden(twin, ids())

    def test_in_bfloat16_is_one_call_that_rounds_less_than_its_parts(self) -> None:
        small = quantized(bert())
        wanted = hidden(small, ids())
        half = copy.deepcopy(small).bfloat16()
        assert count(half, ids()) == len(fused_names(small))
        answer, parts = hidden(half, ids()), hidden(part_by_part(half), ids())
        assert answer.dtype == torch.bfloat16
        assert float((answer.float() - wanted).norm()) < float((parts.float() - wanted).norm())
        assert count(half.float(), ids()) == len(fused_names(small))

    @torch.no_grad()
    def test_takes_its_arguments_by_place_and_by_name(self, layer: Any, x: Tensor) -> None:
        mask = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
        wanted, fused = run(layer, x, mask)
        assert fused
        assert close(wanted, from_parts(layer, x, mask))
        for args, kwargs in (
            ((x,), {"attention_mask": mask}),
            ((), {"hidden_states": x, "attention_mask": mask}),
            ((x, mask, None, None, None), {}),
            ((x, mask), {"position_ids": torch.arange(7)[None], "past_key_values": None, "output_attentions": False}),
        ):
            answer, fused = run(layer, *args, **kwargs)
            assert fused
            assert same_bits(answer, wanted)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", [torch.bool, torch.float32])
    @pytest.mark.parametrize("shape", [(1, 1, 1, 7), (3, 1, 1, 7), (1, 1, 7, 7), (3, 1, 7, 7)])
    def test_takes_every_mask(self, layer: Any, x: Tensor, kind: torch.dtype, shape: tuple[int, ...]) -> None:
        seen = torch.rand(shape) < 0.7
        mask = seen if kind == torch.bool else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        for given in (mask, mask.expand(3, 1, 7, 7)):
            answer, fused = run(layer, x, given)
            assert fused
            assert close(answer, from_parts(layer, x, given))

    @torch.no_grad()
    def test_no_tokens(self, layer: Any) -> None:
        answer, fused = run(layer, torch.empty(2, 0, 36))
        assert (answer.shape, fused) == ((2, 0, 36), True)

    def test_inference_mode(self, layer: Any, x: Tensor) -> None:
        with torch.inference_mode():
            answer, fused = run(layer, x)
            assert fused
            assert answer.is_inference()

    def test_eight_threads_that_come_first(self) -> None:
        wanted = hidden(quantized(bert()), ids())
        for _ in range(3):
            small = quantized(bert())
            start = Barrier(8)

            def work(_: int, small: Any = small, start: Barrier = start) -> Tensor:
                start.wait()
                return hidden(small, ids())

            with ThreadPoolExecutor(8) as pool:
                assert all(same_bits(answer, wanted) for answer in pool.map(work, range(8)))

    def test_fusing_again_changes_nothing(self, layer: Any) -> None:
        kind = type(layer)
        assert fuse_layers(layer) == []
        assert type(layer) is kind
        restore_layers(layer)
        assert type(layer) is BertLayer
        assert fuse_layers(layer) == [""]
        assert type(layer) is kind


def _other_linear(layer: Any) -> None:
    torch.manual_seed(9)
    layer.output.dense = quantize_linear_module(nn.Linear(70, 36).eval(), symmetric=True)


CHANGES: dict[str, Callable[[Any], object]] = {
    "norm in place": lambda layer: layer.output.LayerNorm.weight.mul_(2),
    "norm by data": lambda layer: setattr(layer.output.LayerNorm.bias, "data", torch.ones(36)),
    "norm by assignment": lambda layer: setattr(layer.output.LayerNorm, "weight", nn.Parameter(torch.ones(36) * 3)),
    "first norm in place": lambda layer: layer.attention.output.LayerNorm.bias.add_(torch.randn(36)),
    "norm's epsilon": lambda layer: setattr(layer.output.LayerNorm, "eps", 1.0),
    "norm replaced": lambda layer: setattr(layer.output, "LayerNorm", nn.LayerNorm(36).eval()),
    "linear replaced": _other_linear,
    "bias in place": lambda layer: layer.output.dense.bias.add_(torch.randn(36)),
    "bias by assignment": lambda layer: layer.output.dense.set_tensor("bias", torch.randn(36)),
    "no bias": lambda layer: layer.output.dense.set_tensor("bias", None),
    "scale in place": lambda layer: layer.attention.self.value.weight_scale.mul_(3),
    "scale by assignment": lambda layer: layer.attention.self.value.set_tensor("weight_scale", torch.rand(36, 1)),
    "codes": lambda layer: layer.output.dense.set_tensor("weight", -layer.output.dense.codes),
}


class TestChanges:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_a_change_is_seen_by_the_next_call(self, layer: Any, x: Tensor, change: Callable[[Any], object]) -> None:
        before, _ = run(layer, x)
        change(layer)
        answer, fused = run(layer, x)
        assert fused
        assert not close(answer, before)
        assert close(answer, from_parts(layer, x))
        assert same_bits(answer, copy.deepcopy(layer)(x))

    @torch.no_grad()
    def test_zero_points_are_seen_too(self, x: Tensor) -> None:
        layer = quantized(bert(), scheme="asymmetric").encoder.layer[0]
        before = layer(x)
        layer.output.dense.set_tensor("weight_zero_point", torch.full((36, 1), 9, dtype=torch.int8))
        answer, fused = run(layer, x)
        assert fused
        assert not same_bits(answer, before)
        assert close(answer, from_parts(layer, x))

    def test_other_weights_can_be_loaded(self) -> None:
        small, other = quantized(bert()), bert()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) / 8)
        other = quantized(other)
        before, wanted = hidden(small, ids()), hidden(other, ids())
        small.load_state_dict(other.state_dict())
        assert count(small, ids()) == 2
        assert same_bits(hidden(small, ids()), wanted)
        assert not close(wanted, before)

    @torch.no_grad()
    def test_tiles_are_let_go_when_the_layer_is_moved(self, layer: Any, x: Tensor) -> None:
        layer(x)
        tiles = weakref.ref(layer.output.dense._buffers["packed_weight"])
        assert tiles() is not None
        layer.half()
        gc.collect()
        assert tiles() is None


class TestCopies:
    @pytest.mark.parametrize("used_before", [True, False])
    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            copy.copy,
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: torch.load(_written(model), weights_only=False),
        ],
        ids=["deepcopy", "copy", "pickle", "torch.save"],
    )
    def test_a_copy_answers_the_same_bits(self, copied: Callable[[Any], Any], used_before: bool) -> None:
        small = quantized(bert())
        if used_before:
            hidden(small, ids())
        twin = copied(small)
        assert fused_names(twin) == fused_names(small)
        assert type(twin.encoder.layer[0]) is type(small.encoder.layer[0])
        assert same_bits(hidden(twin, ids()), hidden(small, ids()))
        assert count(twin, ids()) == 2

    def test_a_deep_copy_is_on_its_own(self, layer: Any, x: Tensor) -> None:
        with torch.no_grad():
            wanted = layer(x)
            twin = copy.deepcopy(layer)
            twin.output.LayerNorm.weight.mul_(2)
            assert not close(twin(x), wanted)
            assert same_bits(layer(x), wanted)

    def test_another_process_reads_a_pickle(self, tmp_path: Any) -> None:
        small = quantized(bert())
        torch.save((small, ids(), hidden(small, ids())), tmp_path / "model.pickle")
        code = (
            "import sys, torch; model, ids, wanted = torch.load(sys.argv[1], weights_only=False)\n"
            "with torch.no_grad(): answer = model(ids).last_hidden_state\n"
            "print(type(model.encoder.layer[0]).__name__, torch.equal(answer, wanted))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == ["FusedBertLayer", "True"], done.stderr


def _written(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file
