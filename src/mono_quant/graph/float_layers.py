"""Layers of the folded float graph: what is calibrated, and what 8-bit layers are made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant.graph.arithmetic import Activation

_CONVS: Final[tuple[Callable[..., Tensor], ...]] = (F.conv1d, F.conv2d, F.conv3d)


class FloatLayer(nn.Module):
    """A layer with a weight, an optional sum and an activation.

    Attributes:
        weight: Output channels first.
        bias: ``[O]`` or ``None``.
        activation: Applied last.
        adds: Whether a second input is added before the activation.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.activation = Activation()
        self.adds = False

    def scale_outputs(self, factor: Tensor, shift: Tensor) -> None:
        """Let the layer answer ``factor * y + shift`` for each output channel; float64 in between."""
        shape = (-1, *[1] * (self.weight.dim() - 1))
        dtype = self.weight.dtype
        bias = shift if self.bias is None else self.bias.double() * factor + shift
        self.weight = (self.weight.double() * factor.reshape(shape)).to(dtype)
        self.bias = bias.to(dtype)

    def finish(self, y: Tensor, other: Tensor | None) -> Tensor:
        """Add and activate, into the memory of ``y`` where that can be: fresh pages cost more than the arithmetic."""
        if other is not None:
            y.add_(other)
        match self.activation.name:
            case "relu":
                return y.relu_()
            case "clamp":
                return y.clamp_(self.activation.low, self.activation.high)
        return self.activation(y)


class FloatConv(FloatLayer):
    """A convolution of one to three spatial dimensions; see :class:`torch.nn.Conv2d` for the geometry."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> None:
        super().__init__(weight, bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        convolve = _CONVS[len(self.stride) - 1]
        y = convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.finish(y, other)


class FloatLinear(FloatLayer):
    """A linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(F.linear(x, self.weight, self.bias), None)


def channel_axis(layer: FloatLayer | None) -> int:
    """Answer the dimension of a layer's input that holds the channels."""
    return -1 if isinstance(layer, FloatLinear) else 1
