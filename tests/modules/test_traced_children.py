"""What a module's ``forward`` does with its children is found without running them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant.modules.traced_children import trace_children


class Base(nn.Module):
    """Children for the ``forward`` of others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.gain = nn.Parameter(torch.ones(3))


def edges(module: nn.Module) -> set[tuple[str, str]]:
    """Answer which child's answer goes to which other one."""
    graph = trace_children(module)
    calls = [node for node in graph.nodes if node.op == "call_module"]
    return {(str(a.target), str(b.target)) for a in calls for b in a.users if b.op == "call_module"}


def test_calls_of_children_are_connected_by_what_reads_them() -> None:
    class Module(Base):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(F.pad(self.b(self.a(x)) * self.gain, [1, 1]) + y)  # type: ignore[no-any-return]

    graph = trace_children(Module())
    assert edges(Module()) == {("a", "b")}
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["a", "b", "inner"]
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["x", "y"]


def test_lists_of_children_are_followed() -> None:
    class Module(Base):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.inner:
                x = layer(x)
            return self.b(self.inner[0](x))  # type: ignore[no-any-return]

    assert {("inner.0", "inner.1"), ("inner.0", "b")} <= edges(Module())


def looks_at_values(self: Base, x: Tensor) -> Tensor:
    return self.b(self.a(x)) if x.sum() > 0 else x  # type: ignore[no-any-return]


def calls_a_method(self: Base, x: Tensor) -> Tensor:
    return self.b(self.a.forward(x))  # type: ignore[no-any-return]


def takes_anything(self: Base, x: Tensor, **kwargs: Any) -> Tensor:
    return self.b(self.a(x))  # type: ignore[no-any-return]


def iterates_over_what_is_no_list(self: Base, x: Tensor) -> Tensor:
    return x + len(list(self.a))  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("forward", [looks_at_values, calls_a_method, takes_anything, iterates_over_what_is_no_list])
def test_what_cannot_be_followed_is_an_error(forward: Any) -> None:
    module = type("Module", (Base,), {"forward": forward})()
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it may be)
        trace_children(module)


def test_it_looks_at_evaluation_mode_and_changes_nothing() -> None:
    class Module(Base):
        calls: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.last = x
            return self.a(x) if self.training else self.b(x)  # type: ignore[no-any-return]

    module = Module().train()
    module.register_buffer("calls", torch.zeros(()))
    state = dict(module.__dict__)
    assert [node.target for node in trace_children(module).nodes if node.op == "call_module"] == ["b"]
    assert module.__dict__ == state
    assert int(module.calls) == 0


def test_other_threads_can_run_modules_meanwhile() -> None:
    class Module(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.b(self.a(x)))  # type: ignore[no-any-return]

    module, x = Module(), torch.randn(2, 3)
    expected = module(x)

    def call(number: int) -> bool:
        return edges(module) == {("a", "b"), ("b", "inner")} if number % 2 else torch.equal(module(x), expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))
