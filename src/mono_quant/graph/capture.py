"""From a model to a graph of PyTorch's functions, with a batch size that may vary."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from mono_quant.calibration import Batch, evaluating
from mono_quant.graph.functional import free_of_writes

_EXPORT_LOG: Final = logging.getLogger("torch.fx.experimental.symbolic_shapes")

# Checks of sizes that export leaves in the graph; eager PyTorch checks for itself.
_ASSERTIONS: Final = ("_assert_scalar", "_assert_async", "_assert_tensor_metadata", "sym_constrain_range")


# The library need not be imported to know its answers.
_MODEL_OUTPUT: Final = "transformers.utils.generic.ModelOutput"


class NotCapturableError(Exception):
    """Why a model has no static graph; the caller falls back and reports it."""


@dataclass
class Captured:
    """A model as a graph.

    Attributes:
        module: Placeholders are the model's tensor inputs; parameters and buffers are attributes; the output node
            holds a flat tuple.
        parameters: Names of the parameters of the model's ``forward``, in order.
        inputs: Names of those that are placeholders, in order.
        output: The answer's structure with ``["value", n]`` for the n-th of the flat outputs.
        dynamic_sizes: Whether other sizes than the batch may vary too.
    """

    module: fx.GraphModule
    parameters: list[str]
    inputs: list[str]
    output: Any
    dynamic_sizes: bool


def capture(model: nn.Module, example: Batch) -> Captured:
    """Answer ``model`` as a graph of PyTorch's functions.

    Args:
        model: In any mode; it is captured in evaluation mode and not modified.
        example: Inputs of the kind that it will get.

    Raises:
        NotCapturableError: Says why there is no graph.
    """
    parameters, names = _names(model, example)
    batch = _at_least_two(example)
    first_error: Exception | None = None
    for dynamic_sizes in (True, False):
        try:
            program = _export(model, batch, dynamic_sizes)
            break
        except Exception as error:
            # What export raises is open-ended: user code runs inside it. All of it means the same here.
            first_error = first_error or error
    else:
        assert first_error is not None
        raise NotCapturableError(f"torch.export cannot capture it: {_reason(first_error)}") from first_error
    return _as_graph(program, parameters, names, dynamic_sizes)


def _names(model: nn.Module, example: Batch) -> tuple[list[str], list[str]]:
    """Answer the parameters of ``forward`` and those that the example gives."""
    for value in (*example.args, *example.kwargs.values()):
        if not isinstance(value, Tensor):
            raise NotCapturableError(f"an input is a {type(value).__name__}, not a tensor")
    signature = inspect.signature(model.forward)
    kinds = inspect.Parameter
    parameters = [
        name for name, p in signature.parameters.items() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    names = [*parameters[: len(example.args)], *example.kwargs]
    if len(example.args) > len(parameters) or not set(names) <= set(parameters):
        raise NotCapturableError("its forward takes a variable number of arguments")
    return parameters, names


def _at_least_two(example: Batch) -> Batch:
    """Export takes sizes of 0 and 1 for fixed; two samples leave the batch open."""
    if example.samples > 1:
        return example.head(2)

    def double(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor

    return Batch(tuple(double(t) for t in example.args), {name: double(t) for name, t in example.kwargs.items()})


def _export(model: nn.Module, batch: Batch, dynamic_sizes: bool) -> ExportedProgram:
    def sizes(tensor: Tensor) -> dict[int, Any]:
        other = Dim.AUTO if dynamic_sizes else Dim.STATIC
        return {dim: Dim.DYNAMIC if dim == 0 else other for dim in range(tensor.dim())}

    shapes: Any = tuple(sizes(tensor) for tensor in batch.args)
    if batch.kwargs:
        names = list(inspect.signature(model.forward).parameters)
        positional = dict(zip(names, shapes, strict=False))
        shapes = positional | {name: sizes(tensor) for name, tensor in batch.kwargs.items()}
    with evaluating(model), _quiet():
        program: ExportedProgram = export(model, batch.args, batch.kwargs, dynamic_shapes=shapes, strict=False)
        if free_of_writes(program):
            return program
        # Without decompositions this only makes the graph free of writes.
        functional: ExportedProgram = program.run_decompositions({})
        return functional


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep export from printing: it warns about its own deprecated parts and dumps graphs that it gives up."""
    level = _EXPORT_LOG.level
    _EXPORT_LOG.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        _EXPORT_LOG.setLevel(level)


def _as_graph(program: ExportedProgram, parameters: list[str], names: list[str], dynamic_sizes: bool) -> Captured:
    signature = program.graph_signature
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise NotCapturableError("its forward changes its own buffers or inputs")
    module = program.graph_module
    placeholders = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    tensors = {**program.state_dict, **program.constants}
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            continue
        value = tensors.get(spec.target or "")
        if not isinstance(value, Tensor):
            raise NotCapturableError(f"its graph holds a {spec.kind.name.lower()} that is not a tensor")
        attribute = f"_constant_{node.name}"
        module.register_buffer(attribute, value.detach())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(attribute)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        module.graph.erase_node(node)
    _drop_assertions(module.graph)
    structure = pytree.tree_unflatten(list(range(program.call_spec.out_spec.num_leaves)), program.call_spec.out_spec)
    return Captured(module, parameters, names, _structure(structure), dynamic_sizes)


def _structure(value: Any) -> Any:
    if isinstance(value, int):
        return ["value", value]
    if value is None:
        return ["constant", None]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_structure(item) for item in value]]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return ["dict", {key: _structure(item) for key, item in value.items()}]
    if _is_model_output(value):
        return ["fields", {key: _structure(item) for key, item in value.items()}]
    raise NotCapturableError(f"it answers a {type(value).__name__}, not tensors in tuples, lists or dicts")


def _is_model_output(value: Any) -> bool:
    """Say whether a value is an answer with named fields of one of transformers' models."""
    return any(f"{base.__module__}.{base.__qualname__}" == _MODEL_OUTPUT for base in type(value).__mro__)


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and any(a in str(node.target) for a in _ASSERTIONS):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _reason(error: Exception) -> str:
    if any(base.__name__ == "GuardOnDataDependentSymNode" for base in type(error).__mro__):
        return "what its forward does depends on the values of tensors"
    if "Constraints violated" in str(error):
        return "its forward fixes the size of the batch, as len(x) and a reshape to a fixed size do"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def layer_name(node: fx.Node) -> str:
    """Answer the name of the model's layer that a node comes from; the node's own if it comes from none."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = str(list(stack.values())[-1][0])
        path = path.removeprefix("L['self']").removeprefix(".")
        if path:
            return path
    return str(node.name)
