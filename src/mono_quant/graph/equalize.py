"""Cross-layer equalization: balance the weight ranges of successive layers without changing what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mono_quant.graph.float_layers import FloatConv, FloatLayer
from mono_quant.graph.fold import layer_of

# Functions that commute with scaling by a positive number.
_HOMOGENEOUS = ("none", "relu")

# A channel that is nearly dead in one layer would otherwise ask for an endless factor.
_LARGEST_FACTOR = 1e4


def equalize(module: fx.GraphModule, rounds: int = 3) -> list[tuple[str, str]]:
    """Scale each channel between two layers so that its weights have the same range on both sides.

    For a channel with range ``r1`` in the first layer and ``r2`` in the second, the factor is ``sqrt(r1 / r2)``
    (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019). Pairs qualify if the
    first layer feeds only the second, adds nothing, and applies nothing but ReLU.

    Args:
        module: A folded and fused graph, changed in place.
        rounds: Passes over all pairs, which influence each other in chains.

    Returns:
        The names of the nodes of each pair.
    """
    pairs = [
        (source, node)
        for node in module.graph.nodes
        if layer_of(module, node) is not None and _qualifies(module, source := node.args[0])
    ]
    for _ in range(rounds):
        for first, second in pairs:
            before, after = layer_of(module, first), layer_of(module, second)
            assert before is not None
            assert after is not None
            _balance(before, after)
    return [(first.name, second.name) for first, second in pairs]


def _qualifies(module: fx.GraphModule, source: object) -> bool:
    layer = layer_of(module, source)
    return (
        layer is not None
        and isinstance(source, fx.Node)
        and len(source.users) == 1
        and not layer.adds
        and layer.activation.name in _HOMOGENEOUS
    )


def _balance(first: FloatLayer, second: FloatLayer) -> None:
    r1 = first.weight.detach().flatten(1).abs().amax(1).double()
    by_input = _by_input_channel(second)
    r2 = by_input.abs().amax(1).double()
    usable = (r1 > 0) & (r2 > 0)
    factor = torch.where(usable, (r1 / r2.clamp(min=1e-30)).sqrt(), 1.0).clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    first.scale_outputs(1 / factor, torch.zeros_like(factor))
    groups = second.groups if isinstance(second, FloatConv) else 1
    per_group = factor.reshape(groups, 1, -1).expand(-1, second.weight.shape[0] // groups, -1).flatten(0, 1)
    shape = (*per_group.shape, *[1] * (second.weight.dim() - 2))
    second.weight = (second.weight.detach().double() * per_group.reshape(shape)).to(second.weight.dtype)


def _by_input_channel(layer: FloatLayer) -> Tensor:
    """Answer the weights that read each input channel, ``[C, n]``."""
    groups = layer.groups if isinstance(layer, FloatConv) else 1
    weight = layer.weight.detach().flatten(2) if layer.weight.dim() > 2 else layer.weight.detach().unsqueeze(2)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(2).flatten(0, 1)
