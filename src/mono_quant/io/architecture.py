"""What an architecture expects of a checkpoint: quantized layers without weights, and a tensor for every name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.core.layer_scheme import INT8_STATIC, WEIGHT_ONLY
from mono_quant.io.contents import float_type_name
from mono_quant.io.header import CheckpointHeader, LayerRecord
from mono_quant.modules import (
    REPLACED_FORWARD,
    QuantizedModule,
    WeightOnlyLinear,
    counterpart_for_scheme,
    has_own_forward,
)


@dataclass(frozen=True)
class Expected:
    """A tensor that the architecture has a place for.

    Attributes:
        tensor: The architecture's own, or that of an empty quantized layer; ``None`` for state that is no tensor.
        device: Where the loaded one goes by default.
        exact_dtype: Whether the dtype is a matter of format (codes and scales) and not of precision.
        in_place: Whether it is a parameter or buffer; anything else is handed to ``load_state_dict``.
    """

    tensor: Tensor | None
    device: torch.device
    exact_dtype: bool
    in_place: bool


@dataclass
class Blueprint:
    """An architecture with its quantized layers chosen.

    Attributes:
        expected: By name, the names of shared modules and tied tensors included.
        layers: By ``id`` of the float layer, the quantized one that takes its place; its buffers have no values.
        problems: Quantized layers of the file that the architecture cannot hold, one sentence each.
        refused: The names of those layers.
    """

    expected: dict[str, Expected] = field(default_factory=dict)
    layers: dict[int, QuantizedModule] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def plan(architecture: nn.Module, header: CheckpointHeader | None) -> Blueprint:
    """Answer where the tensors of a checkpoint belong in ``architecture``, which is not modified."""
    blueprint = Blueprint()
    modules = dict(architecture.named_modules(remove_duplicate=False))
    # Static layers stand in the architecture already, see mono_quant.io.static_model.
    given = {} if header is None else header.layers
    records = {name: record for name, record in given.items() if record.scheme.kind != INT8_STATIC}
    for name, record in records.items():
        problem = _place(blueprint, modules, name, record)
        if problem is not None:
            blueprint.problems.append(f"layer {name!r}: {problem}")
            blueprint.refused.append(name)
    _require_same_sharing(blueprint, modules, records)
    in_place = {id(tensor) for module in modules.values() for tensor in _own_tensors(module)}
    quantized = {name for name, module in modules.items() if id(module) in blueprint.layers}
    for name, tensor in architecture.state_dict(keep_vars=True).items():
        if not _is_inside(name, quantized) and not _is_inside(name, set(blueprint.refused)):
            blueprint.expected[name] = _expected(tensor, id(tensor) in in_place)
    for name in sorted(quantized):
        layer = blueprint.layers[id(modules[name])]
        device = _device(modules[name])
        for local, buffer in layer._buffers.items():
            assert buffer is not None
            full_name = f"{name}.{local}" if name else local
            blueprint.expected[full_name] = Expected(buffer, device, local != "bias", True)
    return blueprint


def _place(blueprint: Blueprint, modules: Mapping[str, nn.Module], name: str, record: LayerRecord) -> str | None:
    """Put an empty quantized layer at ``name``, or answer why there can be none."""
    found = f"the file holds a quantized {record.float_type or 'layer'} ({record.scheme})"
    module = modules.get(name)
    if module is None:
        return f"{found}, the architecture has no such module"
    if has_own_forward(module):
        return f"{found}, the architecture has a {type(module).__name__} that stays as it is: {REPLACED_FORWARD}"
    # A float16 weight needs nothing of its layer's type but a place; still, only a counterpart can compute with it.
    quantized_type = _quantized_type(module, record)
    if quantized_type is None:
        return f"{found}, the architecture has a {type(module).__name__}"
    if record.float_type is not None and float_type_name(quantized_type) != record.float_type:
        return f"{found}, the architecture has a {type(module).__name__}"
    if is_lazy(getattr(module, "weight", None)):  # type: ignore[arg-type]
        return "its weight in the architecture is not initialised yet: run the model once"
    present = blueprint.layers.get(id(module))
    if present is not None:
        same = present.scheme == record.scheme
        return None if same else f"{found}, under another name of the same module it is {present.scheme}"
    layer = quantized_type.like(module, record.scheme)
    layer.train(module.training)
    if record.float_dtype is not None:
        layer.float_dtype = record.float_dtype
    for attribute, hooks in module.__dict__.items():
        # What a user hung on a layer keeps working on the one that takes its place.
        if attribute.startswith("_forward_") and "hooks" in attribute and hooks:
            getattr(layer, attribute).update(hooks)
    blueprint.layers[id(module)] = layer
    return None


def _quantized_type(module: nn.Module, record: LayerRecord) -> type[QuantizedModule] | None:
    if not isinstance(module, QuantizedModule):
        return counterpart_for_scheme(module, record.scheme)
    # A quantized model also tells its architecture, as far as its layers are of the right kind.
    is_packed = isinstance(module, WeightOnlyLinear)
    return type(module) if is_packed == (record.scheme.kind == WEIGHT_ONLY) else None


def _require_same_sharing(
    blueprint: Blueprint, modules: Mapping[str, nn.Module], records: Mapping[str, LayerRecord]
) -> None:
    for name, module in modules.items():
        if id(module) in blueprint.layers and name not in records:
            blueprint.problems.append(
                f"layer {name!r}: in float in the file, and the architecture shares it with a layer that is quantized"
            )


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module._parameters, module._buffers):
        yield from (tensor for tensor in tensors.values() if tensor is not None)


def _is_inside(name: str, layers: set[str]) -> bool:
    if "" in layers:
        return True
    layer = name.rpartition(".")[0]
    while layer:
        if layer in layers:
            return True
        layer = layer.rpartition(".")[0]
    return False


def _expected(value: Any, in_place: bool) -> Expected:
    if not isinstance(value, Tensor):
        return Expected(None, torch.device("cpu"), False, False)
    return Expected(value, _loading_device(value.device), not value.is_floating_point(), in_place)


def _device(module: nn.Module) -> torch.device:
    for tensor in _own_tensors(module):
        return _loading_device(tensor.device)
    return torch.device("cpu")


def _loading_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device
