"""Writing a graph free of writes by hand gives what PyTorch's own way gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from mono_quant.graph.capture import _quiet
from mono_quant.graph.functional import free_of_writes
from tests.graph.networks import Residuals


class _Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.norm(self.conv(x)))


def _read_after_the_write(x: Tensor) -> Tensor:
    y = x + 1
    before = y * 2
    F.relu_(y)
    return before + y


def _added_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += x
    F.hardtanh_(y)
    y += x
    return y


def _flattened(x: Tensor) -> Tensor:
    return F.dropout(x, training=False).flatten(1)


def _written_through_a_view(x: Tensor) -> Tensor:
    y = x + 1
    F.relu_(y[:, :1])
    return y


def _viewed_before_the_write(x: Tensor) -> Tensor:
    y = x + 1
    part = y[:, :1]
    F.relu_(y)
    return part + y


def _added_to_itself(x: Tensor) -> Tensor:
    y = x + 1
    y += y
    return y


def _exported(model: nn.Module) -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), _quiet():
        return export(model.eval(), (x,)), x


def _functions(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("function", [_read_after_the_write, _added_in_place, _flattened])
def test_known_functions_are_rewritten_to_what_pytorch_makes_of_them(function: Callable[[Tensor], Tensor]) -> None:
    model = _Calls(function)
    program, x = _exported(model)
    assert free_of_writes(program)
    program.graph.lint()
    program.graph_module.recompile()
    assert not any("_." in name for name in _functions(program))
    with torch.no_grad():
        constants = {**program.state_dict, **program.constants}
        values = [constants[s.target] if s.target else x for s in program.graph_signature.input_specs]
        assert torch.equal(program.graph_module(*values)[0], model(x))


def test_a_network_gets_the_functions_that_pytorch_gives_it() -> None:
    program, _ = _exported(Residuals())
    with _quiet():
        expected = _functions(program.run_decompositions({}))
    assert free_of_writes(program)
    assert sorted(_functions(program)) == sorted(expected)


@pytest.mark.parametrize("function", [_written_through_a_view, _viewed_before_the_write, _added_to_itself])
def test_writes_to_shared_memory_are_left_to_pytorch(function: Callable[[Tensor], Tensor]) -> None:
    program, _ = _exported(_Calls(function))
    before = _functions(program)
    assert not free_of_writes(program)
    assert _functions(program) == before
