"""Transposed convolutions as ordinary ones over images with zeros between their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from mono_quant.graph.float_layers import FloatConv
from mono_quant.graph.layers.spatial import spread

aten = torch.ops.aten

#: PyTorch's transposed convolutions, and how many spatial dimensions they have.
TRANSPOSED: Final = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
_ARGUMENTS: Final = ("x", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class TransposedCall:
    """The arguments of a call of a transposed convolution, one number for each spatial dimension."""

    stride: list[int]
    padding: list[int]
    output_padding: list[int]
    dilation: list[int]
    groups: int

    @classmethod
    def of(cls, node: fx.Node) -> TransposedCall:
        """Read the arguments of ``node``, whose target is one of :data:`TRANSPOSED`."""
        dims = TRANSPOSED[node.target]  # type: ignore[index]
        given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs

        def per_dim(name: str, default: int) -> list[int]:
            value = given.get(name, default)
            values = [value] if isinstance(value, int) else list(value)
            return values * dims if len(values) == 1 else values

        return cls(
            per_dim("stride", 1), per_dim("padding", 0), per_dim("output_padding", 0), per_dim("dilation", 1),
            int(given.get("groups", 1)),
        )  # fmt: skip


def convolution_of(call: TransposedCall, weight: Tensor, bias: Tensor | None) -> tuple[FloatConv, list[int]]:
    """Answer the convolution that a transposed one is over a spread image, and the padding of that image.

    With ``stride - 1`` zeros between its pixels and ``dilation * (kernel - 1) - padding`` around, the image is
    convolved with the kernel turned around, step by step (Dumoulin and Visin, "A guide to convolution arithmetic for
    deep learning", 2016).

    Args:
        call: The geometry.
        weight: ``[in channels, out channels / groups, *kernel]``.
        bias: ``[out channels]`` or ``None``.

    Returns:
        A convolution of stride 1, and how many zeros go before and behind the spread image in each dimension, from the
        first to the last; negative numbers cut.
    """
    dims = len(call.stride)
    around = [
        d * (k - 1) - p for d, k, p in zip(call.dilation, weight.shape[2:], call.padding, strict=True)
    ]  # fmt: skip
    inside = min(around) >= 0  # the convolution itself pads
    sides = [(0 if inside else a, (0 if inside else a) + o) for a, o in zip(around, call.output_padding, strict=True)]
    per_group = weight.shape[0] // call.groups
    turned = weight.reshape(call.groups, per_group, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    turned = turned.flip(list(range(2, 2 + dims))).contiguous()
    padding = around if inside else [0] * dims
    conv = FloatConv(turned, bias, [1] * dims, padding, call.dilation, call.groups)
    return conv, [side for pair in sides for side in pair]


def insert_spread(module: fx.GraphModule, node: fx.Node, stride: list[int], sides: list[int]) -> fx.Node:
    """Put a node that spreads the image which ``node`` takes before it; answers what ``node`` is to take."""
    source: Any = node.args[0]
    if all(s == 1 for s in stride) and not any(sides):
        return source  # type: ignore[no-any-return]
    with module.graph.inserting_before(node):
        made = module.graph.call_function(spread, (source, stride, sides))
    example = source.meta["val"]
    made.meta = dict(node.meta)
    with example.fake_mode:
        made.meta["val"] = spread(example, stride, sides)
    return made
