"""One call of the operator that computes all layers of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import finalize

import torch
from torch import Tensor, nn

from mono_quant.modules.compiled_layer import HeldCache, layer_of
from mono_quant.modules.decoder_layer import DecoderLayout, angles_fit, is_empty, is_of_type
from mono_quant.modules.encoder_layer import attribute
from mono_quant.modules.fused_layer import FusedLayer, hooks_of
from mono_quant.modules.layer_operands import Operands
from mono_quant.ops import native

_UNLIKE: Final = "their caches are of several kinds or hold different numbers of tokens"


@dataclass(frozen=True, eq=False)
class StackOperands:
    """The layers' operands as they were when the native library was handed their weights.

    Attributes:
        layers: The list of them, which others may have taken the place of since.
        held: The number by which the library knows them, until these operands are gone.
        contents: By what to tell whether they are still the model's.
        types: The classes of the layers.
        places: The layers' places in a cache.
    """

    layers: nn.ModuleList
    held: int
    contents: Operands
    types: tuple[type[nn.Module], ...]
    places: tuple[int, ...]

    def are_current(self, layers: nn.ModuleList) -> bool:
        """Say whether no layer, no module in one, no tensor and no setting has been replaced since."""
        return layers is self.layers and self.types == tuple(map(type, layers)) and self.contents.are_current()


def all_fused(layers: Any) -> bool:
    """Say whether each of ``layers`` is a decoder layer that can run as one operator."""
    return all(isinstance(layer, FusedLayer) and isinstance(layer.layout, DecoderLayout) for layer in layers)


def gather_stack(layers: nn.ModuleList) -> Any:
    """Hand the weights of ``layers``, all of them fused, to the native library.

    Returns:
        The operands (:class:`StackOperands`); why the layers cannot run in one call; or ``NotImplemented`` where a
        layer has said so itself.
    """
    found: list[Operands] = []
    for layer in layers:
        operands = layer.operands()  # type: ignore[operator]
        if operands is None:
            return NotImplemented
        found.append(operands)
    weights = [tensor for each in found for tensor in each.weights]
    if len({_kind(each) for each in found}) > 1:
        return "their heads, activations or dtypes are of several kinds"
    if not all(tensor.is_contiguous() for tensor in weights):
        return "a weight is not contiguous"
    constants = found[0].constants
    eps = [number for each in found for number in each.constants["eps"]]
    _, key_heads, _, depth = constants["empty"].shape
    held = torch.ops.mono_quant.hold_decoder_layers.default(
        weights, constants["heads"], key_heads, depth, constants["scale"], eps, constants["activation"]
    )
    linears = tuple(linear for each in found for linear in each.linears)
    norms = tuple(norm for each in found for norm in each.norms)
    settings = tuple(setting for each in found for setting in each.settings)
    contents = Operands.of(layers, linears, norms, [], constants, settings)
    places = tuple(each.constants["index"] for each in found)
    stack = StackOperands(layers, held, contents, tuple(map(type, layers)), places)
    finalize(stack, native.release_decoder_layers, held)
    return stack


def call_stack(
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
        if not first.takes_mask(mask, samples, length, keys[0].shape[2]):
            return NotImplemented
        out = torch.ops.mono_quant.decoder_layers_static_cache.default(
            operands.held, x, keys, values, positions, cosine, sine, mask, causal
        )
        if not isinstance(caches[0], HeldCache):  # whose graph counts the tokens itself
            torch._foreach_add_(positions, length)
        return out
    nothing = empty if samples == 1 else empty.expand(samples, -1, -1, -1)
    keys = [nothing if is_empty(held) else held.keys for held in caches]
    values = [nothing if is_empty(held) else held.values for held in caches]
    if not _alike(keys):
        return _UNLIKE
    if not first.takes_mask(mask, samples, length, keys[0].shape[2] + length):
        return NotImplemented
    out, keys, values = torch.ops.mono_quant.decoder_layers.default(
        operands.held, x, keys, values, cosine, sine, mask, causal
    )
    _keep(caches, keys, values)
    return out


def call_stack_from_graph(
    number: int, layers: nn.ModuleList, x: Tensor, angles: tuple[Tensor, Tensor], mask: Any, cache: Any
) -> Any:
    """Answer the output of ``layers`` as one operator of a graph that is being compiled.

    The graph knows them by ``number``. What else may be answered: see :func:`call_stack`.
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
    if not all_fused(layers):
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


def _kind(operands: Operands) -> tuple[Any, ...]:
    constants = operands.constants
    empty = constants["empty"]
    return constants["heads"], empty.shape, empty.dtype, constants["scale"], constants["activation"]


def _alike(keys: Sequence[Tensor]) -> bool:
    length = keys[0].shape[2]
    return all(tensor.shape[2] == length for tensor in keys)
