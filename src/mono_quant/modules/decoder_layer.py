"""Decoder layers of the Llama family as one operator: rotary positions, a cache, a gated feed-forward part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.modules.call_arguments import CACHE_NAMES, cache_in, name_of_place, unknown_names
from mono_quant.modules.compiled_layer import HeldCache
from mono_quant.modules.encoder_layer import attribute, setting
from mono_quant.modules.fused_layer import FLOATS, FusedLayer, LayerLayout, gate_activation
from mono_quant.modules.layer_operands import Operands, Setting

# What a decoder layer is called with besides a cache, and what does not change its answer: hidden states are what hooks
# of whole layers see.
_KNOWN: Final = frozenset(
    {
        "hidden_states", "attention_mask", "position_embeddings", "position_ids", "cache_position", "use_cache",
        "output_hidden_states",
    }
)  # fmt: skip


@dataclass(frozen=True)
class DecoderLayout(LayerLayout):
    """Where a decoder layer keeps its parts: dotted names, from the layer.

    Its ``forward`` takes hidden states ``[samples, length, width]`` first, and by name ``attention_mask``,
    ``position_embeddings`` (cosine and sine) and a cache (see :func:`~mono_quant.modules.call_arguments.cache_in`); it
    answers hidden states.

    Attributes:
        query, key, value, output, gate, up, down: The linear layers.
        activation: What ``gate`` goes through before it is multiplied with ``up``.
        attention_norm, output_norm: The root-mean-square norms before attention and before the feed-forward part.
        norm_class: The qualified name of their class, and the attribute that holds what it adds to the mean.
        head_size: The attribute that holds the size of a head.
        scale: The attribute that holds what scores are multiplied with.
        layer_index: The attribute that holds the layer's place in the cache.
        adds_bools: Answers whether a layer adds a mask of bools to its scores, as 0 and 1.
        refuse: Answers why a layer of this class computes something else, or ``None``.
        refuse_settings: Answers where ``adds_bools`` and ``refuse`` look.
        growing_layer: From a cache, the layer's place in it and a dtype, answers the object whose ``keys`` and
            ``values`` grow; ``None`` for a cache that works in another way; what it holds, where that is not of this
            dtype on the CPU.
        static_layer: From a cache, the layer's place in it, the number of samples and an empty tensor ``[1, key heads,
            0, depth]``, answers the object whose ``keys`` and ``values`` have room for all tokens,
            ``cumulative_length`` of which are there; ``None`` likewise.
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
    adds_bools: Callable[[nn.Module], bool]
    refuse: Callable[[nn.Module], str | None]
    refuse_settings: Callable[[nn.Module], Sequence[Setting]]
    growing_layer: Callable[[Any, int, torch.dtype], Any]
    static_layer: Callable[[Any, int, int, Tensor], Any]

    @property
    def linears(self) -> tuple[str, ...]:
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down

    @property
    def norms(self) -> tuple[str, ...]:
        return self.attention_norm, self.output_norm

    @property
    def norm_parameters(self) -> tuple[str, ...]:
        return ("weight",)

    @property
    def activated(self) -> tuple[str, str]:
        return self.gate, self.activation

    @property
    def takes_few_bits(self) -> bool:
        return True

    def objection(self, layer: nn.Module) -> str | None:
        for name in self.norms:
            norm = type(layer.get_submodule(name))
            if f"{norm.__module__}.{norm.__qualname__}" != self.norm_class[0]:
                return f"{name} is a {norm.__name__}"
        return self.refuse(layer)

    def constants(self, layer: nn.Module) -> Mapping[str, Any]:
        eps = [float(getattr(layer.get_submodule(name), self.norm_class[1])) for name in self.norms]
        return {
            "heads": int(attribute(layer, f"{self.query}.out_features")) // int(attribute(layer, self.head_size)),
            "empty": self.no_keys(layer),
            "scale": float(attribute(layer, self.scale)),
            "eps": eps,
            "index": int(attribute(layer, self.layer_index)),
            "adds_bools": self.adds_bools(layer),
            "activation": gate_activation(layer, self),
        }

    def settings(self, layer: nn.Module) -> Sequence[Setting]:
        eps = [f"{norm}.{self.norm_class[1]}" for norm in self.norms]
        names = [*eps, self.head_size, self.scale, self.layer_index]
        return [*(setting(layer, name) for name in names), *self.refuse_settings(layer)]

    def no_keys(self, layer: nn.Module) -> Tensor:
        """Answer the layer's keys of no token, ``[1, key heads, 0, depth]`` in the dtype of its norms."""
        size = int(attribute(layer, self.head_size))
        heads = int(attribute(layer, f"{self.key}.out_features")) // size
        return torch.empty(
            1, heads, 0, size, dtype=attribute(layer, f"{self.attention_norm}.weight").dtype, device="cpu"
        )

    def run(self, layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _takes_arguments(layer, args, kwargs):
            return NotImplemented
        x = args[0] if args else kwargs.get("hidden_states")
        if not layer.takes(x):
            return NotImplemented
        assert isinstance(x, Tensor)
        angles, mask, cache = kwargs["position_embeddings"], kwargs.get("attention_mask"), cache_in(type(layer), kwargs)
        if torch.compiler.is_compiling():
            return self._call_from_graph(layer, x, angles, mask, cache) if layer.is_compiled_whole() else NotImplemented
        operands = layer.operands()
        if operands is None or x.shape[2] != operands.linears[0].in_features or layer.needs_its_parts(operands):
            return NotImplemented
        empty = operands.constants["empty"]
        if not is_of_type(layer, x, empty):
            return NotImplemented
        for part in angles:
            if not angles_fit(part, x, empty.shape[3]):
                layer.report(f"the angles of its positions are {part.dtype} of shape {tuple(part.shape)}")
                return NotImplemented
        held = self.held(layer, cache, x.shape[0], operands.constants["index"], empty)
        if held is None:
            return NotImplemented
        return _compute(layer, operands, x, angles, mask, held)

    def held(self, layer: FusedLayer, cache: Any, samples: int, index: int, empty: Tensor) -> Any:
        """Answer the object that holds the layer's keys and values, or ``None`` if they are kept in another way.

        Args:
            layer: Says that they are.
            cache: What the layer was called with.
            samples: Sequences that are read at a time.
            index: The layer's place in the cache.
            empty: Keys of no token, ``[1, key heads, 0, depth]``.
        """
        if cache is None:
            return HeldCache(None, None)
        if isinstance(cache, HeldCache):
            return cache
        held = self.growing_layer(cache, index, empty.dtype)
        if held is None:
            held = self.static_layer(cache, index, samples, empty)
        if held is None:
            layer.report(f"its cache is a {type(cache).__name__} of another kind than the dynamic and static ones")
        elif isinstance(held, str):
            layer.report(f"its cache holds {held}, expected {empty.dtype} on the CPU")
            return None
        return held

    def _call_from_graph(self, layer: FusedLayer, x: Tensor, angles: Any, mask: Any, cache: Any) -> Any:
        """Answer the layer's output as one operator of a graph that is being compiled."""
        cosine, sine = angles
        empty = self.no_keys(layer)
        if not is_of_type(layer, x, empty):
            return NotImplemented
        held = self.held(layer, cache, x.shape[0], attribute(layer, self.layer_index), empty)
        if held is None:
            return NotImplemented
        if getattr(held, "cumulative_length", None) is not None:
            out = torch.ops.mono_quant.fused_decoder_layer_static_cache.default(
                layer.number, x, held.keys, held.values, held.cumulative_length, cosine, sine, mask
            )
            held.cumulative_length.add_(x.shape[1])
            return out
        past = (None, None) if is_empty(held) else (held.keys, held.values)
        out, held.keys, held.values = torch.ops.mono_quant.fused_decoder_layer.default(
            layer.number, x, *past, cosine, sine, mask, empty.shape[1]
        )
        return out


def _compute(layer: FusedLayer, operands: Operands, x: Tensor, angles: Any, mask: Any, held: Any) -> Any:
    constants, length, (cosine, sine) = operands.constants, x.shape[1], angles
    numbers = constants["heads"], constants["scale"], *constants["eps"], mask is None and length > 1
    activation, position = constants["activation"], getattr(held, "cumulative_length", None)
    if position is not None:
        if mask is None and length == 1:
            layer.report("without a mask, its token sees places of the cache that hold no token yet")
            return NotImplemented
        if not layer.takes_mask(mask, x.shape[0], length, held.keys.shape[2]) or layer.adds_mask_of_bools(
            mask, operands
        ):
            return NotImplemented
        out: Tensor = torch.ops.mono_quant.decoder_layer_static_cache.default(
            x, held.keys, held.values, position, cosine, sine, mask, operands.weights, *numbers, activation
        )
        if not isinstance(held, HeldCache):  # whose graph counts the tokens itself
            position.add_(length)
        return out
    if is_empty(held):
        empty = constants["empty"]
        keys = values = empty if x.shape[0] == 1 else empty.expand(x.shape[0], -1, -1, -1)
    else:
        keys, values = held.keys, held.values
    if not layer.takes_mask(mask, x.shape[0], length, keys.shape[2] + length) or layer.adds_mask_of_bools(
        mask, operands
    ):
        return NotImplemented
    out, held.keys, held.values = torch.ops.mono_quant.decoder_layer.default(
        x, keys, values, cosine, sine, mask, operands.weights, *numbers, activation
    )
    return out


def is_empty(held: Any) -> bool:
    """Say whether what holds keys and values holds none yet."""
    return held.keys is None or not held.keys.numel()


def _takes_arguments(layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a layer is called with what its operator needs, and with nothing else."""
    if len(args) > 1:
        layer.report(f"its {name_of_place(type(layer), 1)} is not given by name")
        return False
    unknown = unknown_argument(type(layer), kwargs)
    if unknown is not None:
        layer.report_unknown(unknown)
        return False
    if kwargs.get("position_embeddings") is None:
        layer.report("it is called without position_embeddings")
        return False
    return True


def unknown_argument(layer_type: type[nn.Module], kwargs: dict[str, Any]) -> str | None:
    """Answer the name of what a layer is called with that could change its answer and no operator knows, or ``None``.

    A second cache is such a thing.
    """
    for name in unknown_names(kwargs, _KNOWN):
        if name not in CACHE_NAMES or kwargs[name] is not cache_in(layer_type, kwargs):
            return name
    return None


def is_of_type(layer: FusedLayer, x: Tensor, empty: Tensor) -> bool:
    """Say whether ``x`` is of the dtype of the layer's norms, which its keys of no token have."""
    if x.dtype != empty.dtype:
        layer.report(f"its input is {x.dtype}, its norms are {empty.dtype}")
    return x.dtype == empty.dtype


def angles_fit(angles: Tensor, x: Tensor, depth: int) -> bool:
    """Say whether operators take ``angles``: ``[samples or 1, length, depth]`` for ``x``."""
    # A part of each head's elements may be rotated alone: then there are fewer angles.
    shape = angles.shape
    return (
        angles.dtype in FLOATS and len(shape) == 3 and shape[0] in (1, x.shape[0])
        and shape[1] == x.shape[1] and shape[2] == depth
    )  # fmt: skip
