"""One call of the operator that computes all layers of a decoder."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.modules.call_arguments import cache_in, cache_names
from mono_quant.modules.compiled_layer import HeldCache, layer_of
from mono_quant.modules.decoder_layer import DecoderLayout, angles_fit, is_empty, is_of_type, unknown_argument
from mono_quant.modules.encoder_layer import attribute
from mono_quant.modules.fused_layer import FusedLayer, hooks_of, why_parts
from mono_quant.modules.layer_operands import Operands
from mono_quant.modules.layer_stack import LayerStack, all_fused
from mono_quant.modules.stack_operands import StackOperands, hand_over
from mono_quant.ops import get_backend, native

_UNLIKE: Final = "their caches are of several kinds or hold different numbers of tokens"


class DecoderStack(LayerStack):
    """What a decoder model becomes whose layers can run as one operator.

    Its ``forward`` calls each element of a slice of its layers with hidden states first, and the rest by name.
    """

    layer_layout = DecoderLayout
    goes_by_slices = True
    compiles = True

    def run_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, angles = args[0], kwargs.get("position_embeddings")
        layers = self.all_layers()
        first: Any = layers[0]
        if len(args) > 1 or angles is None or not isinstance(first, FusedLayer):
            return NotImplemented
        if unknown_argument(type(first), kwargs) is not None or not first.takes(x):
            return NotImplemented
        cache, mask = cache_in(type(first), kwargs), kwargs.get("attention_mask")
        if torch.compiler.is_compiling():
            return _call_from_graph(self.number, layers, x, angles, mask, cache)
        return self._run(x, angles, mask, cache)

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
        self.report(out)
        for layer, cache in zip(self.all_layers(), caches, strict=True):
            # Not the layer itself: its hooks are part of graphs.
            named = {cache_names(type(layer))[0]: cache}
            x = type(layer).forward(layer, x, attention_mask=mask, position_embeddings=angles, **named)
        return x

    def gather(self) -> Any:
        return hand_over(self.all_layers(), _sizes, _hold, native.release_decoder_layers)

    def _run(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Any:
        operands = self.operands()
        if operands is None:
            return NotImplemented
        reason = why_parts(operands.contents)
        return reason if reason is not None else _call(self.all_layers(), operands, x, angles, mask, cache)


def _sizes(operands: Operands) -> Hashable:
    empty = operands.constants["empty"]
    return empty.shape, empty.dtype


def _hold(weights: list[Tensor], first: Operands, eps: list[float]) -> int:
    constants = first.constants
    _, key_heads, _, depth = constants["empty"].shape
    held: int = torch.ops.mono_quant.hold_decoder_layers.default(
        weights, constants["heads"], key_heads, depth, constants["scale"], eps, constants["activation"]
    )
    return held


def _call(
    layers: nn.ModuleList, operands: StackOperands, x: Tensor, angles: tuple[Tensor, Tensor], mask: Any, cache: Any
) -> Any:
    """Answer what ``layers`` answer, in one call.

    Args:
        layers: All of them fused.
        operands: Theirs, current.
        x: ``[samples, length, width]``.
        angles: Cosine and sine.
        mask: What the layers would be called with.
        cache: What the layers would be called with, or a list of what holds the keys and values of each.

    Returns:
        Hidden states; why the layers cannot run in one call; or ``NotImplemented`` where a layer says best why.
    """
    first: Any = layers[0]
    empty, samples, length, (cosine, sine) = operands.contents.constants["empty"], x.shape[0], x.shape[1], angles
    if x.shape[2] != operands.contents.linears[0].in_features:
        return NotImplemented  # what is wrong, a layer says best
    if not is_of_type(first, x, empty) or not all(angles_fit(part, x, empty.shape[3]) for part in angles):
        return NotImplemented
    caches = _held_caches(first, cache, samples, operands.places, empty)
    if caches is None:
        return NotImplemented
    causal = mask is None and length > 1
    positions = [held.cumulative_length for held in caches if _counts(held)]
    if positions:
        keys, values = [held.keys for held in caches], [held.values for held in caches]
        if len(positions) < len(caches) or not _alike(keys):
            return _UNLIKE
        if mask is None and length == 1:
            return NotImplemented
        if not first.takes_mask(mask, samples, length, keys[0].shape[2]) or first.adds_mask_of_bools(
            mask, operands.contents
        ):
            return NotImplemented
        operator = torch.ops.mono_quant.decoder_layers_static_cache.default
        out = operands.call(operator, x, keys, values, positions, cosine, sine, mask, causal)
        if isinstance(out, Tensor) and not isinstance(caches[0], HeldCache):  # whose graph counts the tokens itself
            torch._foreach_add_(positions, length)
        return out
    nothing = empty if samples == 1 else empty.expand(samples, -1, -1, -1)
    keys = [nothing if is_empty(held) else held.keys for held in caches]
    values = [nothing if is_empty(held) else held.values for held in caches]
    if not _alike(keys):
        return _UNLIKE
    if not first.takes_mask(mask, samples, length, keys[0].shape[2] + length) or first.adds_mask_of_bools(
        mask, operands.contents
    ):
        return NotImplemented
    answer = operands.call(torch.ops.mono_quant.decoder_layers.default, x, keys, values, cosine, sine, mask, causal)
    if not isinstance(answer, tuple):
        return answer
    out, keys, values = answer
    _keep(caches, keys, values)
    return out


def _call_from_graph(
    number: int, layers: nn.ModuleList, x: Tensor, angles: tuple[Tensor, Tensor], mask: Any, cache: Any
) -> Any:
    """Answer the output of ``layers`` as one operator of a graph that is being compiled.

    The graph knows them by ``number``. What else may be answered: see :func:`_call`.
    """
    first: Any = layers[0]
    places = _places_in_graphs(number)
    if not first.is_compiled_whole() or places is None:
        return NotImplemented
    if isinstance(places, str):
        return places
    empty = first.layout.no_keys(first)
    if not is_of_type(first, x, empty):
        return NotImplemented
    caches = _held_caches(first, cache, x.shape[0], places, empty)
    if caches is None:
        return NotImplemented
    cosine, sine = angles
    positions = [held.cumulative_length for held in caches if _counts(held)]
    filled = [held for held in caches if not is_empty(held)]
    past = [held.keys for held in filled], [held.values for held in filled]
    if len(positions) not in (0, len(caches)) or len(filled) not in (0, len(caches)):
        return _UNLIKE
    if positions:
        out = torch.ops.mono_quant.fused_decoder_layers_static_cache.default(
            number, x, *past, positions, cosine, sine, mask
        )
        for position in positions:
            position.add_(x.shape[1])
        return out
    out, keys, values = torch.ops.mono_quant.fused_decoder_layers.default(
        number, x, *past, cosine, sine, mask, len(places), empty.shape[1]
    )
    _keep(caches, keys, values)
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _places_in_graphs(number: int) -> tuple[int, ...] | str | None:
    """Answer the layers' places in a cache, why they are called one by one, or ``None`` where one no longer runs whole.

    Hooks of layers become part of the graph.

    A constant: a graph that saw each layer itself would look at each again in every call. What changes later is found
    by the operator.
    """
    layers = layer_of(number).all_layers()  # type: ignore[operator]
    if not all_fused(layers, DecoderLayout):
        return None
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks:
            return hooks_of(layer)
    return tuple(int(attribute(layer, layer.layout.layer_index)) for layer in layers)


def _held_caches(first: Any, cache: Any, samples: int, places: Sequence[int], empty: Tensor) -> Sequence[Any] | None:
    """Answer for each layer the object that holds its keys and values; ``None`` where one keeps them in another way."""
    if isinstance(cache, list):
        return cache
    caches = []
    for place in places:
        held = first.layout.held(first, cache, samples, place, empty)
        if held is None:
            return None
        caches.append(held)
    return caches


def _keep(caches: Sequence[Any], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for held, grown_keys, grown_values in zip(caches, keys, values, strict=True):
        held.keys, held.values = grown_keys, grown_values


def _counts(held: Any) -> bool:
    """Say whether ``held`` has room for all tokens and counts those that are there."""
    return getattr(held, "cumulative_length", None) is not None


def _alike(keys: Sequence[Tensor]) -> bool:
    length = keys[0].shape[2]
    return all(tensor.shape[2] == length for tensor in keys)
