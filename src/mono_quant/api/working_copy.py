"""A private copy of a model in which layers change their formats in no time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from mono_quant.api.formats import BFLOAT16, FLOAT, INT8, Assignment, Unit, uniform_assignment
from mono_quant.api.replace import Replacements, places_of
from mono_quant.calibration import evaluating
from mono_quant.errors import InputError
from mono_quant.modules import (
    FusedActivation,
    disable_fused_path,
    fuse_activations,
    fuse_layers,
    fused_pairs,
    mark_layers_that_share,
    restore_activations,
    restore_fused_path,
    restore_layers,
)
from mono_quant.report import model_bytes


class WorkingCopy:
    """A copy of a model that shares nothing with it, and its layers in all formats, each quantized once.

    Args:
        model: Not modified.
        units: Its layers; their modules are those of ``model``.

    Raises:
        InputError: The model holds something that cannot be copied.
        QuantizationError: A weight is not finite; its layer is named.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        try:
            self._root = copy.deepcopy(model)
        except Exception as error:
            raise InputError(f"the model ({type(model).__name__}) cannot be copied: {error}") from error
        self.units = tuple(units)
        for parameter in self._root.parameters():
            # No gradient is ever taken with respect to weights.
            parameter.requires_grad_(False)
        names = {name for unit in units for name in unit.layers}
        self._floats = {name: module for name, module in self._root.named_modules() if name in names}
        places = places_of(self._root)
        self._places = {name: places.get(id(module), []) for name, module in self._floats.items()}
        self._layers: dict[tuple[str, str], nn.Module] = {}
        self._float_bytes = self._prepare_float_bytes()
        self._bytes: dict[tuple[str, str], int] = {}
        for unit in units:
            for name in unit.formats:
                self._quantize(unit, name)
        self._current: dict[str, str] = {unit.name: FLOAT for unit in units}
        self._parameters = self._parameter_states()
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in self._root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _quantize(self, unit: Unit, name: str) -> None:
        replacements = Replacements()
        layers = []
        for candidate in unit.formats[name]:
            module = self._floats[candidate.name]
            layer = replacements.quantize(replace(candidate, module=module), measure=False).eval()
            self._layers[candidate.name, name] = layer
            layers.append(layer)
        self._bytes[unit.name, name] = model_bytes(nn.ModuleList(layers)) + self._float_bytes[unit.name][1]

    def _prepare_float_bytes(self) -> dict[str, tuple[int, int]]:
        """Answer for each unit the bytes that it holds in float, and those of them that others hold too."""
        owned = {id(module): unit.name for unit in self.units for module in (self._floats[n] for n in unit.layers)}
        elsewhere: set[int] = set()
        for module in self._root.modules():
            if id(module) not in owned:
                elsewhere.update(id(parameter) for parameter in module.parameters(recurse=False))
        result = {}
        for unit in self.units:
            held = {id(p): p for name in unit.layers for p in self._floats[name].parameters()}
            shared = sum(p.nbytes for key, p in held.items() if key in elsewhere)
            result[unit.name] = (sum(p.nbytes for p in held.values()), shared)
        return result

    @property
    def model(self) -> nn.Module:
        """The copy with every layer in float."""
        return self._root

    @property
    def layer_names(self) -> list[str]:
        """The names of all layers that change their formats, in the model's order."""
        return list(self._floats)

    def fused_activations(self) -> dict[str, nn.Module]:
        """Answer for each linear layer that can compute the activation after it, that activation."""
        found: dict[str, nn.Module] = {}
        for name in (INT8, BFLOAT16):
            with self.using(uniform_assignment(self.units, name), fuse=True) as model:
                for activation, layer in fused_pairs(model).items():
                    placed = model.get_submodule(activation)
                    assert isinstance(placed, FusedActivation)
                    found[layer] = placed.activation
        return found

    def unit_bytes(self, unit: Unit, name: str) -> int:
        """Answer what the layers of ``unit`` add to the model's bytes in a format."""
        return self._float_bytes[unit.name][0] if name == FLOAT else self._bytes[unit.name, name]

    def layer(self, layer: str, name: str) -> nn.Module:
        """Answer a layer in a format."""
        return self._floats[layer] if name == FLOAT else self._layers[layer, name]

    @contextmanager
    def using(self, assignment: Assignment, fuse: bool = False) -> Iterator[nn.Module]:
        """Answer the copy with each unit in its format, in evaluation mode without gradients, for a ``with`` block.

        Args:
            assignment: For each unit's name its format.
            fuse: Let int8 linear layers compute the activations that follow them.
        """
        model = self._place(assignment)
        mark_layers_that_share(model)
        if fuse:
            fuse_activations(model)
            fuse_layers(model)
        disable_fused_path(model)
        try:
            with evaluating(model):
                yield model
        finally:
            restore_layers(model)
            restore_activations(model)
            self._place({unit.name: FLOAT for unit in self.units})
            restore_fused_path(self._root)
            self._restore_buffers()

    def _place(self, assignment: Assignment) -> nn.Module:
        model = self._root
        for unit in self.units:
            wanted = assignment[unit.name]
            for name in unit.layers:
                layer = self.layer(name, wanted)
                if self._floats[name] is self._root:
                    model = layer
                if wanted != self._current[unit.name]:
                    for container, key in self._places[name]:
                        container[key] = layer
            self._current[unit.name] = wanted
        return model

    def changed_parameter(self) -> str | None:
        """Answer the name of a float parameter that was changed since the copy was made, ``None`` if there is none."""
        now = self._parameter_states()
        changed = [name for name in now.keys() | self._parameters.keys() if now.get(name) != self._parameters.get(name)]
        return min(changed, default=None)

    def _parameter_states(self) -> dict[str, tuple[int, int, torch.dtype]]:
        return {name: (p.data_ptr(), p._version, p.dtype) for name, p in self._root.named_parameters()}

    def _restore_buffers(self) -> None:
        # Running statistics change where someone calls train(): the next run must not see that.
        # By their values: batch normalisation does not count what it changes in them.
        for module, name, buffer, value in self._buffers:
            if module._buffers.get(name) is not buffer or not torch.equal(buffer, value):
                module._buffers[name] = buffer
                with torch.inference_mode(False), torch.no_grad():
                    buffer.copy_(value)
