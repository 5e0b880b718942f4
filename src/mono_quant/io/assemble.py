"""Builds a model from an architecture and the tensors of a checkpoint."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.errors import CheckpointError, InputError
from mono_quant.io.architecture import Blueprint, Expected, plan
from mono_quant.io.checkpoint import Checkpoint
from mono_quant.io.contents import copy_structure
from mono_quant.modules import (
    disable_fused_path,
    fuse_layers,
    fuse_saved_pair,
    mark_layers_that_share,
    restore_activations,
    restore_layers,
)


@dataclass(frozen=True)
class Tolerance:
    """What may differ between a checkpoint and the architecture.

    Attributes:
        names: Whether tensors may be missing (the architecture's stay) or left over.
        float_dtypes: Whether floating-point tensors may have any dtype; otherwise only the architecture's, and in
            quantized models that in which they compute.
    """

    names: bool = False
    float_dtypes: bool = False


def assemble(
    checkpoint: Checkpoint, architecture: nn.Module, tolerance: Tolerance, device: torch.device | None = None
) -> nn.Module:
    """Answer a model of the given architecture with the tensors of a checkpoint; both stay as they are.

    The architecture's own values of what the checkpoint holds are never copied. Modules that it reaches twice stay
    shared, and tensors that were tied when they were saved are tied again.

    Raises:
        CheckpointError: The two do not fit; every tensor and layer that does not is named.
        InputError: The architecture cannot be copied.
    """
    blueprint = plan(architecture, checkpoint.header)
    given = checkpoint.names
    problems = [*blueprint.problems, *_misfits(checkpoint, blueprint, tolerance)]
    missing = _missing(blueprint, set(given))
    unexpected = [name for name in given if name not in blueprint.expected and not _is_refused(name, blueprint)]
    # Nothing can stand in for what has no values.
    lost = [name for name in missing if not tolerance.names or _has_no_values(blueprint.expected[name])]
    problems += [f"missing: {name!r}, {_describe_expected(blueprint.expected[name])}" for name in lost]
    if not tolerance.names:
        problems += [f"unexpected: {name!r}, {_describe(*checkpoint.describe(name))}" for name in unexpected]
    if problems:
        raise _does_not_fit(checkpoint, architecture, problems)
    if missing or unexpected:
        listed = [f"missing: {name!r}" for name in missing] + [f"unexpected: {name!r}" for name in unexpected]
        warnings.warn(f"{checkpoint.path}: tolerated {', '.join(listed)}", stacklevel=3)
    loaded, rest = _load(checkpoint, architecture, blueprint, device)
    return _build(checkpoint, architecture, blueprint, loaded, rest, device)


def _does_not_fit(checkpoint: Checkpoint, architecture: nn.Module, problems: list[str]) -> CheckpointError:
    listed = "\n".join(f"  {problem}" for problem in problems)
    return CheckpointError(
        f"{checkpoint.path} does not fit the architecture ({type(architecture).__name__}):\n{listed}",
        suggestion="Build the architecture with the options of the saved model.",
    )


def _missing(blueprint: Blueprint, given: set[str]) -> list[str]:
    """Answer the names without a tensor, except those that the architecture ties to one that has."""
    present = {id(expected.tensor) for name, expected in blueprint.expected.items() if name in given}
    return [
        name
        for name, expected in blueprint.expected.items()
        if name not in given and (expected.tensor is None or id(expected.tensor) not in present)
    ]


def _misfits(checkpoint: Checkpoint, blueprint: Blueprint, tolerance: Tolerance) -> list[str]:
    """Say which tensors have the wrong shape or dtype."""
    layers = {} if checkpoint.header is None else checkpoint.header.layers
    computing = {record.float_dtype for record in layers.values()}
    problems = []
    for name in checkpoint.names:
        expected = blueprint.expected.get(name)
        if expected is None or expected.tensor is None:
            continue
        if is_lazy(expected.tensor):
            problems.append(f"not initialised: {name!r} of the architecture; run it once")
            continue
        shape, dtype = checkpoint.describe(name)
        wanted, wanted_shape = expected.tensor.dtype, list(expected.tensor.shape)
        if list(shape) != wanted_shape:
            problems.append(f"wrong shape: {name!r}, found {list(shape)}, expected {wanted_shape}")
        may_differ = not expected.exact_dtype and dtype.is_floating_point
        if dtype != wanted and not (may_differ and (tolerance.float_dtypes or dtype in computing)):
            problems.append(f"wrong dtype: {name!r}, found {_name(dtype)}, expected {_name(wanted)}")
    return problems


def _load(
    checkpoint: Checkpoint, architecture: nn.Module, blueprint: Blueprint, device: torch.device | None
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Answer the loaded tensors by ``id`` of those that they replace, and by name those that are set otherwise.

    Raises:
        CheckpointError: The architecture ties what differs in the file, or a stored shape is not the layer's.
    """
    given = set(checkpoint.names)
    layers = {} if checkpoint.header is None else checkpoint.header.layers
    shapes = {f"{layer}.weight_shape" if layer else "weight_shape" for layer in layers}
    parameters = {id(parameter) for parameter in architecture.parameters()}
    loaded: dict[int, Tensor] = {}
    rest: dict[str, Tensor] = {}
    by_stored_name: dict[tuple[str, bool], Tensor] = {}
    source: dict[int, str] = {}
    problems = []
    for name, expected in blueprint.expected.items():
        if name not in given:
            continue
        stored = checkpoint.stored_name(name)
        if not expected.in_place or expected.tensor is None:
            rest[name] = checkpoint.read(name).clone()
            continue
        key = id(expected.tensor)
        if key in loaded:
            if source[key] != stored and not torch.equal(checkpoint.read(name), checkpoint.read(source[key])):
                problems.append(f"different values: {name!r} and {source[key]!r}, which the architecture ties")
            continue
        is_parameter = key in parameters
        tensor = by_stored_name.get((stored, is_parameter))
        if tensor is None:
            tensor = _read(checkpoint, name, expected, device or expected.device)
            if is_parameter:
                tensor = nn.Parameter(tensor, expected.tensor.requires_grad and tensor.is_floating_point())
            by_stored_name[stored, is_parameter] = tensor
        if name in shapes and tensor.tolist() != expected.tensor.tolist():
            problems.append(f"wrong shape: {name!r} says {tensor.tolist()}, expected {expected.tensor.tolist()}")
        loaded[key], source[key] = tensor, stored
    if problems:
        raise _does_not_fit(checkpoint, architecture, problems)
    return loaded, rest


def _read(checkpoint: Checkpoint, name: str, expected: Expected, device: torch.device) -> Tensor:
    """Answer a tensor in memory of its own, so that the file may change or vanish, laid out as the architecture's."""
    assert expected.tensor is not None
    tensor = checkpoint.read(name)
    own = torch.empty_like(expected.tensor, dtype=tensor.dtype, device=device, requires_grad=False)
    return own.copy_(tensor)


def _build(
    checkpoint: Checkpoint, architecture: nn.Module, blueprint: Blueprint, loaded: dict[int, Tensor],
    rest: dict[str, Tensor], device: torch.device | None,
) -> nn.Module:  # fmt: skip
    for layer in blueprint.layers.values():
        for local, buffer in list(layer._buffers.items()):
            layer.set_tensor(local, loaded.get(id(buffer), buffer))
    memo: dict[int, Any] = {**loaded, **blueprint.layers}
    model = copy_structure(architecture, memo)
    if rest:
        try:
            model.load_state_dict(rest, strict=False)
        except Exception as error:
            raise CheckpointError(f"{checkpoint.path}: the model refuses its state ({error})") from error
    empty = [
        name
        for group in (model.named_parameters(), model.named_buffers())
        for name, tensor in group
        if tensor.is_meta
    ]  # fmt: skip
    if empty:
        raise CheckpointError(
            f"{checkpoint.path} does not hold {', '.join(map(repr, empty))}, and the architecture is on the meta "
            "device, without values for them",
            suggestion="Build the architecture on the CPU.",
        )
    mark_layers_that_share(model)
    restore_layers(model)
    if checkpoint.header is not None:
        _fuse(checkpoint, model)
    fuse_layers(model)
    disable_fused_path(model)
    return model if device is None else model.to(device)


def _fuse(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Let linear layers compute the activations that they computed when the model was saved, and no others.

    Raises:
        CheckpointError: The architecture has no such activation.
    """
    assert checkpoint.header is not None
    restore_activations(model)
    for activation, linear in checkpoint.header.fused.items():
        try:
            fuse_saved_pair(model, linear, activation)
        except InputError as error:
            raise CheckpointError(
                f"{checkpoint.path}: layer {linear!r} computes the activation {activation!r}, which the architecture "
                f"does not have so: {error.message}",
                suggestion="Build the architecture with the options of the saved model.",
            ) from error


def _is_refused(name: str, blueprint: Blueprint) -> bool:
    return any(name == layer or name.startswith(f"{layer}." if layer else "") for layer in blueprint.refused)


def _has_no_values(expected: Expected) -> bool:
    return expected.tensor is None or expected.tensor.is_meta


def _describe_expected(expected: Expected) -> str:
    if expected.tensor is None or is_lazy(expected.tensor):
        return "expected"
    return f"expected {_describe(tuple(expected.tensor.shape), expected.tensor.dtype)}"


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{_name(dtype)} {list(shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["Tolerance", "assemble"]
