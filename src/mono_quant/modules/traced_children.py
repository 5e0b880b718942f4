"""Which children of a module are all that read another one's output, found without running them.

``torch.fx`` would trace the module, but while it does, every module that any thread calls is called through its tracer.
So ``forward`` is called on a twin whose children are stubs, with symbolic values of ``torch.fx`` in the place of
tensors: nothing outside the twin takes part.

That shows what one run does. It is what every run does where the code of ``forward`` has no branch: for calls that
stand in that code itself, whatever functions that it calls may decide.
"""

from __future__ import annotations

import copy
import dis
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, Final
from weakref import ref

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_JUMPS: Final = frozenset((*dis.hasjrel, *dis.hasjabs))
_SUSPENDED: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_PLAIN_CONTAINERS: Final = (dict, list, set)


class _Tracer(GraphAppendingTracer):
    """Appends to a graph; knows the code of the traced ``forward`` and what the calls in it have answered."""

    def __init__(self, graph: fx.Graph, code: CodeType) -> None:
        super().__init__(graph)
        self.code = code
        self.answers: dict[fx.Node, ref[fx.Proxy]] = {}

    def create_arg(self, a: Any) -> Any:
        # What constants a value is computed with is of no interest here.
        return None if isinstance(a, Tensor) else super().create_arg(a)


class _Stub:
    """Stands for a child: a call of it is noted, and what it holds can be seen."""

    def __init__(self, tracer: _Tracer, name: str, module: nn.Module) -> None:
        self._tracer, self._name, self._module = tracer, name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._tracer.create_proxy("call_module", self._name, args, kwargs)
        if sys._getframe(1).f_code is self._tracer.code:
            self._tracer.answers[answer.node] = ref(answer)
        return answer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, nn.Module):
            return _Stub(self._tracer, f"{self._name}.{name}", found)
        if callable(found):
            raise TypeError(f"the method {name} of {self._name} may do anything with the module")
        return found

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[_Stub | None]:
        if not isinstance(self._module, nn.ModuleList | nn.Sequential):
            raise TypeError(f"{self._name} is no list of modules")
        return iter(list(_stubs(self._tracer, self._module, f"{self._name}.").values()))

    def __getitem__(self, at: Any) -> Any:
        return list(self)[at]


def _stubs(tracer: _Tracer, module: nn.Module, prefix: str = "") -> dict[str, _Stub | None]:
    children = module._modules.items()
    return {name: None if m is None else _Stub(tracer, prefix + name, m) for name, m in children}


def sole_readers(module: nn.Module) -> set[tuple[str, str]]:
    """Answer which children are all that read the output of which other ones, in every run of ``forward``.

    Returns:
        Pairs of names: of a child that ``forward`` calls once, and of the child that it calls once with that answer and
        nothing else, in evaluation mode. None where that cannot be told.
    """
    forward: Any = type(module).forward
    if not _is_straight(forward) or hasattr(type(module), "__del__"):
        return set()
    try:
        return _read_once(*_trace(module, forward))
    except Exception:  # any code may stand in a forward, and what cannot be followed is simply not known
        return set()


def _is_straight(forward: Any) -> bool:
    """Say whether a function does the same at every call, as far as its own code goes."""
    if type(forward) is not FunctionType:
        return False
    code: Any = forward.__code__
    if code.co_flags & _SUSPENDED or code.co_cellvars or getattr(code, "co_exceptiontable", b""):
        return False
    return not any(instruction.opcode in _JUMPS for instruction in dis.get_instructions(code))


def _trace(module: nn.Module, forward: FunctionType) -> tuple[_Tracer, set[fx.Node]]:
    """Answer what ``forward`` did, and the calls in it whose answers somebody still holds."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if not all(parameter.kind in _NAMED for parameter in parameters):
        raise TypeError("arguments whose names are not known may be anything")
    graph = fx.Graph()
    tracer = _Tracer(graph, forward.__code__)
    kind = type(module)
    twin = kind.__new__(kind)
    # What forward assigns, or adds to what the module holds, is the twin's.
    own = {name: copy.copy(v) if type(v) in _PLAIN_CONTAINERS else v for name, v in module.__dict__.items()}
    buffers = {name: None if b is None else b.detach().clone() for name, b in module._buffers.items()}
    twin.__dict__.update(own, training=False, _buffers=buffers, _modules=_stubs(tracer, module))
    given = {parameter.name: fx.Proxy(graph.placeholder(parameter.name), tracer) for parameter in parameters}
    with torch.random.fork_rng(devices=[]):
        answer = forward(twin, **given)
    graph.output(tracer.create_arg(answer))
    del answer
    return tracer, {node for node, held in tracer.answers.items() if held() is not None}


def _read_once(tracer: _Tracer, held: set[fx.Node]) -> set[tuple[str, str]]:
    pairs = set()
    calls = Counter(node.target for node in tracer.graph.nodes if node.op == "call_module")
    for node in tracer.answers:
        if len(node.users) != 1 or calls[node.target] != 1 or node in held:
            continue
        (user,) = node.users
        if user in tracer.answers and calls[user.target] == 1 and user.args == (node,) and not user.kwargs:
            pairs.add((str(node.target), str(user.target)))
    return pairs
