"""Steps that stay PyTorch's own: float functions where the graph is cut, and moves that suit codes as they are."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from mono_quant.errors import CheckpointError
from mono_quant.graph.layers.functions import find_function
from mono_quant.graph.layers.layer import Layer

_NAMED: Final[dict[str, dict[str, Any]]] = {
    "dtype": {
        str(d).removeprefix("torch."): d
        for d in (
            torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16,
            torch.int32, torch.int64, torch.bool,
        )
    },
    "layout": {"strided": torch.strided},
    "memory_format": {
        str(f).removeprefix("torch."): f
        for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
    },
}  # fmt: skip


@dataclass(frozen=True)
class CallSpec:
    """One call of a function.

    Attributes:
        function: ``aten.NAME.OVERLOAD`` or ``python.NAME``; see :mod:`mono_quant.graph.layers.functions`.
        args: Positional arguments as plain values, see :func:`encode`.
        kwargs: Keyword arguments likewise.
    """

    function: str
    args: list[Any]
    kwargs: dict[str, Any]


class Call(Layer):
    """Calls one of PyTorch's functions on the step's inputs.

    Buffers: ``constant_N``, tensors among the arguments that belong to the model.
    """

    kind: ClassVar[str] = "call"
    spec_type: ClassVar[type[CallSpec]] = CallSpec
    spec: CallSpec

    def __init__(self, spec: CallSpec, **tensors: Tensor | None) -> None:
        super().__init__(spec, **tensors)
        self._function = find_function(spec.function)
        self._args = [self._compile(value) for value in spec.args]
        self._kwargs = {name: self._compile(value) for name, value in spec.kwargs.items()}

    def forward(self, *inputs: Any) -> Any:
        args = [value(inputs) if callable(value) else value for value in self._args]
        kwargs = {name: value(inputs) if callable(value) else value for name, value in self._kwargs.items()}
        return self._function(*args, **kwargs)

    def _compile(self, value: Any) -> Any:
        """Answer a plain argument as itself and one that depends on the inputs as a function of them."""
        if isinstance(value, list):
            parts = [self._compile(item) for item in value]
            if not any(callable(part) for part in parts):
                return parts
            return lambda inputs: [part(inputs) if callable(part) else part for part in parts]
        if not isinstance(value, dict):
            return value
        ((kind, name),) = value.items()
        if kind == "input" and type(name) is int and name >= 0:
            return operator.itemgetter(name)
        if kind == "constant" and name in self._buffers:
            return lambda inputs: self._buffers[name]
        if kind == "device":
            return torch.device(name)
        if kind == "float":
            return float(name)
        if kind in _NAMED and name in _NAMED[kind]:
            return _NAMED[kind][name]
        raise CheckpointError(f"a static graph calls {self.spec.function!r} with an argument {value!r} that is none")

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        # The compiled arguments close over this layer; a copy must read its own constants.
        tensors = {name: None if t is None else t.clone() for name, t in self._buffers.items()}
        copied = Call(self.spec, **tensors)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.spec, dict(self._buffers))


def _rebuild(spec: CallSpec, tensors: dict[str, Tensor | None]) -> Call:
    return Call(spec, **tensors)


def encode(value: Any, inputs: dict[Any, int], constants: dict[Any, str]) -> Any:
    """Answer an argument of a call as plain values.

    Args:
        value: A number, string, dtype, layout, device or list of them, with graph nodes among them.
        inputs: For each node that is an input of the step, its position.
        constants: For each node that is a constant, its buffer's name.

    Raises:
        TypeError: The value is of a kind that has no plain form.
    """
    if isinstance(value, list | tuple):
        return [encode(item, inputs, constants) for item in value]
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        kind = type(value).__name__
        name = str(value).removeprefix("torch.")
        if name in _NAMED[kind]:
            return {kind: name}
    elif isinstance(value, torch.device):
        return {"device": str(value)}
    elif isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    elif value is None or isinstance(value, bool | int | float | str):
        return value
    elif value in inputs:
        return {"input": inputs[value]}
    elif value in constants:
        return {"constant": constants[value]}
    raise TypeError(f"an argument of type {type(value).__name__}")
