"""Whether a layer that was read from a checkpoint fits together, so that no kernel reads beyond its tensors."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Final

import torch
from torch import Tensor

from mono_quant.errors import CheckpointError
from mono_quant.graph.arithmetic import LARGEST_CODE, Activation, QParams
from mono_quant.graph.layers.layer import Layer

_ACTIVATIONS: Final = ("none", "relu", "clamp", "hardswish", "silu")
_LEAST: Final = {"stride": 1, "kernel_size": 1, "dilation": 1, "padding": 0}
_FLAGS: Final = ("keepdim", "ceil_mode", "count_include_pad", "overwrite", "bias")
_COUNTS: Final = ("groups", "divisor_override", "in_features", "out_features")
# What a step takes, where that does not depend on its description.
_INPUTS: Final = {
    "add": 2, "multiply": 2, "average_pool": 1, "dequantize": 1, "dynamic_linear": 1, "global_average": 1, "linear": 1,
    "max_pool": 1, "pad": 1, "quantize": 1, "spread": 1, "table": 1,
}  # fmt: skip
_LARGEST_SCALE: Final = torch.finfo(torch.float32).max


def require_sound(name: str, layer: Layer, inputs: int) -> None:
    """Refuse a layer whose description or tensors contradict themselves.

    Args:
        name: For the message.
        layer: As built from a description; its tensors need no values yet.
        inputs: How many values it gets.

    Raises:
        CheckpointError: Says what is wrong.
    """
    fault = _fault_of_spec(layer) or _fault_of_tensors(layer) or _fault_of_inputs(layer, inputs)
    if fault is not None:
        raise CheckpointError(f"the description of a static graph is damaged at step {name!r}: {fault}")


def _fault_of_spec(layer: Layer) -> str | None:
    for field in fields(layer.spec):
        value = getattr(layer.spec, field.name)
        fault = None
        if isinstance(value, QParams):
            fault = _fault_of_scale(value)
        elif isinstance(value, Activation):
            known = value.name in _ACTIVATIONS and all(_is_number(bound) for bound in (value.low, value.high))
            fault = None if known else f"{list(value)} is no activation"
        else:
            fault = _fault_of_value(field.name, value)
        if fault is not None:
            return f"{field.name}: {fault}"
    if layer.kind == "spread" and len(layer.spec.pad) != 2 * len(layer.spec.stride):
        return f"pad has {len(layer.spec.pad)} entries for {len(layer.spec.stride)} dimensions"
    sizes = {len(getattr(layer.spec, name)) for name in _LEAST if hasattr(layer.spec, name)}
    return f"kernel, stride, padding and dilation have {sorted(sizes)} entries" if len(sizes) > 1 else None


def _fault_of_value(name: str, value: Any) -> str | None:
    if name in _LEAST:
        fits = isinstance(value, list) and all(type(size) is int and size >= _LEAST[name] for size in value)
        return None if fits else f"{value!r} is not a list of integers from {_LEAST[name]}"
    if name == "pad":
        fits = isinstance(value, list) and len(value) % 2 == 0 and all(type(size) is int for size in value)
        return None if fits else f"{value!r} is not a list of pairs of integers"
    if name in _FLAGS:
        return None if type(value) is bool else f"{value!r} is neither true nor false"
    if name in _COUNTS:
        least = 0 if name.endswith("features") else 1
        absent = value is None and name == "divisor_override"
        return (
            None if absent or (type(value) is int and value >= least) else f"{value!r} is not an integer from {least}"
        )
    return None


def _fault_of_inputs(layer: Layer, inputs: int) -> str | None:
    expected = _INPUTS.get(layer.kind)
    if layer.kind == "conv":
        expected = 1 if layer.spec.other is None else 2
    if expected is not None:
        return None if inputs == expected else f"it gets {inputs} values, expected {expected}"
    if layer.kind == "call" and _largest_input([layer.spec.args, layer.spec.kwargs]) >= inputs:
        return f"it gets {inputs} values, and its arguments name more"
    return None


def _largest_input(value: Any) -> int:
    """Answer the largest position among the inputs that the arguments of a call name; -1 if there is none."""
    if isinstance(value, dict):
        if value.keys() == {"input"} and type(value["input"]) is int:
            return value["input"]
        value = list(value.values())
    return max(map(_largest_input, value), default=-1) if isinstance(value, list) else -1


def _fault_of_scale(value: QParams) -> str | None:
    if not _is_number(value.scale) or not 0 < value.scale <= _LARGEST_SCALE:
        return f"the scale {value.scale!r} is not a positive number"
    if type(value.zero_point) is not int or not 0 <= value.zero_point <= LARGEST_CODE:
        return f"the zero point {value.zero_point!r} is not a code"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _fault_of_tensors(layer: Layer) -> str | None:
    tensors = layer.state_dict()
    weight = tensors.get("weight")
    if weight is not None:
        channels = weight.shape[0] if weight.dim() else 0
        expected = {"weight": (torch.int8, weight.shape), "weight_scale": (torch.float32, (channels,))}
        if tensors.get("bias") is not None:
            expected["bias"] = (torch.float32, (channels,))
        return _mismatch(tensors, expected) or _fault_of_geometry(layer, weight)
    if "table" in tensors:
        return _mismatch(tensors, {"table": (torch.uint8, (LARGEST_CODE + 1,))})
    return None


def _mismatch(tensors: dict[str, Tensor], expected: dict[str, tuple[torch.dtype, Any]]) -> str | None:
    for name, (dtype, shape) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            return f"it has no {name}"
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            return f"its {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
    return None


def _fault_of_geometry(layer: Layer, weight: Tensor) -> str | None:
    stride = getattr(layer.spec, "stride", None)
    if stride is None:
        return None if weight.dim() == 2 else f"its weight has {weight.dim()} dimensions, expected 2"
    dims, groups = weight.dim() - 2, layer.spec.groups
    sizes = [len(getattr(layer.spec, name)) for name in ("stride", "padding", "dilation")]
    if dims not in (1, 2, 3) or sizes != [dims] * 3:
        return f"its weight has {weight.dim()} dimensions, its stride, padding and dilation {sizes} entries"
    return f"{weight.shape[0]} channels in {groups} groups" if weight.shape[0] % groups else None
