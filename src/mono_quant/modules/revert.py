"""Standard layers for quantized ones: the memo with which a model is copied back to float."""

from __future__ import annotations

import copy

from torch import nn

from mono_quant.modules.base import QuantizedModule
from mono_quant.modules.fusion import FusedActivation


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
