"""The static graph as a module: a list of steps over numbered values, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from mono_quant.calibration.batches import describe_value
from mono_quant.errors import CheckpointError, InputError, InputTypeError, MonoQuantError
from mono_quant.graph.fused import FusedRun, fuse_steps
from mono_quant.graph.layers import KINDS, Layer
from mono_quant.graph.layers.checks import require_sound
from mono_quant.graph.layers.layer import build_layer, report_lost_gradients
from mono_quant.locks import ForkSafeLock
from mono_quant.modules.notices import report_once
from mono_quant.ops import get_backend

FORMAT_VERSION: Final = 1

# Kinds of inputs that did not suit a fused run; beyond, they are found out again.
_REMEMBERED: Final = 64

_EXPORTED_BY_STEPS: Final = (
    "a static graph that has not run on the native backend since it was made or changed is exported step by step, in "
    "float64: call it once before torch.export for a program with native kernels"
)

# Shape, dtype and strides of each input of a fused run.
_Signature = tuple[tuple[torch.Size, torch.dtype, tuple[int, ...]], ...]

_lock = ForkSafeLock()


@dataclass(frozen=True)
class _Runs:
    """The fused runs of a graph by their first step, and the layers of all its steps when they were made."""

    layers: tuple[nn.Module, ...]
    by_start: dict[int, FusedRun]

    def are_current(self, layers: tuple[nn.Module, ...]) -> bool:
        return self.layers == layers and all(map(FusedRun.is_current, self.by_start.values()))


@dataclass(frozen=True)
class Step:
    """One call of a layer.

    Attributes:
        name: The layer or operation of the float model that it comes from.
        inputs: Numbers of the values that it takes.
        output: Number of the value that it answers.
    """

    name: str
    inputs: tuple[int, ...]
    output: int


class StaticGraph(nn.Module):
    """A model whose activations stay 8-bit codes from layer to layer.

    It is called as the float model was. Values get numbers: first the inputs, then the answers of the steps; each is
    let go after its last use.

    Args:
        steps: What to do, in order.
        layers: The layer of each step.
        parameters: Names of the float model's parameters of ``forward``, in order.
        inputs: Names of those that are tensors of the graph, numbered from 0.
        output: What to answer: a nest of lists of the form ``[kind, content]``, see :func:`output_of`.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        layers: Sequence[Layer],
        parameters: Sequence[str],
        inputs: Sequence[str],
        output: Any,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.steps = tuple(steps)
        self.parameter_names = tuple(parameters)
        self.input_names = tuple(inputs)
        self.output = output
        self._values = max([len(inputs) - 1, *(step.output for step in steps)]) + 1
        self._released = _last_uses(self.steps, set(numbers_in(output)))
        self._runs: _Runs | None = None
        self._unfit: set[tuple[int, _Signature]] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values: list[Any] = [None] * self._values
        given = self._bind(args, kwargs)
        report_lost_gradients(given)
        layers = self._layers_now()
        values[: len(self.input_names)] = given
        name = ""
        runs = self._fused_runs(layers, given)
        index = 0
        try:
            while index < len(layers):
                run = runs.get(index)
                if run is not None and self._run_fused(run, values):
                    index = run.stop
                    continue
                step = self.steps[index]
                name = step.name
                values[step.output] = layers[index](*[values[number] for number in step.inputs])
                for number in self._released[index]:
                    values[number] = None
                index += 1
        except (MonoQuantError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self._unfit.clear()  # it was not the fused run that did not suit the input
            raise InputError(
                f"the static graph failed at {name!r} on {', '.join(map(describe_value, given))}: "
                f"{(str(error).strip() or type(error).__name__).splitlines()[0]}",
                suggestion="Inputs must have the dimensions, channels and dtypes of the calibration data.",
            ) from error
        return output_of(self.output, values)

    def _layers_now(self) -> tuple[nn.Module, ...]:
        """Answer the layer of each step, which others may have taken the place of since the last call."""
        layers = tuple(self.layers._modules.values())
        if len(layers) != len(self.steps):
            raise InputError(
                f"the static graph has {len(self.steps)} steps, found {len(layers)} layers",
                suggestion="Put another layer into the place of one; steps cannot be added or taken away.",
            )
        return layers

    def _fused_runs(self, layers: tuple[nn.Module, ...], given: list[Any]) -> dict[int, FusedRun]:
        """Answer the runs in use, by their first step; none where the native kernels do not run."""
        if get_backend() != "native" or not all(isinstance(x, Tensor) and x.device.type == "cpu" for x in given):
            return {}
        runs = self._runs
        if runs is not None and runs.are_current(layers):
            return runs.by_start
        if torch.compiler.is_exporting():
            # Stand-ins are in the places of the layers' tensors, and no run can be made of those.
            report_once(_EXPORTED_BY_STEPS)
            return {}
        with _lock:
            runs = self._runs
            if runs is None or not runs.are_current(layers):
                if any(b.device.type != "cpu" for b in self.buffers()):
                    return {}
                made = fuse_steps(self.steps, layers, self._released, set(numbers_in(self.output)))
                self._runs = runs = _Runs(layers, {run.start: run for run in made})
            return runs.by_start

    def _run_fused(self, run: FusedRun, values: list[Any]) -> bool:
        """Run several steps as one; answer whether that could be done."""
        if self._unfit and (run.start, _signature(run, values)) in self._unfit:
            return False
        try:
            run(values)
        except RuntimeError as error:
            if "NaN" in str(error):
                raise InputError("a statically quantized layer met NaN in an input; 8-bit codes have no NaN") from error
            # Inputs that are not images, or sums that broadcast: each step by itself takes those or says what is wrong.
            if len(self._unfit) >= _REMEMBERED:
                self._unfit.clear()
            self._unfit.add((run.start, _signature(run, values)))
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": None}

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        given = {name: value for name, value in given.items() if value is not None}
        if len(args) > len(self.parameter_names) or given.keys() != set(self.input_names):
            raise InputError(
                f"the static graph takes {', '.join(self.input_names)}, found {', '.join(given) or 'nothing'}",
                suggestion="It was captured with these inputs; other arguments need a calibration of their own.",
            )
        return [given[name] for name in self.input_names]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the graph to another device. Its precision is fixed: ``.half()`` and ``.to(dtype)`` change nothing."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def to_float(self) -> nn.Module:
        """Refuse: norms are folded into weights and layers have become steps, so no standard layers are left.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "a static graph cannot be turned back into standard layers: its norms are folded into its weights",
            suggestion="Keep the float model; quantize() does not touch it.",
        )

    def describe(self) -> dict[str, Any]:
        """Answer the graph without its numbers as plain values for a checkpoint; :meth:`from_description` undoes it.

        Raises:
            InputTypeError: A module that is no layer of a graph stands in the place of one.
        """
        return {
            "format_version": FORMAT_VERSION,
            "parameters": list(self.parameter_names),
            "inputs": list(self.input_names),
            "output": self.output,
            "steps": [
                {
                    "name": step.name,
                    "inputs": list(step.inputs),
                    "output": step.output,
                    "layer": _layer(step, layer).describe(),
                }
                for step, layer in zip(self.steps, self.layers, strict=True)
            ],
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> StaticGraph:
        """Answer a graph whose buffers have the right shapes and no values yet: load its state dict next.

        Raises:
            CheckpointError: The description is from a newer version, or is not one of a static graph.
        """
        version = description.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"the static graph is of format {version!r}, this version reads {FORMAT_VERSION}",
                suggestion="Load it with the version of mono_quant that wrote it.",
            )
        try:
            steps = [
                Step(str(step["name"]), tuple(int(n) for n in step["inputs"]), int(step["output"]))
                for step in description["steps"]
            ]
            layers = [build_layer(step["layer"], KINDS) for step in description["steps"]]
            parameters, inputs = ([str(name) for name in description[key]] for key in ("parameters", "inputs"))
            _require_order(steps, len(inputs), description["output"])
            graph = cls(steps, layers, parameters, inputs, description["output"])
        except CheckpointError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the description of a static graph is damaged: {error!r}") from error
        for step, layer in zip(steps, layers, strict=True):
            require_sound(step.name, layer, len(step.inputs))
        return graph


def _require_order(steps: Sequence[Step], inputs: int, output: Any) -> None:
    """Refuse steps that take what is not there yet, or number their answers beyond the number of steps."""
    known = set(range(inputs))
    numbers = range(inputs, inputs + len(steps))
    for step in steps:
        if not known.issuperset(step.inputs) or step.output in known or step.output not in numbers:
            raise CheckpointError(f"the description of a static graph is damaged at step {step.name!r}")
        known.add(step.output)
    if not known.issuperset(numbers_in(output)):
        raise CheckpointError("the description of a static graph is damaged: its answer is never computed")


class Fields(dict[Any, Any]):
    """An answer with named fields: read by key, by position or as attribute, like those of transformers' models."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the answer has no field {name!r}; its fields are {', '.join(map(repr, self))}")

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """Answer the fields' values in order."""
        return tuple(self.values())


def _signature(run: FusedRun, values: Sequence[Any]) -> _Signature:
    given = (values[number] for number in run.inputs)
    return tuple((value.shape, value.dtype, value.stride()) for value in given)


def _layer(step: Step, module: nn.Module) -> Layer:
    if not isinstance(module, Layer):
        raise InputTypeError(
            f"step {step.name!r} of the static graph is a {type(module).__name__}, expected a layer of a graph",
            suggestion="It runs so, but no checkpoint can hold it: put the layer back before you save.",
        )
    return module


def _last_uses(steps: Sequence[Step], kept: set[int]) -> list[tuple[int, ...]]:
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        # An answer that nothing uses is let go at once.
        for number in (*step.inputs, step.output):
            last[number] = index
    released: list[list[int]] = [[] for _ in steps]
    for number, index in last.items():
        if number not in kept:
            released[index].append(number)
    return [tuple(numbers) for numbers in released]


def output_of(structure: Any, values: Sequence[Any]) -> Any:
    """Answer values in the form of the float model's answer.

    ``["value", n]`` is value ``n``; ``["list", [...]]`` and ``["tuple", [...]]`` hold structures, ``["dict", {...}]``
    and ``["fields", {...}]`` structures by key; ``["constant", c]`` is ``c``.
    """
    kind, content = structure
    if kind == "value":
        return values[content]
    if kind == "constant":
        return content
    if kind in ("dict", "fields"):
        named = {key: output_of(item, values) for key, item in content.items()}
        return named if kind == "dict" else Fields(named)
    items = [output_of(item, values) for item in content]
    return tuple(items) if kind == "tuple" else items


def numbers_in(structure: Any) -> list[int]:
    """Answer the numbers of the values in an answer's structure."""
    kind, content = structure
    if kind == "value":
        if type(content) is not int:
            raise ValueError(f"value {content!r}")
        return [content]
    if kind == "constant":
        return []
    if kind not in ("dict", "fields", "list", "tuple"):
        raise ValueError(f"unknown structure {kind!r}")
    items = content.values() if kind in ("dict", "fields") else content
    return [number for item in items for number in numbers_in(item)]
