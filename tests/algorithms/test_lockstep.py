"""Lockstep: all batches stop before each layer, in order, one at a time; and whatever happens, nothing is left over."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from mono_quant.algorithms.lockstep import Lockstep, join_batches
from mono_quant.calibration import Batch
from mono_quant.errors import InputError


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def _batches(count: int = 3) -> list[Batch]:
    return [Batch((torch.randn(2, 4),), {}) for _ in range(count)]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_each_layer_is_visited_once_in_order_with_the_inputs_of_all_batches() -> None:
    model, batches = _model(), _batches()
    seen: list[tuple[str, list[Tensor]]] = []

    def visit(name: str, inputs: list[Tensor]) -> nn.Module:
        seen.append((name, inputs))
        return nn.Linear.forward.__get__(_layers(model)[name])  # type: ignore[return-value]

    assert Lockstep(model, _layers(model), visit).run(batches) == []
    assert [name for name, _ in seen] == ["0", "2", "4"]
    with torch.no_grad():
        for index, batch in enumerate(batches):
            assert torch.equal(seen[0][1][index], batch.args[0])
            assert torch.equal(seen[2][1][index], model[:4](batch.args[0]))


def test_later_layers_see_what_the_replacements_answer() -> None:
    model, batches = _model(), _batches()
    seen: dict[str, list[Tensor]] = {}

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 5)

    def visit(name: str, inputs: list[Tensor]) -> nn.Module:
        seen[name] = inputs
        return Zero()

    Lockstep(model, {"0": model[0], "2": model[2]}, visit).run(batches)
    assert all(torch.equal(tensor, torch.zeros(2, 5)) for tensor in seen["2"])


def test_the_model_is_as_before_afterwards() -> None:
    model, batches = _model(), _batches()
    expected = model(batches[0].args[0])
    Lockstep(model, _layers(model), lambda name, inputs: nn.Identity()).run(batches[:1] * 0)

    def fail(name: str, inputs: list[Tensor]) -> nn.Module:
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        Lockstep(model, _layers(model), fail).run(batches)
    assert torch.equal(model(batches[0].args[0]), expected)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert threading.active_count() == threads


def test_a_batch_the_model_fails_on_is_named() -> None:
    model = _model()
    batches = [*_batches(1), Batch((torch.randn(2, 3),), {})]
    threads = threading.active_count()
    with pytest.raises(InputError, match="batch 1"):
        Lockstep(model, {"4": model[4]}, lambda name, inputs: nn.Linear(6, 2)).run(batches)
    assert threading.active_count() == threads


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for index, expert in enumerate(self.experts):
            if bool((x[:, index] > 0).any()):
                x = x + 0 * expert(x)
        return x


def test_batches_that_part_ways_do_not_wait_forever() -> None:
    model = _Experts().eval()
    first, second = torch.tensor([[1.0, 1.0, -1.0, 0.0]]), torch.tensor([[-1.0, 1.0, -1.0, 0.0]])
    seen: dict[str, int] = {}

    def visit(name: str, inputs: list[Tensor]) -> nn.Module:
        seen[name] = len(inputs)
        return nn.Identity()

    unreached = Lockstep(model, _layers(model), visit).run([Batch((first,), {}), Batch((second,), {})])
    assert seen == {"experts.0": 1, "experts.1": 2}
    assert unreached == ["experts.2"]


def test_a_run_ends_once_the_last_layer_was_visited() -> None:
    calls = []

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return x

    model = nn.Sequential(nn.Linear(4, 4), Last()).eval()
    Lockstep(model, {"0": model[0]}, lambda name, inputs: nn.Identity()).run(_batches())
    assert calls == []


def test_layers_that_are_ready_are_replaced_from_the_start() -> None:
    model, batches = _model(), _batches(1)
    seen: list[Tensor] = []

    def visit(name: str, inputs: list[Tensor]) -> nn.Module:
        seen.extend(inputs)
        return nn.Identity()

    replacement = nn.Linear(4, 5)
    Lockstep(model, {"2": model[2]}, visit, ready={"0": (model[0], replacement)}).run(batches)
    assert torch.equal(seen[0], replacement(batches[0].args[0]).relu())


def test_batches_of_one_shape_are_joined() -> None:
    batches = [Batch((torch.full((1, 3), float(i)),), {"flag": True, "table": torch.arange(5)}) for i in range(80)]
    joined = join_batches(batches)
    assert len(joined) == 8
    assert torch.equal(torch.cat([batch.args[0] for batch in joined])[:, 0], torch.arange(80.0))
    assert all(batch.kwargs["flag"] is True and len(batch.kwargs["table"]) == 5 for batch in joined)


def test_batches_that_differ_are_not_joined() -> None:
    lengths = [Batch((torch.zeros(1, 3 + i % 2),), {}) for i in range(20)]
    flags = [Batch((torch.zeros(1, 3),), {"flag": i % 2}) for i in range(20)]
    tables = [Batch((torch.zeros(1, 3),), {"table": torch.full((5,), i % 2)}) for i in range(20)]
    for batches in (lengths, flags, tables):
        assert len(join_batches(batches)) == 20
