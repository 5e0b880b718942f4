"""Quantizes and dequantizes plain state dicts, where only names and shapes are known of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mono_quant.algorithms import quantize_data_free
from mono_quant.api.algorithm import AlgorithmPlan
from mono_quant.api.bits import STAY_FLOAT
from mono_quant.api.names import matches_name
from mono_quant.api.options import Options
from mono_quant.api.replace import Progress, Replacements
from mono_quant.api.selection import require_name_matches
from mono_quant.core.layer_scheme import FLOAT16, WEIGHT_ONLY, LayerScheme
from mono_quant.core.packing import pack_int32
from mono_quant.core.quantization_info import LayerInfo
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.core.quantizers import dequantize_weight, quantize_weight_groupwise
from mono_quant.errors import ConfigurationError, InputTypeError, MonoQuantError, QuantizationError
from mono_quant.modules.base import error_energy, quantize_by_scheme
from mono_quant.report import decibels, stored_weight

StateDict = dict[str, Tensor]


def quantize_state_dict(
    state: Mapping[str, Tensor],
    options: Options,
    plan: AlgorithmPlan,
    replacements: Replacements,
    progress: Progress | None,
) -> tuple[StateDict, dict[str, str]]:
    """Answer the state dict of the quantized model, and for each weight that stayed in float the reason.

    Every floating-point tensor of two or more dimensions named ``weight`` is taken for a layer's weight with output
    channels first. Tensors that share their memory are quantized once and stay shared.

    Args:
        state: Names and float tensors; not modified.
        options: Names and globs in ``include`` and ``skip`` refer to layers: names without ``.weight``.
        plan: Algorithms that need no data.
        replacements: Receives the record of each layer.
        progress: Called after each layer.

    Raises:
        InputTypeError: A value is not a tensor, or a module type is used to choose layers.
        ConfigurationError: A name matches nothing, or the group size does not divide a weight.
        QuantizationError: A weight is not finite; named.
    """
    layers = {_layer(name): name for name in state if name == "weight" or name.endswith(".weight")}
    _require_choosable(state, options, list(layers))
    reasons: dict[str, str] = {}
    chosen: dict[str, LayerScheme] = {}
    for layer, name in layers.items():
        reason = _reason(layer, state, options)
        if reason is None:
            chosen[name] = _scheme(layer, state[name], options)
        else:
            reasons[layer] = reason
    result: StateDict = {}
    shared: dict[tuple[object, ...], tuple[dict[str, Tensor], LayerInfo]] = {}
    done = 0
    for name, tensor in state.items():
        if name not in chosen:
            result[name] = tensor.detach().clone() if not options.inplace else tensor
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), chosen[name])
        if key not in shared:
            shared[key] = _quantize(_layer(name), tensor, chosen[name], options, plan, replacements)
            stored, info = shared[key]
        else:
            stored, info = shared[key]
            info = replace(info, bytes_after=0)
        prefix = name.removesuffix("weight")
        result.update({prefix + local: value for local, value in stored.items()})
        replacements.layers[_layer(name)] = info
        done += 1
        if progress is not None:
            progress(done, len(chosen), _layer(name))
    return result, reasons


def _layer(name: str) -> str:
    return name.removesuffix("weight").removesuffix(".")


def _require_choosable(state: Mapping[str, Tensor], options: Options, layers: list[str]) -> None:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InputTypeError(
                f"the state dict holds a {type(tensor).__name__} at {name!r}; expected tensors only",
                suggestion="Pass the part of it that maps names to tensors.",
            )
    for selector in (*options.include, *options.skip):
        if not isinstance(selector, str):
            raise InputTypeError(
                f"a state dict knows no module types, so {selector.__name__} cannot choose its layers",
                suggestion="Choose layers by name or glob, or quantize the module.",
            )
    require_name_matches(options, layers)


def _reason(layer: str, state: Mapping[str, Tensor], options: Options) -> str | None:
    prefix = f"{layer}." if layer else ""
    weight = state[f"{prefix}weight"]
    if f"{prefix}weight_scale" in state:
        return "is quantized already"
    if weight.layout != torch.strided:
        return f"its weight has the layout {str(weight.layout).removeprefix('torch.')}"
    if not weight.is_floating_point():
        return f"its weight holds {weight.dtype}, not floating-point numbers"
    if weight.dim() < 2:
        return f"its weight has {weight.dim()} dimension, layers with channels have at least 2"
    for selector in (*options.skip, *options.lenient_skip):
        if isinstance(selector, str) and matches_name(selector, layer):
            return f"skip names {selector!r}"
    include = [s for s in (*options.include, *options.lenient_include) if isinstance(s, str)]
    if include and not any(matches_name(selector, layer) for selector in include):
        return "include does not name it"
    if weight.numel() < options.min_parameters:
        return f"it has {weight.numel()} parameters, fewer than min_parameters={options.min_parameters}"
    rule, bits = options.bits_for(layer)
    return f"bits says 32 for {rule!r}: float" if bits == STAY_FLOAT else None


def _scheme(layer: str, weight: Tensor, options: Options) -> LayerScheme:
    _, bits = options.bits_for(layer)
    try:
        return options.scheme_for(weight.shape, bits, weight_only_possible=weight.dim() == 2 and weight.shape[1] > 4)
    except ConfigurationError as error:
        raise ConfigurationError(f"layer {layer!r}: {error.message}", suggestion=error.suggestion) from None


def _quantize(
    layer: str, weight: Tensor, scheme: LayerScheme, options: Options, plan: AlgorithmPlan, replacements: Replacements
) -> tuple[dict[str, Tensor], LayerInfo]:
    """Answer the stored tensors of one weight under their local names, and its record."""
    quantized: QuantizedTensor | Tensor
    try:
        if plan.steps and scheme.kind != FLOAT16:
            quantized = quantize_data_free(weight.detach(), scheme, plan.options.hqq_norm)
        elif scheme.kind == WEIGHT_ONLY:
            group_size = scheme.group_size or max(1, weight.shape[1])
            quantized = quantize_weight_groupwise(weight, group_size, scheme.symmetric, scheme.bits)
        else:
            quantized = quantize_by_scheme(weight, scheme)
    except MonoQuantError as error:
        raise QuantizationError(f"layer {layer!r}: {error.message}", error.suggestion) from error
    stored = _stored(quantized, scheme, weight.dim())
    sqnr = None
    if options.run_validation:
        signal, noise = error_energy(weight, quantized)
        replacements.signal += signal
        replacements.noise += noise
        sqnr = decibels(signal, noise)
    return stored, LayerInfo(scheme, weight.nbytes, sum(tensor.nbytes for tensor in stored.values()), sqnr)


def _stored(quantized: QuantizedTensor | Tensor, scheme: LayerScheme, dim: int) -> dict[str, Tensor]:
    if isinstance(quantized, Tensor):
        return {"weight": quantized}
    per_channel = (quantized.shape[0], -1) if scheme.kind == WEIGHT_ONLY else (-1, *[1] * (dim - 1))
    scales = {"weight_scale": quantized.scale.reshape(per_channel)}
    if quantized.zero_point is not None:
        scales["weight_zero_point"] = quantized.zero_point.reshape(per_channel)
    if scheme.kind != WEIGHT_ONLY:
        return {"weight": quantized.codes, **scales}
    shape = torch.tensor(quantized.shape)
    return {"weight_packed": pack_int32(quantized.codes, scheme.bits), **scales, "weight_shape": shape}


def dequantize_state_dict(state: Mapping[str, Tensor]) -> StateDict:
    """Answer the float32 state dict that a quantized one stands for, with its names in the same order.

    Raises:
        InputError: The tensors of a quantized layer are incomplete or do not fit together.
    """
    parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    result: StateDict = {}
    finished: set[str] = set()
    for name, tensor in state.items():
        prefix, _, local = name.rpartition(".")
        dotted = f"{prefix}." if prefix else ""
        if f"{dotted}weight_scale" not in state or local not in parts:
            half = tensor.dtype in (torch.float16, torch.bfloat16)
            result[name] = tensor.float() if half else tensor.clone()
            continue
        if prefix not in finished:
            finished.add(prefix)
            result[f"{dotted}weight"] = dequantize_weight(stored_weight(state, prefix).weight)
    return result
