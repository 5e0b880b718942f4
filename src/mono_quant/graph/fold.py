"""Brings a captured graph to convolutions and linears with everything folded in that changes nothing at run time."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx

from mono_quant.graph.float_layers import FloatConv, FloatLayer, FloatLinear
from mono_quant.graph.transposed import TRANSPOSED, TransposedCall, convolution_of, insert_spread

aten = torch.ops.aten

_CONVS: Final = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
# Copies that mean nothing once every step answers memory of its own.
_COPIES: Final = (
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.feature_dropout.default,
)
_PADS: Final = (aten.pad.default, aten.constant_pad_nd.default)


def fold(module: fx.GraphModule) -> None:
    """Rewrite ``module`` in place.

    Convolutions and linears become :class:`FloatLayer` modules; batch norms are folded into the layer before them, or
    become a convolution of one tap for each channel; zero padding goes into the convolution that follows; copies go.
    """
    _drop_copies(module.graph)
    _make_layers(module)
    _fold_batch_norms(module)
    _fold_padding(module)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """Answer the tensor of a node that reads one of the model's tensors; ``None`` for any other."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = getattr(module, str(node.target))
        return value if isinstance(value, Tensor) else None
    return None


def layer_of(module: fx.GraphModule, node: Any) -> FloatLayer | None:
    """Answer the layer that a node calls; ``None`` if it calls none."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return layer if isinstance(layer, FloatLayer) else None
    return None


def replace_by_layer(module: fx.GraphModule, node: fx.Node, layer: FloatLayer, *inputs: Any) -> fx.Node:
    """Put a call of ``layer`` in the place of ``node``."""
    name = f"layer_{node.name}"
    module.add_module(name, layer)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(name, inputs)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)
    return call


def _drop_copies(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _COPIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # A view asks for strides that a channels-last tensor does not have.
            node.target = aten.reshape.default


def _make_layers(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        layer: FloatLayer | None = None
        if node.target in _CONVS:
            layer = _conv(module, node, _CONVS[node.target])
        elif node.target in TRANSPOSED:
            layer = _transposed(module, node)
        elif node.target is aten.linear.default:
            weight, bias = (constant(module, a) for a in (*node.args[1:], None)[:2])
            if weight is not None and weight.dim() == 2 and (bias is not None or node.args[2:] in ((), (None,))):
                layer = FloatLinear(weight, bias)
        if layer is not None and layer.weight.dtype == torch.float32:
            replace_by_layer(module, node, layer, node.args[0])


def _conv(module: fx.GraphModule, node: fx.Node, dims: int) -> FloatConv | None:
    given = dict(zip(("x", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False))
    given |= node.kwargs
    weight, bias = constant(module, given["weight"]), constant(module, given.get("bias"))
    if weight is None or (bias is None and given.get("bias") is not None):
        return None
    if len(node.args[0].meta["val"].shape) != dims + 2:  # type: ignore[union-attr]
        return None  # a single sample without a batch dimension
    stride, dilation = (_per_dim(given.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(r % 2 for r in reach):
            _insert_padding(module, node, reach)
            padding = 0
        else:
            padding = [r // 2 for r in reach]
    groups = given.get("groups", 1)
    assert isinstance(groups, int)
    return FloatConv(weight, bias, stride, _per_dim(padding, dims), dilation, groups)


def _transposed(module: fx.GraphModule, node: fx.Node) -> FloatConv | None:
    weight, bias = (constant(module, a) for a in (*node.args[1:], None)[:2])
    if weight is None or weight.dtype != torch.float32 or (bias is None and node.args[2:3] not in ((), (None,))):
        return None
    if len(node.args[0].meta["val"].shape) != TRANSPOSED[node.target] + 2:  # type: ignore[union-attr,index]
        return None  # a single sample without a batch dimension
    call = TransposedCall.of(node)
    conv, sides = convolution_of(call, weight, bias)
    node.args = (insert_spread(module, node, call.stride, sides), *node.args[1:])
    return conv


def _per_dim(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _insert_padding(module: fx.GraphModule, node: fx.Node, reach: list[int]) -> None:
    sides = [side for r in reversed(reach) for side in (r // 2, r - r // 2)]
    with module.graph.inserting_before(node):
        padded = module.graph.call_function(aten.constant_pad_nd.default, (node.args[0], sides, 0.0))
    padded.meta = dict(node.meta) | {"val": node.args[0].meta["val"]}  # type: ignore[union-attr]
    node.args = (padded, *node.args[1:])


def _fold_batch_norms(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        x, weight, bias, mean, var, _, epsilon = node.args
        parts = [constant(module, value) for value in (weight, bias, mean, var)]
        uses = list(node.users)
        if parts[2] is None or parts[3] is None or any(use.args[1:] != (0,) for use in uses):
            continue
        scale = torch.ones_like(parts[2]) if parts[0] is None else parts[0]
        factor = scale.double() / (parts[3].double() + epsilon).sqrt()
        shift = (0.0 if parts[1] is None else parts[1].double()) - parts[2].double() * factor
        layer = layer_of(module, x)
        if layer is not None and len(x.users) == 1 and (isinstance(layer, FloatConv) or len(x.meta["val"].shape) == 2):
            layer.scale_outputs(factor, shift)
            replacement = x
        else:
            dims = len(x.meta["val"].shape) - 2
            if dims not in (1, 2, 3) or parts[2].dtype != torch.float32:
                continue
            channels = len(parts[2])
            taps = factor.float().reshape(channels, *[1] * (dims + 1))
            single = FloatConv(taps, shift.float(), [1] * dims, [0] * dims, [1] * dims, channels)
            replacement = replace_by_layer(module, uses[0], single, x) if uses else x
            uses = uses[1:]
        for use in uses:
            use.replace_all_uses_with(replacement)
            module.graph.erase_node(use)
        module.graph.erase_node(node)


def _fold_padding(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        layer = layer_of(module, node)
        source = node.args[0] if node.args else None
        if not isinstance(layer, FloatConv) or not isinstance(source, fx.Node) or source.target not in _PADS:
            continue
        pads = zero_padding(source)
        dims = len(layer.stride)
        if pads is None or len(pads) > 2 * dims or pads[::2] != pads[1::2] or min(pads) < 0:
            continue
        per_dim = list(reversed(pads[::2]))
        per_dim = [0] * (dims - len(per_dim)) + per_dim
        layer.padding = [p + q for p, q in zip(layer.padding, per_dim, strict=True)]
        node.args = (source.args[0], *node.args[1:])


def zero_padding(node: fx.Node) -> list[int] | None:
    """Answer the sizes of a node that pads with zeros; ``None`` if it pads otherwise or with sizes that vary."""
    pads = node.args[1]
    if not isinstance(pads, list | tuple) or not all(isinstance(p, int) for p in pads):
        return None
    if node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else "constant"
        value = node.args[3] if len(node.args) > 3 else None
    else:
        mode, value = "constant", node.args[2] if len(node.args) > 2 else 0
    return [int(p) for p in pads] if mode == "constant" and value in (0, 0.0, None) else None  # type: ignore[arg-type]
