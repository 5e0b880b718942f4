"""The way back to float32, for models and state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor, nn

from mono_quant.api.replace import cast_rest
from mono_quant.api.state_dict import dequantize_state_dict
from mono_quant.modules import revert_to_standard_modules


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
