"""Encoder layers: attention and a feed-forward pair, each added to its input and normalized, as one operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.modules.call_arguments import name_of_place, unknown_names
from mono_quant.modules.fused_layer import FusedLayer, LayerLayout, gate_activation
from mono_quant.modules.layer_operands import Setting

# What a layer takes, and what reaches it that an encoder's layer makes no use of.
_KNOWN: Final = frozenset(
    {"hidden_states", "attention_mask", "position_ids", "use_cache", "output_hidden_states", "return_dict"}
)


@dataclass(frozen=True)
class EncoderLayout(LayerLayout):
    """Where an encoder layer keeps its parts: dotted names, from the layer.

    Its ``forward`` takes hidden states ``[samples, length, width]`` and a mask first, and answers hidden states.

    Attributes:
        query, key, value, output, up, down: The linear layers.
        activation: The activation between ``up`` and ``down``.
        attention_norm, output_norm: The norms after attention and after the feed-forward pair.
        heads: The attribute that holds the number of attention heads.
        scale: The attribute that holds what scores are multiplied with.
        adds_bools: Answers whether a layer adds a mask of bools to its scores, as 0 and 1.
        refuse: Answers why a layer of this class computes something else, or ``None``.
        refuse_settings: Answers where ``adds_bools`` and ``refuse`` look.
    """

    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    activation: str
    attention_norm: str
    output_norm: str
    heads: str
    scale: str
    adds_bools: Callable[[nn.Module], bool]
    refuse: Callable[[nn.Module], str | None]
    refuse_settings: Callable[[nn.Module], Sequence[Setting]]

    @property
    def linears(self) -> tuple[str, ...]:
        return self.query, self.key, self.value, self.output, self.up, self.down

    @property
    def norms(self) -> tuple[str, ...]:
        return self.attention_norm, self.output_norm

    @property
    def norm_parameters(self) -> tuple[str, ...]:
        return "weight", "bias"

    @property
    def activated(self) -> tuple[str, str]:
        return self.up, self.activation

    def objection(self, layer: nn.Module) -> str | None:
        for name in self.norms:
            norm = layer.get_submodule(name)
            if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
                return f"{name} is not a layer norm over rows"
        return self.refuse(layer)

    def constants(self, layer: nn.Module) -> Mapping[str, Any]:
        return {
            "heads": int(attribute(layer, self.heads)),
            "scale": float(attribute(layer, self.scale)),
            "eps": [float(attribute(layer, f"{norm}.eps")) for norm in self.norms],
            "adds_bools": self.adds_bools(layer),
            "activation": gate_activation(layer, self),
        }

    def settings(self, layer: nn.Module) -> Sequence[Setting]:
        names = [self.heads, self.scale, *(f"{norm}.eps" for norm in self.norms)]
        return [*(setting(layer, name) for name in names), *self.refuse_settings(layer)]

    def run(self, layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inputs_of_call(layer, args, kwargs)
        if given is None:
            return NotImplemented
        x, mask = given
        if torch.compiler.is_compiling():
            if not layer.is_compiled_whole():
                return NotImplemented
            return torch.ops.mono_quant.fused_encoder_layer.default(layer.number, x, mask)
        operands = layer.operands()
        if operands is None or x.shape[2] != operands.linears[0].in_features or layer.needs_its_parts(operands):
            return NotImplemented
        if layer.adds_mask_of_bools(mask, operands):
            return NotImplemented
        constants = operands.constants
        return torch.ops.mono_quant.encoder_layer.default(
            x, mask, operands.weights, constants["heads"], constants["scale"], *constants["eps"],
            constants["activation"],
        )  # fmt: skip


def inputs_of_call(
    layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None] | None:
    """Answer hidden states and mask of a call of ``layer``; ``None`` where no operator takes it, which it reports."""
    unknown = _unknown_argument(layer, args, kwargs)
    if unknown is not None:
        layer.report_unknown(unknown)
        return None
    x = args[0] if args else kwargs.get("hidden_states")
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if not layer.takes(x):
        return None
    assert isinstance(x, Tensor)
    return (x, mask) if layer.takes_mask(mask, x.shape[0], x.shape[1], x.shape[1]) else None


def _unknown_argument(layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Answer the name of what could change the answer of ``layer`` and its operator does not know, or ``None``."""
    # Behind hidden states and mask come what cross-attention is to see and the like, mostly ``None``.
    others = {name_of_place(type(layer), place): args[place] for place in range(2, len(args))}
    return next(iter(unknown_names(others | kwargs, _KNOWN)), None)


def attribute(layer: nn.Module, name: str) -> Any:
    """Answer an attribute of a module inside ``layer`` by its dotted name."""
    owner, _, last = name.rpartition(".")
    return getattr(layer.get_submodule(owner), last)


def setting(layer: nn.Module, name: str) -> Setting:
    """Answer where an attribute of a module inside ``layer`` is kept, by its dotted name."""
    owner, _, last = name.rpartition(".")
    return layer.get_submodule(owner).__dict__, last
