"""Decoder models whose layers run as one operator, all of them in one call for each token.

To call thirty layers one by one takes Python longer than the processor takes for many of them, and between two calls
the memory that holds the weights is idle. So a model whose ``forward`` calls its layers in a loop, each with the answer
of the one before and all with the same other arguments, sees in that loop a list of a single layer: all of them. As with
single layers (:mod:`mono_quant.modules.fused_layer`), modules keep their places, names and buffers, and only the class
of the model changes, to one that derives from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self
from weakref import finalize

import torch
from torch import Tensor, nn

from mono_quant.modules.compiled_layer import HeldCache, number_layer
from mono_quant.modules.decoder_layer import DecoderLayout, angles_fit, asks_for_more, is_empty
from mono_quant.modules.encoder_layer import attribute
from mono_quant.modules.fused_layer import (
    FusedLayer,
    fuse_single_layers,
    report_once,
    restore_single_layers,
    why_parts,
)
from mono_quant.modules.layer_operands import Operands
from mono_quant.ops import get_backend, native

_CACHE: Final = "_stack_operands"
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


@dataclass(frozen=True, eq=False)
class StackOperands:
    """The layers' operands as they were when the native library was handed their weights.

    Attributes:
        held: The number by which it knows them.
        contents: By what to tell whether they are still the model's.
        types: The classes of the layers.
        places: The layers' places in a cache.
    """

    held: int
    contents: Operands
    types: tuple[type[nn.Module], ...]
    places: tuple[int, ...]


class LayerStack(nn.Module):
    """What a decoder model becomes whose layers can run as one operator: a subclass of this and of its own class.

    Where an input or the layers' state does not allow it, each layer is called in turn.
    """

    float_type: type[nn.Module]
    stack: StackLayout
    number: int  # by which compiled graphs call the layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.training or get_backend() != "native":
            return super().forward(*args, **kwargs)
        before = getattr(_running, "model", None)
        _running.model = self
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.model = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__dict__.copy()
        state.pop(_CACHE, None)
        state.pop("number", None)
        return _new_model, (self.float_type,), state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The linear layers leave their tiles: nobody else may hold them.
        self.__dict__.pop(_CACHE, None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def run_layers(self, x: Tensor, caches: Sequence[HeldCache], angles: tuple[Tensor, Tensor], mask: Any) -> Tensor:
        """Answer what the layers answer, for a compiled graph that hands their caches on.

        Args:
            x: float32 ``[samples, length, width]``.
            caches: One for each layer; changed.
            angles: Cosine and sine, float32 ``[samples or 1, length, depth]``.
            mask: As the layers take it.
        """
        out = self._run(x, angles, mask, caches) if get_backend() == "native" else NotImplemented
        if out is NotImplemented:
            for layer, cache in zip(_layers_of(self), caches, strict=True):
                # Not the layer itself: its hooks are part of graphs.
                x = type(layer).forward(  # type: ignore[assignment]
                    layer, x, attention_mask=mask, position_embeddings=angles, past_key_values=cache
                )
            return x
        answer: Tensor = out
        return answer

    def _call_all(self, hidden_states: Any, **kwargs: Any) -> Any:
        """Stand for all layers in the loop of the model."""
        layers, angles = _layers_of(self), kwargs.get("position_embeddings")
        out: Any = NotImplemented
        if angles is not None and not asks_for_more(kwargs) and _all_fused(layers) and layers[0].takes(hidden_states):
            cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
            if torch.compiler.is_compiling():
                out = self._call_from_graph(layers, hidden_states, angles, mask, cache)
            else:
                out = self._run(hidden_states, angles, mask, cache)
        if out is NotImplemented:
            for layer in layers:
                hidden_states = layer(hidden_states, **kwargs)
            return hidden_states
        return out

    def _run(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Any:
        operands = self._operands()
        if operands is None:
            return NotImplemented
        contents, layers = operands.contents, _layers_of(self)
        reason = why_parts(contents)
        if reason is not None:
            self._report(reason)
            return NotImplemented
        empty, length = contents.constants["empty"], x.shape[1]
        if x.shape[2] != contents.linears[0].in_features or not all(angles_fit(a, x, empty.shape[3]) for a in angles):
            return NotImplemented  # the layers say so
        caches = _held_caches(layers, cache, x.shape[0], operands.places, empty)
        return NotImplemented if caches is None else self._compute(operands, x, angles, mask, caches)

    def _compute(
        self, operands: StackOperands, x: Tensor, angles: tuple[Tensor, Tensor], mask: Any, caches: Sequence[Any]
    ) -> Any:
        first, samples, length, (cosine, sine) = _layers_of(self)[0], x.shape[0], x.shape[1], angles
        causal, empty = mask is None and length > 1, operands.contents.constants["empty"]
        positions = [getattr(held, "cumulative_length", None) for held in caches]
        static = [position for position in positions if position is not None]
        if static:
            keys, values = [held.keys for held in caches], [held.values for held in caches]
            if len(static) != len(caches) or not _alike(keys) or (mask is None and length == 1):
                return NotImplemented
            if not first.takes_mask(mask, samples, length, keys[0].shape[2]):
                return NotImplemented
            out = torch.ops.mono_quant.decoder_layers_static_cache.default(
                operands.held, x, keys, values, static, cosine, sine, mask, causal
            )
            if not isinstance(caches[0], HeldCache):  # whose graph counts the tokens itself
                torch._foreach_add_(static, length)
            return out
        nothing = empty if samples == 1 else empty.expand(samples, -1, -1, -1)
        keys = [nothing if is_empty(held) else held.keys for held in caches]
        values = [nothing if is_empty(held) else held.values for held in caches]
        if not _alike(keys) or not first.takes_mask(mask, samples, length, keys[0].shape[2] + length):
            return NotImplemented
        out, keys, values = torch.ops.mono_quant.decoder_layers.default(
            operands.held, x, keys, values, cosine, sine, mask, causal
        )
        for held, held.keys, held.values in zip(caches, keys, values, strict=True):  # noqa: B020 (meant to assign)
            pass
        return out

    def _call_from_graph(self, layers: Sequence[Any], x: Tensor, angles: Any, mask: Any, cache: Any) -> Any:
        """Answer the output of all layers as one operator of a graph that is being compiled."""
        if not layers[0].is_compiled_whole() or any(m._forward_hooks or m._forward_pre_hooks for m in layers):
            return NotImplemented
        layout: DecoderLayout = layers[0].layout
        empty, places = layout.no_keys(layers[0]), [attribute(layer, layout.layer_index) for layer in layers]
        caches = _held_caches(layers, cache, x.shape[0], places, empty)
        if caches is None:
            return NotImplemented
        cosine, sine = angles
        static = [held for held in caches if getattr(held, "cumulative_length", None) is not None]
        if static:
            positions = [held.cumulative_length for held in static]
            if len(static) != len(caches):
                return NotImplemented
            out = torch.ops.mono_quant.fused_decoder_layers_static_cache.default(
                self.number, x, [c.keys for c in caches], [c.values for c in caches], positions, cosine, sine, mask
            )
            for position in positions:
                position.add_(x.shape[1])
            return out
        filled = [held for held in caches if not is_empty(held)]
        if filled and len(filled) != len(caches):
            return NotImplemented
        past = [c.keys for c in filled], [c.values for c in filled]
        out, keys, values = torch.ops.mono_quant.fused_decoder_layers.default(
            self.number, x, *past, cosine, sine, mask, len(layers), empty.shape[1]
        )
        for i, held in enumerate(caches):
            held.keys, held.values = keys[i], values[i]
        return out

    def _operands(self) -> StackOperands | None:
        found: StackOperands | None = self.__dict__.get(_CACHE)
        layers = _layers_of(self)
        if found is None or found.types != tuple(map(type, layers)) or not found.contents.are_current():
            self.__dict__.pop(_CACHE, None)
            found = self._gather(layers)
            if found is not None:
                self.__dict__[_CACHE] = found
        return found

    def _gather(self, layers: nn.ModuleList) -> StackOperands | None:
        if not len(layers) or not _all_fused(layers):
            return None
        operands = [layer.operands() for layer in layers]
        found = [each for each in operands if each is not None]
        if len(found) < len(layers):
            return None  # the layers have said why
        weights = [tensor for each in found for tensor in each.weights]
        kinds = {_kind(each) for each in found}
        if len(kinds) > 1 or not all(tensor.is_contiguous() for tensor in weights):
            self._report("they are not of one kind")
            return None
        constants = found[0].constants
        eps = [number for each in found for number in each.constants["eps"]]
        _, key_heads, _, depth = constants["empty"].shape
        held = torch.ops.mono_quant.hold_decoder_layers.default(
            weights, constants["heads"], key_heads, depth, constants["scale"], eps, found[0].linears[4].activation
        )
        linears = tuple(linear for each in found for linear in each.linears)
        norms = tuple(norm for each in found for norm in each.norms)
        contents = Operands.of(layers, linears, norms, [], constants)
        places = tuple(each.constants["index"] for each in found)
        stack = StackOperands(held, contents, tuple(map(type, layers)), places)
        finalize(stack, native.release_decoder_layers, held)
        return stack

    def _report(self, reason: str) -> None:
        report_once(f"the layers of a {type(self).__name__} run one by one: {reason}")


class _AllAsOne:
    """What the loop of a model sees instead of its list of layers: whoever asks for all of them gets one."""

    def __init__(self, model: LayerStack) -> None:
        self._model = model
        self._layers = _layers_of(model)

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def __getitem__(self, at: Any) -> Any:
        everything = isinstance(at, slice) and at.start is None and at.step is None
        if everything and (at.stop is None or at.stop >= len(self._layers)):
            return [self._model._call_all]
        return self._layers[at]


def _layers_of(model: LayerStack) -> Any:
    return model._modules[model.stack.layers]


def _seen_layers(model: LayerStack) -> Any:
    """Answer the list of layers, or in the loop of the model one that stands for all."""
    if torch.compiler.is_compiling():
        as_one = not torch.compiler._is_exporting_flag and not model.training
    else:
        as_one = getattr(_running, "model", None) is model
    return _AllAsOne(model) if as_one else _layers_of(model)


def _all_fused(layers: Any) -> bool:
    return all(isinstance(layer, FusedLayer) and isinstance(layer.layout, DecoderLayout) for layer in layers)


def _kind(operands: Operands) -> tuple[Any, ...]:
    constants = operands.constants
    return constants["heads"], constants["empty"].shape, constants["scale"], operands.linears[4].activation


def _alike(keys: Sequence[Tensor]) -> bool:
    length = keys[0].shape[2]
    return all(tensor.shape[2] == length for tensor in keys)


def _held_caches(
    layers: Sequence[Any], cache: Any, samples: int, places: Sequence[int], empty: Tensor
) -> Sequence[Any] | None:
    """Answer for each layer the object that holds its keys and values; ``None`` where one keeps them in another way."""
    if isinstance(cache, list):
        return cache
    layout, caches = layers[0].layout, []
    for layer, place in zip(layers, places, strict=True):
        held = layout.held(layer, cache, samples, place, empty)
        if held is None:
            return None
        caches.append(held)
    return caches


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

    A layer can if all its linear layers are int8 with a weight of their own, its norms are float32, and its activation
    is computed inside the linear layer before (see :func:`mono_quant.modules.fuse_activations`, which comes first).

    Args:
        model: Changed in place.

    Returns:
        The names of the layers that run as one operator now.
    """
    fused = fuse_single_layers(model)
    for module in model.modules():
        layout = _STACKS.get(_name_of(type(module)))
        if layout is None or isinstance(module, LayerStack):
            continue
        if _all_fused(getattr(module, layout.layers)) and layout.refuse(module) is None:
            module.__class__ = _stacked_class(type(module))
            module.__dict__["number"] = number_layer(module)
    return fused


def restore_layers(model: nn.Module) -> None:
    """Give every layer and model in ``model`` that :func:`fuse_layers` has changed its own class back."""
    for module in model.modules():
        if isinstance(module, LayerStack):
            module.__dict__.pop(_CACHE, None)
            module.__dict__.pop("number", None)
            module.__class__ = module.float_type  # type: ignore[assignment]
    restore_single_layers(model)


def _new_model(float_type: type[nn.Module]) -> nn.Module:
    kind = _stacked_class(float_type)
    model: nn.Module = kind.__new__(kind)
    model.__dict__["number"] = number_layer(model)
    return model


def _stacked_class(float_type: type[nn.Module]) -> type[LayerStack]:
    if float_type not in _STACKED:
        layout = _STACKS[_name_of(float_type)]
        body = {"float_type": float_type, "stack": layout, layout.layers: property(_seen_layers)}
        # It keeps its name, which transformers writes into configurations.
        named = {"__module__": float_type.__module__, "__qualname__": float_type.__qualname__}
        made = type(float_type.__name__, (LayerStack, float_type), body | named)
        _STACKED.setdefault(float_type, made)  # of two threads that come here at once, both get the same class
    return _STACKED[float_type]


def _name_of(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
