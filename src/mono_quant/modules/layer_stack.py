"""Decoder models whose layers run as one operator, all of them in one call for each token.

To call thirty layers one by one takes Python longer than the processor takes for many of them, and between two calls
the memory that holds the weights is idle. So a model whose ``forward`` calls its layers in a loop, each with the answer
of the one before and all with the same other arguments, sees in that loop a list of a single layer: all of them. As
with single layers (:mod:`mono_quant.modules.fused_layer`), modules keep their places, names and buffers, and only the
class of the model changes, to one that derives from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mono_quant.modules.call_arguments import cache_in, cache_names
from mono_quant.modules.compiled_layer import HeldCache
from mono_quant.modules.decoder_layer import unknown_argument
from mono_quant.modules.exchanged_class import ExchangedClass, qualified_name
from mono_quant.modules.fused_layer import FusedLayer, fuse_single_layers, report_once, why_parts
from mono_quant.modules.stack_call import StackOperands, all_fused, call_stack, call_stack_from_graph, gather_stack
from mono_quant.ops import get_backend

_running = threading.local()


@dataclass(frozen=True)
class StackLayout:
    """Where a decoder model keeps its layers, and what is to be known about its ``forward``.

    It must call each element of a slice ``self.<layers>[:n]`` with hidden states first and the same arguments by name.

    Attributes:
        layers: The attribute that holds the list of layers.
        refuse: Answers why a model of this class does not do so, or ``None``.
    """

    layers: str
    refuse: Callable[[nn.Module], str | None]


class LayerStack(ExchangedClass):
    """What a decoder model becomes whose layers can run as one operator: a subclass of this and of its own class.

    Where an input or the layers' state does not allow it, each layer is called in turn.
    """

    cache_name = "_stack_operands"
    stack: StackLayout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.training or get_backend() != "native":
            return super().forward(*args, **kwargs)
        before = getattr(_running, "model", None)
        _running.model = self
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.model = before

    @classmethod
    def derived(cls, float_type: type[nn.Module]) -> type[Self]:
        if float_type not in _STACKED:
            layout = _STACKS[qualified_name(float_type)]
            body = {"float_type": float_type, "stack": layout, layout.layers: property(_seen_layers)}
            # It keeps its name, which transformers writes into configurations.
            named = {"__module__": float_type.__module__, "__qualname__": float_type.__qualname__}
            made = type(float_type.__name__, (LayerStack, float_type), body | named)
            _STACKED.setdefault(float_type, made)  # of two threads that come here at once, both get the same class
        return _STACKED[float_type]  # type: ignore[return-value]

    def all_layers(self) -> nn.ModuleList:
        """Answer the layers, whoever asks."""
        return self._modules[self.stack.layers]  # type: ignore[return-value]

    def run_layers(self, x: Tensor, caches: Sequence[HeldCache], angles: tuple[Tensor, Tensor], mask: Any) -> Tensor:
        """Answer what the layers answer, for a compiled graph that hands their caches on.

        Args:
            x: ``[samples, length, width]``.
            caches: One for each layer; changed.
            angles: Cosine and sine, ``[samples or 1, length, depth]``.
            mask: As the layers take it.
        """
        out = self._run(x, angles, mask, caches) if get_backend() == "native" else NotImplemented
        if isinstance(out, Tensor):
            return out
        self._report(out)
        for layer, cache in zip(self.all_layers(), caches, strict=True):
            # Not the layer itself: its hooks are part of graphs.
            named = {cache_names(type(layer))[0]: cache}
            x = type(layer).forward(layer, x, attention_mask=mask, position_embeddings=angles, **named)
        return x

    def _call_all(self, hidden_states: Any, **kwargs: Any) -> Any:
        """Stand for all layers in the loop of the model."""
        layers, angles = self.all_layers(), kwargs.get("position_embeddings")
        first: Any = layers[0]
        out: Any = NotImplemented
        if (
            angles is not None
            and isinstance(first, FusedLayer)
            and unknown_argument(type(first), kwargs) is None
            and first.takes(hidden_states)
        ):
            cache, mask = cache_in(type(first), kwargs), kwargs.get("attention_mask")
            if torch.compiler.is_compiling():
                out = call_stack_from_graph(self.number, layers, hidden_states, angles, mask, cache)
            else:
                out = self._run(hidden_states, angles, mask, cache)
        if isinstance(out, Tensor):
            return out
        self._report(out)
        for layer in layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states

    def _run(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Any:
        layers, operands = self.all_layers(), self._operands()
        if operands is None:
            return NotImplemented
        reason = why_parts(operands.contents)
        return reason if reason is not None else call_stack(layers, operands, x, angles, mask, cache)

    def _operands(self) -> StackOperands | None:
        found: StackOperands | None = self.__dict__.get(self.cache_name)
        layers = self.all_layers()
        if found is not None and found.are_current(layers):
            return found
        self.__dict__.pop(self.cache_name, None)
        gathered = gather_stack(layers) if all_fused(layers) else NotImplemented
        if not isinstance(gathered, StackOperands):
            self._report(gathered)
            return None
        self.__dict__[self.cache_name] = gathered
        return gathered

    def _report(self, reason: Any) -> None:
        """Say once why layers run one by one; ``NotImplemented`` stands for what is known to them, who say it."""
        if reason is not NotImplemented:
            _report_one_by_one(type(self), reason)


def _report_one_by_one(model_type: type[nn.Module], reason: str) -> None:
    report_once(f"the layers of a {model_type.__name__} run one by one: {reason}")


class _AllAsOne:
    """What the loop of a model sees instead of its list of layers: whoever asks for all of them gets one."""

    def __init__(self, model: LayerStack) -> None:
        self._model = model
        self._layers = model.all_layers()

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def __getitem__(self, at: Any) -> Any:
        everything = isinstance(at, slice) and at.start is None and at.step is None
        if everything and len(self._layers) and (at.stop is None or at.stop >= len(self._layers)):
            return [self._model._call_all]
        return self._layers[at]


def _seen_layers(model: LayerStack) -> Any:
    """Answer the list of layers, or in the loop of the model one that stands for all."""
    if torch.compiler.is_compiling():
        as_one = not torch.compiler._is_exporting_flag and not model.training and get_backend() == "native"
    else:
        as_one = getattr(_running, "model", None) is model
    return _AllAsOne(model) if as_one else model.all_layers()


_STACKS: dict[str, StackLayout] = {}
_STACKED: dict[type[nn.Module], type[LayerStack]] = {}


def register_stack(qualified_name: str, layout: StackLayout) -> None:
    """Let models of a class of an optional library run all their layers as one operator.

    Args:
        qualified_name: The class, such as ``"package.module.DecoderModel"``.
        layout: Where it keeps its layers.
    """
    _STACKS[qualified_name] = layout


def fuse_layers(model: nn.Module) -> list[str]:
    """Let every layer in ``model`` that can run as one operator do so, and decoders run all of theirs in one call.

    A layer can if all its linear layers are int8 with a weight of their own (in decoders also with weights of few
    bits), its norms are float32 or bfloat16, and its activation is computed inside the int8 linear layer before (see
    :func:`mono_quant.modules.fuse_activations`, which comes first).

    Args:
        model: Changed in place.

    Returns:
        The names of the layers that run as one operator now.
    """
    fused = fuse_single_layers(model)
    for module in model.modules():
        layout = _STACKS.get(qualified_name(type(module)))
        if layout is None or isinstance(module, LayerStack):
            continue
        layers = getattr(module, layout.layers)
        if not len(layers) or not all_fused(layers):
            continue  # a layer that is not says why
        reason = layout.refuse(module)
        if reason is None:
            LayerStack.take_place(module)
        else:
            _report_one_by_one(type(module), reason)
    return fused
