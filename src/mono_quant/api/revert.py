"""The way back: quantized models to standard float ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor, nn

from mono_quant.api.replace import cast_rest
from mono_quant.api.state_dict import dequantize_state_dict
from mono_quant.errors import InputTypeError
from mono_quant.modules import restore_fused_path, standard_modules


def revert_to_standard_modules(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Answer ``model`` with every quantized layer replaced by its standard one, holding the dequantized weight.

    Args:
        model: A quantized module. Layers reached twice and tied weights stay so.
        inplace: Replace the layers in ``model`` itself instead of in a copy.

    Returns:
        The float model; ``model`` itself (or, if that is a single layer, the new layer) when ``inplace``.

    Raises:
        InputTypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, found {type(model).__name__}")
    standard = standard_modules(model, keep_activations=inplace)
    result = _replace(model, standard) if inplace else copy.deepcopy(model, {**standard})
    restore_fused_path(result)
    return result


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replacements.get(id(child), child)
    return replacements.get(id(model), model)


@overload
def dequantize_model(model: nn.Module, inplace: bool = False) -> nn.Module: ...
@overload
def dequantize_model(model: Mapping[str, Tensor], inplace: bool = False) -> dict[str, Tensor]: ...
def dequantize_model(model: nn.Module | Mapping[str, Tensor], inplace: bool = False) -> nn.Module | dict[str, Tensor]:
    """Answer a float32 model: standard layers with dequantized weights, and everything else in float32 too.

    Args:
        model: A quantized module, or the state dict of one.
        inplace: Work on the module itself instead of on a copy. A state dict is always answered anew.

    Raises:
        InputTypeError: ``model`` is neither.
    """
    if isinstance(model, Mapping):
        return dequantize_state_dict(model)
    result = revert_to_standard_modules(model, inplace)
    cast_rest(result, torch.float32)
    return result
