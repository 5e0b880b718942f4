"""Saves and loads statically quantized models: whole graphs, and static layers inside an architecture."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mono_quant.core.layer_scheme import INT8_STATIC
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import CheckpointError, InputError, MonoQuantError
from mono_quant.graph import (
    StaticGraph,
    StaticLayer,
    describe_static,
    described_tensors,
    is_static,
    restore_static,
    static_weights,
)
from mono_quant.io.checkpoint import Checkpoint
from mono_quant.io.header import LayerRecord
from mono_quant.io.static_record import StaticRecord
from mono_quant.modules import REPLACED_FORWARD, QuantizedModule, has_own_forward

_WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def static_records(
    model: nn.Module, info: QuantizationInfo | None
) -> tuple[dict[str, LayerRecord], StaticRecord | None]:
    """Answer what a header says of the static layers of a model; nothing if it has none.

    Raises:
        InputError: A static graph is a part of the model, and not the model.
    """
    if not is_static(model):
        return {}, None
    if not isinstance(model, StaticGraph):
        inside = [name for name, module in model.named_modules() if isinstance(module, StaticGraph)]
        if inside:
            raise InputError(
                f"the model ({type(model).__name__}) holds a static graph as its part {inside[0]!r}, and checkpoints "
                "hold a static graph only as a whole",
                suggestion="Save that part in a file of its own.",
            )
    records = {
        weight.name: LayerRecord(weight.scheme, *_float_form(model, weight.name)) for weight in static_weights(model)
    }
    return records, StaticRecord.of(describe_static(model), info)


def _float_form(model: nn.Module, name: str) -> tuple[str | None, torch.dtype | None]:
    if isinstance(model, StaticGraph):
        return None, None  # a step may come from a norm or a function
    layer = model.get_submodule(name)
    assert isinstance(layer, StaticLayer)
    return type(layer.to_float()).__name__, layer.float_dtype


def load_graph(
    checkpoint: Checkpoint, architecture: nn.Module | None, strict: bool, device: torch.device | None
) -> StaticGraph:
    """Answer the graph that a checkpoint holds.

    Args:
        checkpoint: Whose header describes a graph.
        architecture: The float model, if the caller has it: it must have the graph's inputs and layers.
        strict: Refuse tensors that the graph has no place for; otherwise a warning lists them.
        device: Where the graph goes; by default the CPU.

    Raises:
        CheckpointError: The description is damaged, does not fit the tensors, or not the architecture.
    """
    graph = _restore(checkpoint, None)
    assert isinstance(graph, StaticGraph)
    expected = _require_described(checkpoint)
    unexpected = [name for name in checkpoint.names if name not in expected]
    if unexpected and strict:
        raise _misfit(checkpoint, [f"unexpected: {name!r}" for name in unexpected])
    if unexpected:
        warnings.warn(f"{checkpoint.path}: tolerated {', '.join(map(repr, unexpected))}", stacklevel=3)
    if architecture is not None and not is_static(architecture):
        _require_same_model(checkpoint, graph, architecture)
    if graph.state_dict().keys() != expected.keys():
        raise CheckpointError(f"{checkpoint.path}: the description of the static graph contradicts itself")
    graph.load_state_dict({name: checkpoint.read(name) for name in expected})
    return graph if device is None else graph.to(device)


def with_static_layers(checkpoint: Checkpoint, architecture: nn.Module) -> nn.Module:
    """Answer a copy of an architecture with static layers, still without values, where a checkpoint describes them.

    Raises:
        CheckpointError: The description is damaged, does not fit the tensors, or the architecture lacks a layer.
        InputError: The architecture cannot be copied.
    """
    header = checkpoint.header
    assert header is not None
    modules = dict(architecture.named_modules())
    problems = []
    for name, record in header.layers.items():
        module = modules.get(name)
        if record.scheme.kind != INT8_STATIC or isinstance(module, StaticLayer):
            continue
        found = f"layer {name!r}: the file holds a static {record.float_type or 'layer'}"
        if module is None:
            problems.append(f"{found}, the architecture has no such module")
        elif isinstance(module, QuantizedModule) or type(module).__name__ != record.float_type:
            problems.append(f"{found}, the architecture has a {type(module).__name__}")
        elif has_own_forward(module):
            problems.append(f"{found}, the architecture has one that stays as it is: {REPLACED_FORWARD}")
    if problems:
        raise _misfit(checkpoint, problems, architecture)
    expected = _require_described(checkpoint)
    for name, module in modules.items():
        weight = expected.get(f"{name}.layer.weight" if name else "layer.weight")
        own = getattr(module, "weight", None)
        if weight is not None and isinstance(own, Tensor) and list(own.shape) != weight[1]:
            problems.append(f"wrong shape: the weight of {name!r}, found {weight[1]}, expected {list(own.shape)}")
    if problems:
        raise _misfit(checkpoint, problems, architecture)
    restored = _restore(checkpoint, architecture)
    for name, module in modules.items():
        place = next(module.parameters(recurse=False), None)
        if name in header.layers and place is not None and not place.is_meta:
            restored.get_submodule(name).to(place.device)
    return restored.train(architecture.training)


def _restore(checkpoint: Checkpoint, architecture: nn.Module | None) -> nn.Module:
    assert checkpoint.header is not None
    assert checkpoint.header.static is not None
    # What is described is allocated: it must not be larger than what the file holds.
    _require_described(checkpoint)
    try:
        return restore_static(dict(checkpoint.header.static.model), architecture)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error.message}", error.suggestion) from error
    except MonoQuantError as error:
        raise _misfit(checkpoint, [error.message], architecture) from error
    except RecursionError as error:
        raise CheckpointError(f"{checkpoint.path}: the description of the static model is damaged") from error


def _require_described(checkpoint: Checkpoint) -> dict[str, tuple[str, list[int]]]:
    """Answer dtype and shape of each tensor of the static layers by name, if the file holds them so.

    Raises:
        CheckpointError: A tensor is missing, or has another dtype or shape.
    """
    assert checkpoint.header is not None
    assert checkpoint.header.static is not None
    try:
        expected = described_tensors(checkpoint.header.static.model)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error.message}") from error
    names = set(checkpoint.names)
    problems = []
    for name, (dtype, shape) in expected.items():
        if name not in names:
            problems.append(f"missing: {name!r}, expected {dtype} {shape}")
            continue
        found_shape, found = checkpoint.describe(name)
        if (str(found).removeprefix("torch."), list(found_shape)) != (dtype, shape):
            found_dtype = str(found).removeprefix("torch.")
            problems.append(f"{name!r} is {found_dtype} {list(found_shape)}, expected {dtype} {shape}")
    if problems:
        raise _misfit(checkpoint, problems)
    return expected


def _require_same_model(checkpoint: Checkpoint, graph: StaticGraph, architecture: nn.Module) -> None:
    """Refuse an architecture that the graph cannot have been made from."""
    parameters = inspect.signature(architecture.forward).parameters
    problems = [f"its forward takes no {name!r}" for name in graph.input_names if name not in parameters]
    modules: Mapping[str, nn.Module] = dict(architecture.named_modules())
    weights = static_weights(graph)
    # Functions that are called without a layer of their own have names without dots.
    missing = [weight.name for weight in weights if "." in weight.name and weight.name not in modules]
    problems += [f"it has no layer {name!r}" for name in missing]
    if not any(weight.name in modules for weight in weights):
        problems.append("it has none of the graph's layers")
    for weight in weights:
        module = modules.get(weight.name)
        if isinstance(module, _WEIGHT_LAYERS) and module.weight.shape != weight.weight.shape:
            expected, found = list(module.weight.shape), list(weight.weight.shape)
            problems.append(f"wrong shape: the weight of {weight.name!r}, found {found}, expected {expected}")
    if problems:
        raise _misfit(checkpoint, problems, architecture)


def _misfit(checkpoint: Checkpoint, problems: list[str], architecture: nn.Module | None = None) -> CheckpointError:
    listed = "\n".join(f"  {problem}" for problem in problems)
    if architecture is None:
        return CheckpointError(
            f"{checkpoint.path} does not hold what its header describes:\n{listed}",
            suggestion="Copy or download it again, or save the model again.",
        )
    static = None if checkpoint.header is None else checkpoint.header.static
    alone = "; a static graph can also be loaded without one" if static is not None and static.is_graph else ""
    return CheckpointError(
        f"{checkpoint.path} does not fit the architecture ({type(architecture).__name__}):\n{listed}",
        suggestion=f"Pass the float model that was quantized{alone}.",
    )
