"""What a module's own ``forward`` does with its children, found without running them.

``torch.fx`` would trace it, but while it does, every module that any thread calls is called through its tracer. So
``forward`` is called on a twin whose children are stubs, with symbolic values of ``torch.fx`` in the place of tensors:
nothing outside the twin takes part.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from mono_quant.modules.fusing_parent import own_type

_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class _Tracer(GraphAppendingTracer):
    def create_arg(self, a: Any) -> Any:
        # What constants a value is computed with is of no interest here.
        return None if isinstance(a, Tensor) else super().create_arg(a)


class _Stub:
    """Stands for a child: a call of it is noted, and what it holds can be seen."""

    def __init__(self, tracer: _Tracer, name: str, module: nn.Module) -> None:
        self._tracer, self._name, self._module = tracer, name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.create_proxy("call_module", self._name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, nn.Module):
            return _Stub(self._tracer, f"{self._name}.{name}", found)
        if callable(found):
            raise AttributeError(f"the method {name} of {self._name} may do anything with the module")
        return found

    def __len__(self) -> int:
        return len(self._module._modules)

    def __iter__(self) -> Iterator[_Stub | None]:
        if not isinstance(self._module, nn.ModuleList | nn.Sequential):
            raise TypeError(f"{self._name} is no list of modules")
        return iter(list(stub_children(self._tracer, self._module, f"{self._name}.").values()))

    def __getitem__(self, at: Any) -> Any:
        return list(self)[at]


def stub_children(tracer: _Tracer, module: nn.Module, prefix: str = "") -> dict[str, _Stub | None]:
    """Answer a stub for each child, by name."""
    children = module._modules.items()
    return {name: None if m is None else _Stub(tracer, prefix + name, m) for name, m in children}


def trace_children(module: nn.Module) -> fx.Graph:
    """Answer a graph of what the ``forward`` of the own class of ``module`` does in evaluation mode.

    Calls of children are nodes ``call_module`` with their names as targets.

    Raises:
        Exception: Anything, where ``forward`` looks at values, at arguments whose names are not known, or does
            something else that cannot be followed.
    """
    kind = own_type(module)
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if not all(parameter.kind in _NAMED for parameter in parameters):
        raise TypeError(f"forward of a {kind.__name__} takes arguments whose names are not known")
    graph = fx.Graph()
    tracer = _Tracer(graph)
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__, training=False, _modules=stub_children(tracer, module))
    for name in ("_parameters", "_buffers"):  # what forward assigns is the twin's
        twin.__dict__[name] = dict(module.__dict__[name])
    by_name = {p.name: fx.Proxy(graph.placeholder(p.name), tracer) for p in parameters}
    positional = [by_name.pop(p.name) for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    graph.output(tracer.create_arg(kind.forward(twin, *positional, **by_name)))
    return graph
