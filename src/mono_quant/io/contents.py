"""What of a model goes into a checkpoint: its tensors, each once, and what the header says of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.core.layer_scheme import INT8_STATIC
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import CheckpointError, ConfigurationError, InputError, InputTypeError
from mono_quant.integrations import QuantizedConv1D
from mono_quant.integrations.conv1d import CONV1D
from mono_quant.io.header import MEASUREMENTS, CheckpointHeader, LayerRecord
from mono_quant.io.static_model import static_records
from mono_quant.io.static_record import StaticRecord
from mono_quant.modules import QuantizedModule, fused_pairs, standard_modules

Model = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """Tensors by name, each stored once; further names of them; and the header."""

    tensors: dict[str, Tensor]
    header: CheckpointHeader
    metadata: dict[str, str] = field(default_factory=dict)


def gather(
    model: Model, info: QuantizationInfo | None = None, measurements: Mapping[str, float | None] | None = None
) -> Contents:
    """Answer what a checkpoint of ``model`` holds. Buffers that are not persistent are left out.

    Args:
        model: A module, of which a compiled one stands for what it wraps, or a state dict.
        info: What its quantization did: the reasons for skipped layers, measurements, and for a state dict the
            schemes, which it does not hold itself.
        measurements: Measurements that replace those of ``info``.

    Raises:
        InputError: A state dict holds quantized layers and ``info`` is missing or does not fit.
        InputTypeError: ``model`` is neither, or the state dict holds something that is not a tensor.
        CheckpointError: A tensor has no values, or is of a kind that files cannot hold.
    """
    model = uncompiled(model)
    static: StaticRecord | None = None
    if isinstance(model, nn.Module):
        state: Mapping[str, Any] = model.state_dict(keep_vars=True)
        layers, static = static_records(model, info)
        if static is None or not static.is_graph:
            layers = layers | _records_of_module(model)
        fused = fused_pairs(model)
    elif isinstance(model, Mapping):
        state = model
        layers, fused = _records_of_state(model, info), {}
    else:
        raise InputTypeError(f"cannot save a {type(model).__name__}; expected a torch.nn.Module or a state dict")
    tensors, tied = _without_aliases(state)
    skipped = {} if info is None else {name: info.skip_reasons.get(name, "") for name in info.skipped_layers}
    return Contents(tensors, CheckpointHeader(layers, skipped, tied, fused, _measurements(info, measurements), static))


@overload
def uncompiled(model: nn.Module) -> nn.Module: ...
@overload
def uncompiled(model: Model) -> Model: ...
def uncompiled(model: Model) -> Model:
    """Answer the module inside a compiled one, whose tensors have the same names without a prefix."""
    inside = getattr(model, "_orig_mod", None)
    return inside if isinstance(model, nn.Module) and isinstance(inside, nn.Module) else model


def float_type_name(quantized_type: type[QuantizedModule]) -> str:
    """Answer the name that a checkpoint gives to the float layer that a quantized one stands for."""
    if issubclass(quantized_type, QuantizedConv1D):
        return CONV1D
    float_type = quantized_type.float_type
    name: str = float_type.__name__
    return name if getattr(nn, name, None) is float_type else f"{float_type.__module__}.{float_type.__qualname__}"


def with_standard_layers(model: nn.Module) -> nn.Module:
    """Answer a model that shares every float tensor with ``model`` and has standard layers for its quantized ones.

    Raises:
        InputError: The model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo.update({id(tensor): tensor for tensor in module._parameters.values() if tensor is not None})
        memo.update({id(tensor): tensor for tensor in module._buffers.values() if tensor is not None})
    memo.update(standard_modules(model))
    return copy_structure(model, memo)


def copy_structure(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Answer a deep copy of ``model`` in which the objects of ``memo`` (by ``id``) have taken the others' places.

    Raises:
        InputError: The model holds something that cannot be copied.
    """
    try:
        # What is looked up by id must live as long as the copying; the model keeps it alive.
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"the model ({type(model).__name__}) cannot be copied: {error}") from error


def _records_of_module(model: nn.Module) -> dict[str, LayerRecord]:
    # With all names of a module that is reached twice, so that an architecture may also hold two.
    return {
        name: LayerRecord(module.scheme, float_type_name(type(module)), module.float_dtype)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedModule)
    }


def _records_of_state(state: Mapping[str, Any], info: QuantizationInfo | None) -> dict[str, LayerRecord]:
    records = {} if info is None else {name: LayerRecord(layer.scheme) for name, layer in info.layers.items()}
    for name, record in records.items():
        if record.scheme.kind == INT8_STATIC:
            raise InputError(
                f"quantization_info names the static layer {name!r}, and a state dict does not say how static layers "
                "are put together",
                suggestion="Save the module instead of its state dict.",
            )
        weights = [_join(name, "weight"), _join(name, "weight_packed")]
        if not any(weight in state for weight in weights):
            raise InputError(
                f"quantization_info names the layer {name!r}, and the state dict holds neither "
                f"{weights[0]!r} nor {weights[1]!r}",
                suggestion="Pass the quantization_info of this state dict.",
            )
        if not record.scheme.stores_floats and _join(name, "weight_scale") not in state:
            raise InputError(f"the state dict lacks {_join(name, 'weight_scale')!r} of the quantized layer {name!r}")
    for key, tensor in state.items():
        layer, _, local = key.rpartition(".")
        if local != "weight_scale" or layer in records:
            continue
        codes = state.get(_join(layer, "weight"), state.get(_join(layer, "weight_packed")))
        if isinstance(codes, Tensor) and codes.dtype in (torch.int8, torch.int32) and isinstance(tensor, Tensor):
            raise InputError(
                f"the state dict holds the quantized layer {layer!r} and does not say how it is quantized",
                suggestion="Save the module, or pass quantization_info=result.info.",
            )
    return records


def _join(layer: str, local: str) -> str:
    return f"{layer}.{local}" if layer else local


def _without_aliases(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Answer the tensors that differ, and the other names of each."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        _require_storable(name, tensor)
        stored = first.setdefault(_identity(tensor), name)
        if stored == name:
            tensors[name] = tensor
        else:
            tied[name] = stored
    return tensors, tied


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Answer a value that two tensors share if they are the same elements; overlapping views differ."""
    if not tensor.numel():
        return (id(tensor),)
    storage = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*storage, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _require_storable(name: object, tensor: object) -> None:
    """Refuse what a file of plain tensors cannot hold.

    Raises:
        InputTypeError: It is no tensor by a name.
        CheckpointError: It has no values, or a layout of its own.
    """
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise InputTypeError(
            f"the state dict holds a {type(tensor).__name__} at {name!r}; checkpoints hold tensors by name",
            suggestion="Leave it out, or turn it into a tensor.",
        )
    reason = None
    if is_lazy(tensor):
        reason, remedy = "is not initialised yet", "Run the model once."
    elif tensor.is_meta:
        reason, remedy = "is on the meta device and has no values", "Load the weights first."
    elif tensor.layout != torch.strided:
        reason, remedy = f"has the layout {tensor.layout}", "Convert it with to_dense()."
    elif tensor.is_quantized:
        reason, remedy = f"has PyTorch's quantized dtype {tensor.dtype}", "Dequantize it and use mono_quant.quantize."
    if reason is not None:
        raise CheckpointError(f"tensor {name!r} cannot be saved: it {reason}", suggestion=remedy)


def _measurements(info: QuantizationInfo | None, given: Mapping[str, float | None] | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in MEASUREMENTS:
        value = (given or {}).get(name)
        if value is None and info is not None:
            value = getattr(info, name)
        # Weights without any error have no finite ratio, and JSON no infinity.
        if value is not None and math.isfinite(value):
            found[name] = float(value)
    return found


def require_module_to_convert(model: Model) -> nn.Module:
    """Answer ``model`` if it is a module.

    Raises:
        ConfigurationError: It is a state dict, whose layers are not known.
    """
    if isinstance(model, nn.Module):
        return model
    raise ConfigurationError(
        "convert_to_native=True applies to modules, found a state dict",
        suggestion="Save dequantize_model(state_dict) instead.",
    )
