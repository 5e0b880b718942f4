"""The quantized weights of a model or state dict, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mono_quant.core import LayerScheme, QuantizedTensor, unpack_int32
from mono_quant.core.layer_scheme import FLOAT16, INT8_DYNAMIC, INT8_STATIC, WEIGHT_ONLY
from mono_quant.errors import InputError
from mono_quant.graph import StaticGraph, static_weights
from mono_quant.integrations.conv1d import CONV1D, QuantizedConv1D
from mono_quant.io.header import LayerRecord
from mono_quant.modules import QuantizedModule, counterpart
from mono_quant.modules.base import storage_dtype
from mono_quant.report.metrics import memory_key, weight_memory

Model = nn.Module | Mapping[str, Tensor]
#: What a checkpoint's header says of each quantized layer.
Records = Mapping[str, LayerRecord]


@dataclass(frozen=True)
class StoredWeight:
    """The weight of one quantized layer.

    Attributes:
        layer: The layer's name; empty where the model is the layer.
        weight: Codes with their scales, output channels first, or the float16 weight.
        scheme: How it is quantized, as the model or header says or as its tensors show.
        float_type: The float layer that it stands for, if a header says so.
        memory: Equal for layers that share one weight.
    """

    layer: str
    weight: QuantizedTensor | Tensor
    scheme: LayerScheme
    memory: tuple[object, ...]
    float_type: str | None = None


def quantized_layers(model: Model, records: Records | None = None) -> list[str]:
    """Answer the names of the quantized layers of a model or state dict, in its order.

    Args:
        model: A state dict shows its int8 and packed weights by the scales beside them.
        records: What a checkpoint's header says of each layer; it also names float16 weights, which look like others.
    """
    if isinstance(model, nn.Module):
        static = static_weights(model)
        known = {id(weight.module) for weight in static}
        dynamic = [
            name
            for name, module in model.named_modules()
            if isinstance(module, QuantizedModule) and id(module) not in known
        ]
        return [*dict.fromkeys(weight.name for weight in static), *dynamic]
    found = dict.fromkeys(records or ())
    of_static = {_static_prefix(name) for name, record in (records or {}).items() if record.scheme.kind == INT8_STATIC}
    for name in model:
        prefix, _, local = name.rpartition(".")
        if local == "weight_scale" and f"{prefix}." not in of_static:
            found[prefix] = None
    return list(found)


def _static_prefix(layer: str) -> str:
    """Answer what the names of a static layer's tensors begin with in a state dict."""
    return f"{layer}.layer." if layer else "layer."


def stored_weight(model: Model, layer: str, records: Records | None = None) -> StoredWeight:
    """Answer the weight of one quantized layer.

    Args:
        model: A quantized module or state dict.
        layer: A name out of :func:`quantized_layers`.
        records: For a state dict, what its header says; without it the tensors' dtypes and shapes tell.

    Raises:
        InputError: The layer's tensors are incomplete or do not fit together.
    """
    if isinstance(model, nn.Module):
        for static in static_weights(model):
            if static.name == layer:
                return StoredWeight(layer, static.weight, static.scheme, (id(static.module),))
        module = model.get_submodule(layer)
        assert isinstance(module, QuantizedModule)
        return StoredWeight(layer, module._quantized_weight, module.scheme, weight_memory(module))
    names = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    record = (records or {}).get(layer)
    prefix = f"{layer}." if layer else ""
    if record is not None and record.scheme.kind == INT8_STATIC:
        prefix = _static_prefix(layer)
    tensors = {name: model[prefix + name] for name in names if prefix + name in model}
    scheme = _scheme_of(layer, tensors) if record is None else record.scheme
    float_type = None if record is None else record.float_type
    codes_name = "weight_packed" if scheme.kind == WEIGHT_ONLY else "weight"
    expected = {"weight_packed": torch.int32, "weight_scale": torch.float32, "weight_zero_point": torch.int8}
    expected["weight"] = storage_dtype(scheme)
    required = [codes_name] if scheme.stores_floats else [codes_name, "weight_scale"]
    if not scheme.stores_floats and not scheme.symmetric:
        required.append("weight_zero_point")
    if scheme.kind == WEIGHT_ONLY:
        required.append("weight_shape")
    for name in required:
        if name not in tensors:
            raise InputError(f"layer {layer!r} is quantized ({scheme}) but has no tensor {prefix}{name}")
        if name in expected and tensors[name].dtype != expected[name]:
            raise InputError(f"{prefix}{name} holds {tensors[name].dtype}, expected {expected[name]}")
    codes = tensors[codes_name]
    if scheme.stores_floats:
        return StoredWeight(layer, codes, scheme, memory_key(codes), float_type)
    zero_point = None if scheme.symmetric else tensors["weight_zero_point"]
    weight = _assemble(layer, codes, tensors["weight_scale"], zero_point, tensors.get("weight_shape"), scheme)
    return StoredWeight(layer, weight, scheme, memory_key(codes), float_type)


def _assemble(
    layer: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, shape: Tensor | None, scheme: LayerScheme
) -> QuantizedTensor:
    if zero_point is not None and zero_point.shape != scale.shape:
        raise InputError(
            f"layer {layer!r} has zero points of shape {tuple(zero_point.shape)} beside scales of shape "
            f"{tuple(scale.shape)}; they must agree"
        )
    if shape is None:
        if scale.numel() != codes.shape[0]:
            raise InputError(f"layer {layer!r} has {codes.shape[0]} output channels but {scale.numel()} scales")
        flat_zero_point = None if zero_point is None else zero_point.reshape(-1)
        return QuantizedTensor(codes, scale.reshape(-1), flat_zero_point, axis=0)
    out_features, in_features = (int(size) for size in shape.tolist())
    group_size = scheme.group_size or max(1, in_features)
    groups = in_features // group_size
    if codes.shape[0] != out_features or tuple(scale.shape) != (out_features, groups) or in_features % group_size:
        raise InputError(
            f"layer {layer!r} is said to be {out_features} x {in_features} in groups of {group_size}, which does not "
            f"fit packed words of shape {tuple(codes.shape)} and scales of shape {tuple(scale.shape)}"
        )
    unpacked = unpack_int32(codes, scheme.bits, in_features)
    return QuantizedTensor(unpacked, scale, zero_point, 0, group_size, scheme.bits)


def _scheme_of(layer: str, tensors: Mapping[str, Tensor]) -> LayerScheme:
    symmetric = "weight_zero_point" not in tensors
    packed, shape, scale = (tensors.get(name) for name in ("weight_packed", "weight_shape", "weight_scale"))
    if packed is None:
        return LayerScheme(INT8_DYNAMIC if scale is not None else FLOAT16, 16 if scale is None else 8, symmetric)
    if shape is None or scale is None or shape.numel() != 2 or scale.dim() != 2:
        raise InputError(f"layer {layer!r} has packed words without a usable weight_shape and weight_scale")
    in_features = int(shape[1])
    # Up to four inputs fill one word in either width; nobody packs those without a header.
    bits = 4 if packed.shape[-1] == -(-in_features // 8) else 8
    groups = scale.shape[1]
    return LayerScheme(WEIGHT_ONLY, bits, symmetric, in_features // groups if groups > 1 else None)


def float_weight(original: Model, quantized: Model, stored: StoredWeight) -> Tensor:
    """Answer the weight that a quantized layer was made from, in the layout that it is stored in.

    Raises:
        InputError: ``original`` has no such layer, or one of another shape.
    """
    layer = stored.layer
    if isinstance(original, nn.Module):
        try:
            module = original.get_submodule(layer)
        except AttributeError:
            raise InputError(f"the original has no layer {layer!r}") from None
    else:
        name = f"{layer}.weight" if layer else "weight"
        if name not in original:
            raise InputError(f"the original has no tensor {name!r}")
        module = nn.Module()
        module.register_buffer("weight", original[name])
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise InputError(f"layer {layer!r} of the original ({type(module).__name__}) has no weight")
    weight = _in_stored_layout(module, quantized, stored)
    shape = stored.weight.shape
    if weight.shape != shape and weight.numel() == shape.numel() and weight.flatten(1).shape == shape:
        weight = weight.flatten(1)
    if weight.shape != shape:
        raise InputError(
            f"layer {layer!r} has a weight of shape {tuple(shape)}, the original's is {tuple(weight.shape)}"
        )
    return weight


def _in_stored_layout(module: nn.Module, quantized: Model, stored: StoredWeight) -> Tensor:
    quantized_type: type[QuantizedModule] | None
    if isinstance(quantized, nn.Module):
        found = quantized.get_submodule(stored.layer)
        quantized_type = type(found) if isinstance(found, QuantizedModule) else None
    else:
        quantized_type = QuantizedConv1D if stored.float_type == CONV1D else counterpart(module)
    weight: Tensor = QuantizedModule.stored_weight(module)
    return weight if quantized_type is None else quantized_type.stored_weight(module)


def is_comparable(quantized: Model) -> bool:
    """Say whether the weights of a quantized model can be compared with the original's.

    In a static graph norms have been folded into them and channels balanced.
    """
    return not isinstance(quantized, nn.Module) or not any(isinstance(m, StaticGraph) for m in quantized.modules())


def weight_faults(stored: StoredWeight) -> list[str]:
    """Answer what is wrong with the numbers of a quantized weight, one sentence each; nothing if all is well.

    Scales must be positive, finite and such that every value is finite; codes must lie in the range of their scheme.
    """
    name = f"layer {stored.layer!r}"
    weight = stored.weight
    if isinstance(weight, Tensor):
        bad = int((~weight.isfinite()).sum())
        return [f"{name} holds {bad} NaN or infinite values"] if bad else []
    faults = []
    largest = torch.finfo(torch.float32).max / (1 << weight.bits)
    bad = int((~((weight.scale > 0) & (weight.scale <= largest))).sum())
    if bad:
        faults.append(f"{name} has {bad} scales that are not positive and finite")
    low, high = -(1 << (weight.bits - 1)), (1 << (weight.bits - 1)) - 1
    if weight.zero_point is not None and weight.zero_point.numel():
        faults += _outside(f"{name}: zero points", weight.zero_point, low, high)
    elif weight.zero_point is None:
        low = -high
    if weight.codes.numel():
        faults += _outside(f"{name}: codes", weight.codes, low, high)
    return faults


def _outside(what: str, tensor: Tensor, low: int, high: int) -> list[str]:
    least, most = (int(value) for value in torch.aminmax(tensor))
    if low <= least and most <= high:
        return []
    return [f"{what} reach from {least} to {most}, outside [{low}, {high}]"]


__all__ = [
    "Model",
    "Records",
    "StoredWeight",
    "float_weight",
    "is_comparable",
    "quantized_layers",
    "stored_weight",
    "weight_faults",
]
