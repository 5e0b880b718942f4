"""Lets convolutions and linears add and activate on their way out."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from mono_quant.graph.arithmetic import Activation
from mono_quant.graph.float_layers import FloatConv
from mono_quant.graph.fold import layer_of, replace_by_layer

aten = torch.ops.aten

_SIMPLE: Final = {
    aten.relu.default: Activation("relu"),
    aten.relu6.default: Activation("clamp", 0.0, 6.0),
    aten.hardswish.default: Activation("hardswish"),
    aten.silu.default: Activation("silu"),
}

# What can follow an addition inside one layer: functions that only clamp.
_AFTER_ADDITION: Final = ("relu", "clamp")


def fuse(module: fx.GraphModule) -> None:
    """Rewrite ``module`` in place: additions go into a convolution that feeds them, activations into their layer."""
    _fuse_activations(module)
    _fuse_additions(module)
    _fuse_activations(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def activation_of(node: fx.Node) -> Activation | None:
    """Answer the activation that a node applies, or ``None`` if it is none that layers know."""
    if node.op != "call_function":
        return None
    if node.target in _SIMPLE:
        return _SIMPLE[node.target]
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        default = (-1.0, 1.0) if node.target is aten.hardtanh.default else (None, None)
        bounds: list[Any] = [*node.args[1:], *default[len(node.args) - 1 :]]
        low = node.kwargs.get("min", node.kwargs.get("min_val", bounds[0]))
        high = node.kwargs.get("max", node.kwargs.get("max_val", bounds[1]))
        if low == 0 and high is None:
            return Activation("relu")
        # Bounds that leave zero outside would move the code of zero.
        if isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 < high:
            return Activation("clamp", float(low), float(high))
    return None


def _fuse_activations(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        activation = activation_of(node)
        layer = layer_of(module, node.args[0]) if activation is not None else None
        if activation is None or layer is None or layer.activation.name != "none":
            continue
        if len(node.args[0].users) > 1 or (layer.adds and activation.name not in _AFTER_ADDITION):
            continue
        layer.activation = activation
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)


def _fuse_additions(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        first, second = node.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            continue
        if _shape(first) != _shape(second) or _shape(first) != _shape(node):
            continue
        order = {n: i for i, n in enumerate(module.graph.nodes)}
        # The later of two candidates: the other's answer is then there when it runs.
        for conv, other in sorted(((first, second), (second, first)), key=lambda pair: -order[pair[0]]):
            layer = layer_of(module, conv)
            if (
                isinstance(layer, FloatConv)
                and len(layer.stride) == 2
                and layer.activation.name == "none"
                and not layer.adds
                and len(conv.users) == 1
            ):
                layer.adds = True
                call = replace_by_layer(module, node, layer, conv.args[0], other)
                call.meta = dict(conv.meta) | {"val": conv.meta["val"]}
                module.graph.erase_node(conv)
                break


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    # Symbolic sizes are compared as text: comparing them as numbers would fix them.
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else f"none of {node.name}"
