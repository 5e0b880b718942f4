"""The operators' schemas and shape functions, and the specification registered for every device.

``torch.ops.mono_quant.*`` exists once this module is imported. Where a device has no kernel of its own, PyTorch's
dispatcher runs the functions of :mod:`mono_quant.ops.reference` and of its neighbours for whole layers and chains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from mono_quant.core.packing import TILE_IN, TILE_OUT
from mono_quant.ops import reference
from mono_quant.ops.code_reference import run_codes, run_codes_shape
from mono_quant.ops.decoder_reference import (
    decoder_layer,
    decoder_layer_shape,
    decoder_layer_static_cache,
)
from mono_quant.ops.decoder_stack_reference import (
    decoder_layers,
    decoder_layers_shape,
    decoder_layers_static_cache,
    hold_decoder_layers,
)
from mono_quant.ops.encoder_reference import encoder_layer, hidden_states_shape
from mono_quant.ops.encoder_stack_reference import encoder_layers, hold_encoder_layers

NAMESPACE = "mono_quant"

SCHEMAS: dict[str, str] = {
    "quantize_rows": "(Tensor x) -> (Tensor, Tensor, Tensor)",
    "linear_dynamic": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    'str activation="none") -> Tensor',
    "pack_weight": "(Tensor weight) -> Tensor",
    "unpack_weight": "(Tensor packed, int out_features, int in_features) -> Tensor",
    "linear_dynamic_packed": "(Tensor x, Tensor packed, Tensor column_sum, Tensor weight_scale, "
    'Tensor? weight_zero_point, Tensor? bias, int out_features, str activation="none") -> Tensor',
    "embedding": "(Tensor indices, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, ScalarType dtype)"
    " -> Tensor",
    "conv_dynamic": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    "linear_weight_only": "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, "
    "Tensor? bias, int in_features, int bits, int group_size) -> Tensor",
    "linear_half": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "count_values": "(Tensor x, int bins, int exponent) -> Tensor",
    "encoder_layer": "(Tensor x, Tensor? mask, Tensor[] weights, int heads, float scale, float attention_eps, "
    "float output_eps, str activation) -> Tensor",
    "hold_encoder_layers": "(Tensor[] weights, int heads, float scale, float[] eps, str activation) -> int",
    "encoder_layers": "(int held, Tensor x, Tensor? mask) -> Tensor",
    "decoder_layer": "(Tensor x, Tensor past_keys, Tensor past_values, Tensor cosine, Tensor sine, Tensor? mask, "
    "Tensor[] weights, int heads, float scale, float attention_eps, float output_eps, bool causal, str activation) "
    "-> (Tensor, Tensor, Tensor)",
    "decoder_layer_static_cache": "(Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor cosine, "
    "Tensor sine, Tensor? mask, Tensor[] weights, int heads, float scale, float attention_eps, float output_eps, "
    "bool causal, str activation) -> Tensor",
    "hold_decoder_layers": "(Tensor[] weights, int heads, int key_heads, int depth, float scale, float[] eps, "
    "str activation) -> int",
    "decoder_layers": "(int held, Tensor x, Tensor[] past_keys, Tensor[] past_values, Tensor cosine, Tensor sine, "
    "Tensor? mask, bool causal) -> (Tensor, Tensor[], Tensor[])",
    "decoder_layers_static_cache": "(int held, Tensor x, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] positions, "
    "Tensor cosine, Tensor sine, Tensor? mask, bool causal) -> Tensor",
    "run_codes": "(Tensor[] inputs, Tensor constants, str program) -> Tensor[]",
}

_WHOLE: dict[str, Callable[..., Any]] = {
    "encoder_layer": encoder_layer,
    "hold_encoder_layers": hold_encoder_layers,
    "encoder_layers": encoder_layers,
    "decoder_layer": decoder_layer,
    "decoder_layer_static_cache": decoder_layer_static_cache,
    "hold_decoder_layers": hold_decoder_layers,
    "decoder_layers": decoder_layers,
    "decoder_layers_static_cache": decoder_layers_static_cache,
    "run_codes": run_codes,
}
REFERENCE: dict[str, Callable[..., Any]] = {name: _WHOLE.get(name) or getattr(reference, name) for name in SCHEMAS}


def _quantize_rows_shape(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    return (
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        torch.empty(rows, dtype=torch.float32, device=x.device),
        torch.empty(rows, dtype=torch.int32, device=x.device),
    )


def _linear_dynamic_shape(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return _contiguous(x, (*x.shape[:-1], weight.shape[0]))


def _pack_weight_shape(weight: Tensor) -> Tensor:
    out_features, in_features = weight.shape
    return weight.new_empty(
        (out_features + TILE_OUT - 1) // TILE_OUT, (in_features + TILE_IN - 1) // TILE_IN, TILE_IN // 4, TILE_OUT, 4
    )


def _unpack_weight_shape(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    return packed.new_empty(out_features, in_features)


def _linear_dynamic_packed_shape(
    x: Tensor,
    packed: Tensor,
    column_sum: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    return _contiguous(x, (*x.shape[:-1], out_features))


def _embedding_shape(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch.empty((*indices.shape, weight.shape[1]), dtype=dtype, device=indices.device)


def _conv_dynamic_shape(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    spatial = [
        (size + 2 * pad - dilate * (kernel - 1) - 1) // step + 1
        for size, pad, dilate, kernel, step in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return _contiguous(x, (x.shape[0], weight.shape[0], *spatial))


def _linear_weight_only_shape(x: Tensor, weight_packed: Tensor, *_: object, **__: object) -> Tensor:
    return _contiguous(x, (*x.shape[:-1], weight_packed.shape[0]))


def _linear_half_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _contiguous(x, (*x.shape[:-1], weight.shape[0]))


def _count_values_shape(x: Tensor, bins: int, exponent: int) -> Tensor:
    return torch.empty(bins, dtype=torch.int64, device=x.device)


def _second_shape(held: int, x: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states_shape(x)


def _contiguous(x: Tensor, shape: tuple[Any, ...]) -> Tensor:
    # Not new_empty: the answer is contiguous whatever the strides of the input.
    return torch.empty(shape, dtype=x.dtype, device=x.device)


_SHAPES: dict[str, Callable[..., Any]] = {
    "quantize_rows": _quantize_rows_shape,
    "linear_dynamic": _linear_dynamic_shape,
    "pack_weight": _pack_weight_shape,
    "unpack_weight": _unpack_weight_shape,
    "linear_dynamic_packed": _linear_dynamic_packed_shape,
    "embedding": _embedding_shape,
    "conv_dynamic": _conv_dynamic_shape,
    "linear_weight_only": _linear_weight_only_shape,
    "linear_half": _linear_half_shape,
    "count_values": _count_values_shape,
    "encoder_layer": hidden_states_shape,
    "encoder_layers": _second_shape,
    "decoder_layer": decoder_layer_shape,
    "decoder_layer_static_cache": hidden_states_shape,
    "decoder_layers": decoder_layers_shape,
    "decoder_layers_static_cache": _second_shape,
    "run_codes": run_codes_shape,
}

#: Compiled graphs must hand the operators the strides that eager mode would.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_definitions = Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _definitions.define(_name + _schema, tags=TAGS)
    _definitions.impl(_name, REFERENCE[_name], "CompositeExplicitAutograd")
    if _name in _SHAPES:  # one that answers numbers about tensors is for no graph
        register_fake(f"{NAMESPACE}::{_name}", _SHAPES[_name])
