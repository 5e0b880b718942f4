"""Frees an exported graph of writes by hand, where it holds only functions that are known here.

``ExportedProgram.run_decompositions`` does so for every graph, by tracing it again: that takes longer than the export.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

aten = torch.ops.aten

# Functions that decomposition leaves as they are, and that answer memory of their own.
_FRESH: Final = frozenset(
    {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
        aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.hardswish.default, aten.silu.default,
        aten.sigmoid.default, aten.hardsigmoid.default, aten.gelu.default,
        aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.mean.dim, aten.pad.default,
        aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    }
)  # fmt: skip

# Writes, and what answers the same.
_WRITES: Final = {
    aten.relu_.default: aten.relu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.silu_.default: aten.silu.default,
    aten.add_.Tensor: aten.add.Tensor,
}

# Rewritten below.
_REWRITTEN: Final = frozenset({aten.batch_norm.default, aten.dropout.default, aten.flatten.using_ints})

# The first answer alone is read, and it is fresh.
_NORM: Final = aten._native_batch_norm_legit_no_training.default


def free_of_writes(program: ExportedProgram) -> bool:
    """Rewrite the graph of ``program`` to what ``run_decompositions({})`` would give, if its functions allow that.

    Returns:
        Whether that was done; if not, the graph is as it was.
    """
    graph = program.graph_module.graph
    order = {node: index for index, node in enumerate(graph.nodes)}
    if not all(_is_known(node, order) for node in order):
        return False
    for node in order:
        if node.target in _WRITES:
            node.target = _WRITES[node.target]
            # Who reads the memory afterwards reads what was written.
            _read_later(node, order)
        elif node.target is aten.batch_norm.default:
            _rewrite_norm(graph, node)
        elif node.target is aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.flatten.using_ints:
            _rewrite_flatten(graph, node)
    return True


def _read_later(node: fx.Node, order: dict[fx.Node, int]) -> None:
    written: Any = node.args[0]
    # Nodes that were put in since have no number; they stand where the one they replace stood, and are fresh.
    later = {user for user in written.users if order.get(user, -1) > order[node]}
    written.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _is_known(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if node.target in _WRITES:
        target: Any = node.args[0]
        # Nothing may share the memory: it is fresh, and nobody before took a view of it.
        return (
            not node.kwargs
            and _is_fresh(target)
            and all(order[user] >= order[node] or _is_fresh(user) for user in target.users)
            and target not in node.args[1:]
            and len({source.meta["val"].dtype for source in node.all_input_nodes}) == 1  # nothing is promoted
        )
    if node.target is aten.batch_norm.default:
        return len(node.args) == 9 and not node.kwargs and node.args[5] is False and None not in node.args[3:5]
    if node.target is aten.dropout.default:
        return len(node.args) == 3 and node.args[2] is False
    if node.target is aten.flatten.using_ints:
        return _rest(node) is not None
    return node.target in _FRESH


def _is_fresh(node: Any) -> bool:
    return isinstance(node, fx.Node) and (
        node.target in _FRESH or node.target in _WRITES or node.target is aten.batch_norm.default
    )


def _rest(node: fx.Node) -> list[int] | None:
    """Answer the sizes that are joined, if all but the first dimension are and their sizes are fixed."""
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, Tensor) or node.kwargs or node.args[1:] not in ((1,), (1, -1)):
        return None
    sizes = list(value.shape[1:])
    return sizes if sizes and all(isinstance(size, int) for size in sizes) else None


def _rewrite_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, mean, var, _, momentum, eps, _ = node.args
    with graph.inserting_before(node):
        norm = graph.call_function(_NORM, (x, weight, bias, mean, var, momentum, eps))
        first = graph.call_function(operator.getitem, (norm, 0))
    value = node.meta["val"]
    norm.meta = {**node.meta, "val": (value, value.new_empty(0), value.new_empty(0))}
    first.meta = dict(node.meta)
    node.replace_all_uses_with(first)
    graph.erase_node(node)


def _rewrite_flatten(graph: fx.Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    sizes = _rest(node)
    assert sizes is not None
    batch: Any = source.meta["val"].shape[0]
    with graph.inserting_before(node):
        if not isinstance(batch, int):
            size = graph.call_function(aten.sym_size.int, (source, 0))
            size.meta = {**node.meta, "val": batch}
            batch = size
        view = graph.call_function(aten.view.default, (source, [batch, prod(sizes)]))
    view.meta = dict(node.meta)
    node.replace_all_uses_with(view)
    graph.erase_node(node)
