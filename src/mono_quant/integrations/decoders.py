"""Decoder layers of transformers that can run as one operator."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.integrations.whole_layers import adds_bools, attention_settings, why_not_whole
from mono_quant.modules.decoder_layer import DecoderLayout
from mono_quant.modules.decoder_stack import DecoderStack
from mono_quant.modules.fused_layer import register_layout
from mono_quant.modules.layer_operands import Setting
from mono_quant.modules.layer_stack import StackLayout, register_stack

_CACHES: Final = "transformers.cache_utils"


def _is_exactly(value: object, name: str) -> bool:
    kind = type(value)
    return kind.__module__ == _CACHES and kind.__qualname__ == name


def dynamic_layer(cache: Any, index: int, dtype: torch.dtype) -> Any:
    """Answer what a ``DynamicCache`` holds for one layer, ready to be given keys and values.

    Args:
        cache: Any cache of transformers.
        index: The layer's place in it.
        dtype: Of the layer's keys and values.

    Returns:
        An object whose ``keys`` and ``values`` are ``[samples, heads, length, depth]`` of ``dtype``; what they are,
        where they are something else; or ``None`` where the cache keeps them in another way.
    """
    if not _is_exactly(cache, "DynamicCache") or cache.offloading:
        return None
    layers = cache.layers
    if cache.layer_class_to_replicate is not None:
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
    if len(layers) <= index or not _is_exactly(layers[index], "DynamicLayer"):
        return None
    layer = layers[index]
    if not layer.is_initialized:
        nothing = torch.empty(0, dtype=dtype)
        layer.lazy_initialization(nothing, nothing)
    keys = layer.keys
    return layer if keys.dtype == dtype and keys.device.type == "cpu" else f"{keys.dtype} on {keys.device}"


def static_layer(cache: Any, index: int, samples: int, empty: Tensor) -> Any:
    """Answer what a ``StaticCache`` holds for one layer, ready to be given keys and values.

    Args:
        cache: Any cache of transformers.
        index: The layer's place in it.
        samples: Sequences that are read at a time.
        empty: Keys of no token, ``[1, heads, 0, depth]``.

    Returns:
        An object whose ``keys`` and ``values`` are ``[samples, heads, capacity, depth]`` of the dtype of ``empty``;
        what they are, where they are something else; or ``None`` where the cache keeps them in another way.
    """
    if not _is_exactly(cache, "StaticCache") or cache.offloading:
        return None
    layers = cache.layers
    if len(layers) <= index or not _is_exactly(layers[index], "StaticLayer"):
        return None
    layer = layers[index]
    if not layer.is_initialized:
        keys = empty.expand(samples, -1, -1, -1)
        layer.lazy_initialization(keys, keys)
    held = layer.keys, layer.values
    fits = all(t.dtype == empty.dtype and t.device.type == "cpu" and t.is_contiguous() for t in held)
    if fits and layer.keys.shape[0] == samples:
        return layer
    return f"{layer.keys.dtype} on {layer.keys.device}, for {layer.keys.shape[0]} sequences where {samples} are read"


def _refuse(layer: nn.Module) -> str | None:
    size = getattr(layer.self_attn, "head_dim", 0)
    if size <= 0 or size % 2:
        return f"its heads have {size} elements"
    if getattr(layer.self_attn, "is_causal", None) is not True:
        return "its tokens see those behind them"
    return why_not_whole(layer.get_submodule("self_attn"))


def _settings(layer: nn.Module) -> list[Setting]:
    attention = layer.get_submodule("self_attn")
    return [(attention.__dict__, "is_causal"), *attention_settings(attention)]


def _layout(norm_class: str) -> DecoderLayout:
    return DecoderLayout(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        activation="mlp.act_fn",
        attention_norm="input_layernorm",
        output_norm="post_attention_layernorm",
        norm_class=(norm_class, "variance_epsilon"),
        head_size="self_attn.head_dim",
        scale="self_attn.scaling",
        layer_index="self_attn.layer_idx",
        adds_bools=lambda layer: adds_bools(layer.get_submodule("self_attn")),
        refuse=_refuse,
        refuse_settings=_settings,
        growing_layer=dynamic_layer,
        static_layer=static_layer,
    )


def _refuse_stack(model: nn.Module) -> str | None:
    # A loop that gives layers of several kinds masks of their own gives them all that of the first here.
    kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or ())
    return "its layers are of several kinds" if len(kinds) > 1 else None


for _model, _name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2")):
    _module = f"transformers.models.{_model}.modeling_{_model}"
    register_layout(f"{_module}.{_name}DecoderLayer", _layout(f"{_module}.{_name}RMSNorm"))
    register_stack(f"{_module}.{_name}Model", DecoderStack, StackLayout("layers", _refuse_stack))
