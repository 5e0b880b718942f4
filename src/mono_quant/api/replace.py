"""Puts quantized layers into a model: a copy that shares nothing with the original, or the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.api.selection import Candidate
from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.quantization_info import LayerInfo
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.errors import InputError, MonoQuantError
from mono_quant.modules import QuantizedModule
from mono_quant.report import decibels

#: Called after each layer with the number done, the number in all and the layer's name.
Progress = Callable[[int, int, str], None]

# What a user hung on a layer keeps working on its replacement.
_HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass
class Replacements:
    """Quantized layers and what is known of them.

    Attributes:
        ready: For a layer's name its quantized weight, where an algorithm chose it.
        layers: For each layer's name, its record.
        signal: Sum of squares of all quantized weights.
        noise: Sum of squares of their errors.
    """

    ready: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0
    _weights: dict[tuple[int, LayerScheme], QuantizedTensor | Tensor] = field(default_factory=dict)

    def quantize(self, candidate: Candidate, measure: bool) -> QuantizedModule:
        """Answer the quantized layer of a candidate; tied weights are quantized once and stay tied."""
        module, scheme = candidate.module, candidate.scheme
        # A computed weight (parametrizations) is a new tensor at each reading and is never tied.
        key = (id(module._parameters.get("weight", module)), scheme)
        shared = self._weights.get(key)
        try:
            quantized = self.ready.get(candidate.name) if shared is None else shared
            if quantized is None:
                quantized = candidate.quantized_type.quantize_weight(module, scheme)
            layer = candidate.quantized_type.from_float(module, scheme, quantized)
        except MonoQuantError as error:
            raise type(error)(f"layer {candidate.name!r}: {error.message}", error.suggestion) from error
        self._weights[key] = quantized
        for name in _HOOKS:
            getattr(layer, name).update(getattr(module, name))
        stored = sum(tensor.nbytes for tensor in layer.buffers(recurse=False))
        sqnr = None
        if measure:
            signal, noise = candidate.quantized_type.weight_error(module, quantized)
            sqnr = decibels(signal, noise)
            if shared is None:
                self.signal += signal
                self.noise += noise
        self.layers[candidate.name] = LayerInfo(
            scheme=scheme,
            bytes_before=sum(p.numel() * p.element_size() for p in module.parameters()),
            bytes_after=stored if shared is None else 0,
            sqnr_db=sqnr,
        )
        return layer


def quantize_copy(
    model: nn.Module, chosen: list[Candidate], replacements: Replacements, measure: bool, progress: Progress | None
) -> nn.Module:
    """Answer a copy of ``model`` with the chosen layers quantized; ``model`` is not touched.

    The copy is made around the new layers: the float weights that they replace are never copied.

    Raises:
        InputError: The model holds something that cannot be copied.
        QuantizationError: A layer's weight cannot be quantized; named.
    """
    memo: dict[int, object] = {}
    for done, candidate in enumerate(_smallest_first(chosen), start=1):
        memo[id(candidate.module)] = replacements.quantize(candidate, measure)
        if progress is not None:
            progress(done, len(chosen), candidate.name)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"the model ({type(model).__name__}) cannot be copied: {error}",
            suggestion="Pass inplace=True to quantize the model itself.",
        ) from error


def quantize_inplace(
    model: nn.Module, chosen: list[Candidate], replacements: Replacements, measure: bool, progress: Progress | None
) -> nn.Module:
    """Replace the chosen layers in ``model`` itself; each float weight is free as soon as it is replaced.

    Returns:
        ``model``, or the new layer if ``model`` is itself the layer.
    """
    places = places_of(model)
    result = model
    queue = _smallest_first(chosen)
    total = len(queue)
    chosen.clear()
    while queue:
        candidate = queue.pop(0)
        layer = replacements.quantize(candidate, measure)
        for container, key in places.pop(id(candidate.module), ()):
            container[key] = layer
        if candidate.module is model:
            result = layer
        if progress is not None:
            progress(total - len(queue), total, candidate.name)
    return result


def places_of(model: nn.Module) -> dict[int, list[tuple[Any, Any]]]:
    """Answer by ``id`` where each module is held: as a child, or in a list or dict that is a module's attribute."""
    places: dict[int, list[tuple[Any, Any]]] = {}
    for parent in model.modules():
        for container in vars(parent).values():  # the children's dict is one of them
            if not isinstance(container, list | dict):
                continue
            items = enumerate(container) if isinstance(container, list) else container.items()
            for key, held in items:
                if isinstance(held, nn.Module):
                    places.setdefault(id(held), []).append((container, key))
    return places


def _smallest_first(chosen: list[Candidate]) -> list[Candidate]:
    # In place, small layers first make room for the copy of the largest: that keeps the peak low.
    return sorted(chosen, key=lambda c: c.module.weight.numel())  # type: ignore[operator]


def cast_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what stays in float to ``dtype``: parameters and persistent buffers, and the biases of quantized layers.

    A quantized layer's weight and bias must agree, since some models read and multiply with them.
    Buffers that are not saved with the model, such as tables of rotary frequencies, keep their precision.
    """
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.float_dtype = dtype
            if module.bias is not None:
                module.set_tensor("bias", module.bias.to(dtype))
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
