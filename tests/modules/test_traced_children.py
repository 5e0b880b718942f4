"""Which children alone read another one's output is found without running them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant.modules.traced_children import sole_readers


class Base(nn.Module):
    """Children for the ``forward`` of others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.gain = nn.Parameter(torch.ones(3))


def pairs(forward: Any) -> set[tuple[str, str]]:
    return sole_readers(type("Module", (Base,), {"forward": forward})())


def test_who_alone_reads_an_answer_is_found() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Any:
        return self.inner(F.pad(self.b(self.a(x)) * self.gain, [1, 1]) + y)

    assert pairs(forward) == {("a", "b")}


def test_lists_of_children_are_followed() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.b(self.inner[1](self.inner[0](x)))

    assert pairs(forward) == {("inner.0", "inner.1"), ("inner.1", "b")}


def looks_at_values(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) if x.sum() > 0 else x


def loops(self: Any, x: Tensor) -> Any:
    for layer in (self.a, self.b):
        x = layer(x)
    return x


def guards(self: Any, x: Tensor) -> Any:
    try:
        return self.b(self.a(x))
    except RuntimeError:
        return x


def reads_later(self: Any, x: Tensor) -> Any:
    h = self.a(x)
    return lambda: self.b(h) + h


def calls_a_method(self: Any, x: Tensor) -> Any:
    return self.b(self.a.forward(x))


def takes_anything(self: Any, x: Tensor, **kwargs: Any) -> Any:
    return self.b(self.a(x))


def adds_something(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x) + 1)


def calls_twice(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) + self.a(x)


def yields(self: Any, x: Tensor) -> Any:
    yield self.b(self.a(x))


@pytest.mark.parametrize(
    "forward",
    [looks_at_values, loops, guards, reads_later, calls_a_method, takes_anything, adds_something, calls_twice, yields],
)
def test_where_it_cannot_be_told_there_is_none(forward: Any) -> None:
    assert pairs(forward) == set()


def test_nothing_is_changed() -> None:
    class Module(Base):
        calls: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            self.held["x"] = x
            torch.rand(1)
            return self.b(self.a(x))  # type: ignore[no-any-return]

    module = Module().train()
    module.register_buffer("calls", torch.zeros(()))
    module.held: dict[str, Tensor] = {}
    state, numbers = dict(module.__dict__), torch.get_rng_state()
    assert sole_readers(module) == {("a", "b")}
    assert module.__dict__ == state
    assert int(module.calls) == 0
    assert not module.held
    assert torch.equal(torch.get_rng_state(), numbers)


def test_other_threads_can_run_modules_meanwhile() -> None:
    class Module(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.b(self.a(x)))  # type: ignore[no-any-return]

    module, x = Module(), torch.randn(2, 3)
    expected = module(x)

    def call(number: int) -> bool:
        if number % 2:
            return sole_readers(module) == {("a", "b"), ("b", "inner")}
        return torch.equal(module(x), expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))
