"""Decoder layers of the Llama family as one operator: rotary positions, a growing cache, a gated feed-forward part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.modules.encoder_layer import attribute
from mono_quant.modules.fused_layer import FusedLayer, LayerLayout

# What a decoder layer is called with, and what does not change its answer.
_KNOWN: Final = frozenset(
    {
        "hidden_states", "attention_mask", "position_embeddings", "past_key_values", "position_ids", "cache_position",
        "use_cache",
    }
)  # fmt: skip


@dataclass(frozen=True)
class DecoderLayout(LayerLayout):
    """Where a decoder layer keeps its parts: dotted names, from the layer.

    Its ``forward`` takes hidden states ``[samples, length, width]`` first, and by name ``attention_mask``,
    ``position_embeddings`` (cosine and sine) and ``past_key_values``; it answers hidden states.

    Attributes:
        query, key, value, output, gate, up, down: The linear layers.
        activation: What ``gate`` goes through before it is multiplied with ``up``.
        attention_norm, output_norm: The root-mean-square norms before attention and before the feed-forward part.
        norm_class: The qualified name of their class, and the attribute that holds what it adds to the mean.
        head_size: The attribute that holds the size of a head.
        scale: The attribute that holds what scores are multiplied with.
        layer_index: The attribute that holds the layer's place in the cache.
        refuse: Answers why a layer of this class computes something else, or ``None``.
        growing_layer: From a cache and the layer's place in it, answers the object whose ``keys`` and ``values`` grow;
            ``None`` for a cache that works in another way.
        static_layer: From a cache, the layer's place in it and an empty tensor ``[samples, key heads, 0, depth]``,
            answers the object whose ``keys`` and ``values`` have room for all tokens, ``cumulative_length`` of which
            are there; ``None`` likewise.
    """

    query: str
    key: str
    value: str
    output: str
    gate: str
    up: str
    down: str
    activation: str
    attention_norm: str
    output_norm: str
    norm_class: tuple[str, str]
    head_size: str
    scale: str
    layer_index: str
    refuse: Callable[[nn.Module], str | None]
    growing_layer: Callable[[Any, int], Any]
    static_layer: Callable[[Any, int, Tensor], Any]

    @property
    def linears(self) -> tuple[str, ...]:
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down

    @property
    def norms(self) -> tuple[str, ...]:
        return self.attention_norm, self.output_norm

    @property
    def activated(self) -> tuple[str, str]:
        return self.gate, self.activation

    def objection(self, layer: nn.Module) -> str | None:
        for name in self.norms:
            norm = type(layer.get_submodule(name))
            if f"{norm.__module__}.{norm.__qualname__}" != self.norm_class[0]:
                return f"{name} is a {norm.__name__}"
        return self.refuse(layer)

    def constants(self, layer: nn.Module) -> Mapping[str, Any]:
        size = int(attribute(layer, self.head_size))
        query, key = (int(attribute(layer, f"{name}.out_features")) for name in (self.query, self.key))
        eps = [float(getattr(layer.get_submodule(name), self.norm_class[1])) for name in self.norms]
        return {
            "heads": query // size,
            "empty": torch.empty(1, key // size, 0, size),
            "scale": float(attribute(layer, self.scale)),
            "eps": eps,
            "index": int(attribute(layer, self.layer_index)),
        }

    def run(self, layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        angles = kwargs.get("position_embeddings")
        if len(args) > 1 or angles is None or _asks_for_more(kwargs) or not layer.takes(x):
            return NotImplemented
        assert isinstance(x, Tensor)
        operands = layer.operands()
        cosine, sine = angles
        if operands is None or x.shape[2] != operands.linears[0].in_features:
            return NotImplemented
        constants, cache = operands.constants, kwargs.get("past_key_values")
        if not _fit(cosine, x, constants["empty"].shape[3]) or not _fit(sine, x, constants["empty"].shape[3]):
            layer.report(f"the angles of its positions are {cosine.dtype} of shape {tuple(cosine.shape)}")
            return NotImplemented
        if layer.needs_its_parts(operands):
            return NotImplemented
        empty = constants["empty"].expand(x.shape[0], -1, -1, -1)
        grown = None if cache is None else self.growing_layer(cache, constants["index"])
        fixed = None
        if cache is not None and grown is None:
            fixed = self.static_layer(cache, constants["index"], empty)
            if fixed is None:
                layer.report(f"its cache is a {type(cache).__name__} of another kind than the dynamic and static ones")
                return NotImplemented
        mask, length = kwargs.get("attention_mask"), x.shape[1]
        numbers = constants["heads"], constants["scale"], *constants["eps"], mask is None and length > 1
        activation = operands.linears[4].activation
        if fixed is not None:
            if not layer.takes_mask(mask, x.shape[0], length, fixed.keys.shape[2]):
                return NotImplemented
            out: Tensor = torch.ops.mono_quant.decoder_layer_static_cache.default(
                x, fixed.keys, fixed.values, fixed.cumulative_length, cosine, sine, mask, operands.weights, *numbers,
                activation,
            )  # fmt: skip
            fixed.cumulative_length.add_(length)
            return out
        keys, values = (empty, empty) if grown is None or not grown.keys.numel() else (grown.keys, grown.values)
        if not layer.takes_mask(mask, x.shape[0], length, keys.shape[2] + length):
            return NotImplemented
        out, keys, values = torch.ops.mono_quant.decoder_layer.default(
            x, keys, values, cosine, sine, mask, operands.weights, *numbers, activation
        )
        if grown is not None:
            grown.keys, grown.values = keys, values
        return out


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    others = (value for name, value in kwargs.items() if name not in _KNOWN)
    return any(value is not None and value is not False for value in others)


def _fit(angles: Tensor, x: Tensor, depth: int) -> bool:
    # A part of each head's elements may be rotated alone: then there are fewer angles.
    shape = angles.shape
    return (
        angles.dtype == torch.float32 and len(shape) == 3 and shape[0] in (1, x.shape[0])
        and shape[1] == x.shape[1] and shape[2] == depth
    )  # fmt: skip
