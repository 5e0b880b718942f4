"""Which values of a graph are 8-bit codes: decided before calibration, so that only those are watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from mono_quant.graph.float_layers import FloatLayer, FloatLinear
from mono_quant.graph.fold import layer_of, zero_padding
from mono_quant.graph.fuse import activation_of
from mono_quant.graph.layers.spatial import spread

aten = torch.ops.aten

# Moves and comparisons: right on codes as they are, with the scale of their input.
MOVES: Final = frozenset(
    {
        aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.squeeze.dim,
        aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int,
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
        aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.flip.default,
        aten.upsample_nearest2d.vec, aten.unflatten.int,
    }
)  # fmt: skip

# Functions of one value: a table of 256 codes does them.
TABLES: Final = frozenset(
    {
        aten.relu.default, aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.gelu.default,
        aten.silu.default, aten.hardswish.default, aten.leaky_relu.default, aten.elu.default, aten.softplus.default,
        aten.mish.default, aten.exp.default, aten.abs.default, aten.neg.default, aten.hardtanh.default,
        aten.clamp.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
        aten.pow.Tensor_Scalar, aten.sqrt.default,
    }
)  # fmt: skip

MAX_POOLS: Final = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
AVERAGE_POOLS: Final = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
_ADAPTIVE_POOLS: Final = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
PADS: Final = (aten.pad.default, aten.constant_pad_nd.default)


class Kind:
    """What a node is to an 8-bit graph."""

    INPUT: Final = "input"
    LAYER: Final = "layer"
    MOVE: Final = "move"
    CLAMP: Final = "clamp"
    PAD: Final = "pad"
    SPREAD: Final = "spread"
    AVERAGE_POOL: Final = "average pool"
    MAX_POOL: Final = "max pool"
    GLOBAL_AVERAGE: Final = "global average"
    TABLE: Final = "table"
    ADD: Final = "add"
    MULTIPLY: Final = "multiply"
    CONCATENATE: Final = "concatenate"
    ITEM: Final = "item"
    SIZE: Final = "size"
    FLOAT: Final = "float"


# Kinds whose codes have the scale of their first input.
_KEEPS_SCALE: Final = (Kind.MOVE, Kind.CLAMP, Kind.PAD, Kind.SPREAD, Kind.AVERAGE_POOL, Kind.MAX_POOL, Kind.ITEM)


@dataclass
class Domains:
    """Which values are codes.

    Attributes:
        kinds: What each node is.
        codes: Nodes whose answer is needed as codes.
        owners: Those of them with a scale of their own.
        entries: Nodes whose float answer is turned into codes for a user.
    """

    kinds: dict[fx.Node, str]
    codes: set[fx.Node]
    owners: set[fx.Node]
    entries: set[fx.Node]

    def watched(self) -> set[fx.Node]:
        """Answer the nodes whose values calibration must see."""
        return self.owners | self.entries


def assign_domains(module: fx.GraphModule, skip: frozenset[str], names: dict[fx.Node, str]) -> Domains:
    """Decide for every node whether its answer is codes.

    A value can be codes if its function has an 8-bit form and, apart from layers, all its inputs can; it will be if
    some user wants codes: a layer, a mean, or another step that will work on codes.

    Args:
        module: A folded and fused graph.
        skip: Names of layers that stay in float.
        names: The name of the layer that each node comes from.
    """
    nodes = list(module.graph.nodes)
    kinds = {node: classify(module, node) for node in nodes}
    for node in nodes:
        if kinds[node] == Kind.LAYER and names[node] in skip:
            kinds[node] = Kind.FLOAT
    able: set[fx.Node] = set()
    for node in nodes:
        kind = kinds[node]
        if kind in (Kind.INPUT, Kind.LAYER) or (
            kind not in (Kind.FLOAT, Kind.SIZE, Kind.GLOBAL_AVERAGE)
            and all(source in able for source in tensor_inputs(node, kinds))
        ):
            able.add(node)
    codes: set[fx.Node] = set()
    for node in reversed(nodes):
        if node in able and any(_wants_codes(user, kinds, codes) for user in node.users):
            codes.add(node)
    for node in nodes:
        if kinds[node] == Kind.ITEM and node.args[0] in codes:
            codes.add(node)
    owners = {n for n in codes if kinds[n] not in (*_KEEPS_SCALE, Kind.INPUT)}
    entries = {n for n in codes if kinds[n] == Kind.INPUT}
    for node in nodes:
        if kinds[node] == Kind.LAYER:
            sources = tensor_inputs(node, kinds)
            if isinstance(layer_of(module, node), FloatLinear) and sources[0] not in codes:
                continue  # rows are quantized as they come
            entries.update(source for source in sources if source not in codes)
    return Domains(kinds, codes, owners, entries)


def _wants_codes(user: fx.Node, kinds: dict[fx.Node, str], codes: set[fx.Node]) -> bool:
    return kinds.get(user) in (Kind.LAYER, Kind.GLOBAL_AVERAGE) or user in codes


def tensor_inputs(node: fx.Node, kinds: dict[fx.Node, str]) -> list[fx.Node]:
    """Answer the nodes that a node takes, without sizes."""
    return [source for source in node.all_input_nodes if kinds[source] != Kind.SIZE]


def classify(module: fx.GraphModule, node: fx.Node) -> str:
    """Answer which :class:`Kind` a node is."""
    if node.op == "placeholder":
        value = node.meta.get("val")
        return Kind.INPUT if isinstance(value, Tensor) and value.dtype == torch.float32 else Kind.FLOAT
    if isinstance(layer_of(module, node), FloatLayer):
        return Kind.LAYER
    if node.op != "call_function":
        return Kind.FLOAT
    if not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return Kind.SIZE
    if node.target in MOVES:
        return Kind.MOVE
    activation = activation_of(node)
    if activation is not None and activation.name in ("relu", "clamp"):
        return Kind.CLAMP
    return _classify_function(node)


def _classify_function(node: fx.Node) -> str:
    inputs = node.all_input_nodes
    if getattr(node.target, "__name__", "") == "getitem":
        return Kind.ITEM
    if node.target in PADS and zero_padding(node) is not None:
        return Kind.PAD
    if node.target is spread:
        return Kind.SPREAD
    if node.target in AVERAGE_POOLS:
        return Kind.AVERAGE_POOL
    if node.target in MAX_POOLS:
        return Kind.MAX_POOL
    if _is_global_average(node):
        return Kind.GLOBAL_AVERAGE
    if node.target is aten.cat.default:
        return Kind.CONCATENATE
    if node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs and len(node.args) == 2:
        if all(isinstance(argument, fx.Node) for argument in node.args) and all(_is_float(i) for i in inputs):
            return Kind.ADD if node.target is aten.add.Tensor else Kind.MULTIPLY
        if len(inputs) == 1 and inputs[0] is node.args[0] and _is_float(inputs[0]):
            return Kind.TABLE
        return Kind.FLOAT
    if node.target in TABLES and len(inputs) == 1 and inputs[0] is node.args[0] and _is_float(inputs[0]):
        return Kind.TABLE
    return Kind.FLOAT


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _is_global_average(node: fx.Node) -> bool:
    if node.target in _ADAPTIVE_POOLS:
        sizes: Any = node.args[1]
        return all(size == 1 for size in sizes)
    if node.target is aten.mean.dim and not node.kwargs.get("dtype"):
        source: Any = node.args[0]
        count = source.meta["val"].dim()
        dims: Any = node.args[1]
        return count > 2 and {dim % count for dim in dims} == set(range(2, count))
    return False
