"""Whole layers under ``torch.compile``: each is one operator that the compiler does not look into.

A compiler that traced the tensors of a layer would guard each of them in every call, some five hundred guards for each
layer of a decoder. So the graph holds the number of the layer alone, and what the layer is when the graph runs decides
what is computed, as without a compiler: changed weights, hooks or modules are seen.

``torch.export`` keeps graphs for other processes, where numbers mean nothing; it gets the layers part by part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.library import Library, register_fake

from mono_quant.errors import ConfigurationError
from mono_quant.modules.call_arguments import cache_names
from mono_quant.ops.encoder_reference import hidden_states_shape
from mono_quant.ops.library import NAMESPACE, TAGS

_layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_numbers = itertools.count()


@dataclass
class HeldCache:
    """The keys and values of one layer, as tensors that a graph hands on; a cache as far as a layer needs one.

    Attributes:
        keys, values: ``[samples, heads, length, depth]``, or ``None`` before the first token.
        cumulative_length: The number of tokens in them where they have room for more, else ``None``. Not changed: the
            graph itself counts.
    """

    keys: Tensor | None
    values: Tensor | None
    cumulative_length: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens and answer all: called where the layer runs part by part."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        elif self.cumulative_length is None:
            self.keys, self.values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        else:
            places = torch.arange(keys.shape[2]) + self.cumulative_length
            self.keys.index_copy_(2, places, keys)
            self.values.index_copy_(2, places, values)
        return self.keys, self.values


def number_layer(layer: nn.Module) -> int:
    """Answer a number of its own for ``layer``, by which graphs call it for as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def layer_of(number: int) -> nn.Module:
    """Answer the layer, or the model, of a number.

    Raises:
        ConfigurationError: It no longer exists.
    """
    layer = _layers.get(number)
    if layer is None:
        raise ConfigurationError(
            "a compiled graph calls a layer that no longer exists",
            suggestion="Keep the model for as long as what torch.compile made of it, or compile again.",
        )
    return layer


def _forward(number: int, x: Tensor, cache: HeldCache | None = None, **kwargs: Any) -> Tensor:
    layer: Any = layer_of(number)
    if cache is not None:
        kwargs[cache_names(type(layer))[0]] = cache
    # Not the layer itself: its hooks are part of the graph.
    out: Tensor = type(layer).forward(layer, x, **kwargs)
    return out.clone() if out is x else out


def _encoder_layer(layer: int, x: Tensor, mask: Tensor | None) -> Tensor:
    return _forward(layer, x, attention_mask=mask)


def _decoder_layer(
    layer: int,
    x: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    key_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    cache = HeldCache(past_keys, past_values)
    out = _forward(layer, x, cache, attention_mask=mask, position_embeddings=(cosine, sine))
    assert cache.keys is not None
    assert cache.values is not None
    # In one layout, whoever computed them: the compiler was told which.
    return out, cache.keys.contiguous(), cache.values.contiguous()


def _decoder_layer_static_cache(
    layer: int,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
) -> Tensor:
    cache = HeldCache(keys, values, position)
    return _forward(layer, x, cache, attention_mask=mask, position_embeddings=(cosine, sine))


def _decoder_layers(
    stack: int,
    x: Tensor,
    past_keys: list[Tensor],
    past_values: list[Tensor],
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    layers: int,
    key_heads: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    pairs = zip(past_keys, past_values, strict=True) if past_keys else [(None, None)] * layers
    caches = [HeldCache(*pair) for pair in pairs]
    out = _run_layers(stack, x, caches, cosine, sine, mask)
    keys, values = [cache.keys for cache in caches], [cache.values for cache in caches]
    return out, [t.contiguous() for t in keys if t is not None], [t.contiguous() for t in values if t is not None]


def _decoder_layers_static_cache(
    stack: int,
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    positions: list[Tensor],
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
) -> Tensor:
    caches = [HeldCache(*held) for held in zip(keys, values, positions, strict=True)]
    return _run_layers(stack, x, caches, cosine, sine, mask)


def _run_layers(
    stack: int, x: Tensor, caches: list[HeldCache], cosine: Tensor, sine: Tensor, mask: Tensor | None
) -> Tensor:
    model: Any = layer_of(stack)
    out: Tensor = model.run_layers(x, caches, (cosine, sine), mask)
    return out.clone() if out is x else out


def _same_shape(number: int, x: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states_shape(x)


def _decoder_layer_shape(
    layer: int,
    x: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    key_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    past = 0 if past_keys is None else past_keys.shape[2]
    grown = (x.shape[0], key_heads, past + x.shape[1], cosine.shape[-1])
    return hidden_states_shape(x), x.new_empty(grown), x.new_empty(grown)


def _decoder_layers_shape(
    stack: int,
    x: Tensor,
    past_keys: list[Tensor],
    past_values: list[Tensor],
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    layers: int,
    key_heads: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    past = past_keys[0].shape[2] if past_keys else 0
    grown = (x.shape[0], key_heads, past + x.shape[1], cosine.shape[-1])
    keys, values = ([x.new_empty(grown) for _ in range(layers)] for _ in range(2))
    return hidden_states_shape(x), keys, values


# For each operator its schema, what it does and the shapes of its answers.
_OPERATORS: Final[dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]]] = {
    "fused_encoder_layer": ("(int layer, Tensor x, Tensor? mask) -> Tensor", _encoder_layer, _same_shape),
    "fused_decoder_layer": (
        "(int layer, Tensor x, Tensor? past_keys, Tensor? past_values, Tensor cosine, Tensor sine, Tensor? mask, "
        "int key_heads) -> (Tensor, Tensor, Tensor)",
        _decoder_layer,
        _decoder_layer_shape,
    ),
    "fused_decoder_layer_static_cache": (
        "(int layer, Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor cosine, Tensor sine, "
        "Tensor? mask) -> Tensor",
        _decoder_layer_static_cache,
        _same_shape,
    ),
    "fused_decoder_layers": (
        "(int stack, Tensor x, Tensor[] past_keys, Tensor[] past_values, Tensor cosine, Tensor sine, Tensor? mask, "
        "int layers, int key_heads) -> (Tensor, Tensor[], Tensor[])",
        _decoder_layers,
        _decoder_layers_shape,
    ),
    "fused_decoder_layers_static_cache": (
        "(int stack, Tensor x, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] positions, Tensor cosine, Tensor sine, "
        "Tensor? mask) -> Tensor",
        _decoder_layers_static_cache,
        _same_shape,
    ),
}

_definitions = Library(NAMESPACE, "FRAGMENT")
for _name, (_schema, _implementation, _shape) in _OPERATORS.items():
    _definitions.define(_name + _schema, tags=TAGS)
    _definitions.impl(_name, _implementation, "CPU")
    register_fake(f"{NAMESPACE}::{_name}", _shape)
