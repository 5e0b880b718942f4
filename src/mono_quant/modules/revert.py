"""The way back: standard layers in the place of quantized ones."""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

from torch import nn

from mono_quant.errors import InputTypeError
from mono_quant.modules.base import QuantizedModule
from mono_quant.modules.exchanged_class import restore_layers
from mono_quant.modules.fusion import FusedActivation
from mono_quant.modules.transformer import restore_fused_path


@runtime_checkable
class Revertible(Protocol):
    """A module of another part of the library that stands in for a standard layer."""

    def to_float(self) -> nn.Module:
        """Answer the standard layer; this one is not modified."""
        ...


def revert_to_standard_modules(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Answer ``model`` with every quantized layer replaced by its standard one, holding the dequantized weight.

    Args:
        model: A quantized module. Layers reached twice and tied weights stay so.
        inplace: Replace the layers in ``model`` itself instead of in a copy.

    Returns:
        The float model; ``model`` itself (or, if that is a single layer, the new layer) when ``inplace``.

    Raises:
        InputTypeError: ``model`` is not a module.
        InputError: A part of it has no standard layers to go back to, as static graphs have none.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, found {type(model).__name__}")
    standard = standard_modules(model, keep_activations=inplace)
    result = _replace(model, standard) if inplace else copy.deepcopy(model, {**standard})
    restore_layers(result)
    restore_fused_path(result)
    return result


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replacements.get(id(child), child)
    return replacements.get(id(model), model)


def standard_modules(model: nn.Module, keep_activations: bool = False) -> dict[int, nn.Module]:
    """Answer by ``id`` what stands in a float model for each quantized layer and fused activation of ``model``.

    Args:
        model: A quantized module; not changed.
        keep_activations: Answer the fused activations' original modules themselves, instead of copies.

    Returns:
        Layers with dequantized weights, tied where the quantized ones are, and activation modules.
    """
    found: dict[int, nn.Module] = {}
    tied: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            found[id(module)] = _standard_layer(module, tied)
        elif isinstance(module, Revertible):
            found[id(module)] = module.to_float()
        elif isinstance(module, FusedActivation):
            found[id(module)] = module.activation if keep_activations else copy.deepcopy(module.activation)
    return found


def _standard_layer(module: QuantizedModule, tied: dict[int, nn.Parameter]) -> nn.Module:
    layer = module.to_float()
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    # Layers with tied weights hold one and the same tensor; one that is packed into tiles shares it with nobody.
    stored = module._buffers.get("weight")
    layer.weight = weight if stored is None else tied.setdefault(id(stored), weight)
    return layer
