"""Small models and their quantized twins, made without the API."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from mono_quant.core import LayerScheme
from mono_quant.core.layer_scheme import FLOAT16, INT8_DYNAMIC, WEIGHT_ONLY
from mono_quant.modules import counterpart_for_scheme

SCHEMES = {
    "int8": LayerScheme(INT8_DYNAMIC),
    "int8 asymmetric": LayerScheme(INT8_DYNAMIC, symmetric=False),
    "int4": LayerScheme(WEIGHT_ONLY, bits=4, group_size=32),
    "int4 asymmetric": LayerScheme(WEIGHT_ONLY, bits=4, group_size=16, symmetric=False),
    "int8 weights": LayerScheme(WEIGHT_ONLY, bits=8),
    "float16": LayerScheme(FLOAT16, bits=16),
}


def network() -> nn.Sequential:
    """Answer a float model with a layer that stays in float and one nested layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Sequential(nn.Linear(64, 64), nn.Tanh()), nn.Linear(64, 8)
    ).eval()


def quantized(model: nn.Module, scheme: LayerScheme, choose: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """Answer a copy of ``model`` with its chosen linear layers quantized."""
    result = copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        layer_type = counterpart_for_scheme(module, scheme)
        if layer_type is None or not isinstance(module, nn.Linear) or not choose(name):
            continue
        layer = layer_type.from_float(module, scheme)
        parent, _, child = name.rpartition(".")
        if name:
            setattr(result.get_submodule(parent), child, layer)
        else:
            result = layer
    return result
