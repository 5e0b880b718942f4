"""Gradients with respect to the inputs of quantized layers, by the straight-through convention.

The rounding of inputs has no useful derivative: it is zero almost everywhere. As is usual (Bengio et al., "Estimating
or propagating gradients through stochastic neurons", 2013) it counts as the identity, so that a layer passes on the
gradient of the float layer with the dequantized weight, ``grad_x = grad_y @ W``. A fused activation is derived at what
the quantized layer computes before it. Weights are constants; a bias that someone asked to be trained gets a gradient.

Layers come here where a gradient is recorded and nowhere else: an autograd kernel of the operators would cost every
call. What is kept for the way back are references to tensors that the layer holds anyway, and the input where an
activation is fused. The weight is dequantized when the gradient arrives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mono_quant.errors import InputError
from mono_quant.ops.reference import activation_function

# What a layer stores, in an order that its product knows.
Stored = tuple[Tensor | None, ...]

_aten: Final = torch.ops.aten

# Where PyTorch counts the levels of forward-mode derivatives that are open; it has no public name.
_levels: Final[Any] = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=-1)

# The gradient with respect to an activation's input, given that of its output and the input. These operators have
# derivatives of their own, for second derivatives.
_DERIVATIVES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": lambda gradient, x: _aten.threshold_backward(gradient, x, 0),
    "gelu": lambda gradient, x: _aten.gelu_backward(gradient, x),
    "gelu_tanh": lambda gradient, x: _aten.gelu_backward(gradient, x, approximate="tanh"),
    "silu": lambda gradient, x: _silu_backward(gradient, x),
}


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    # PyTorch's operator of that name has no tangents.
    gate = torch.sigmoid(x)
    return gradient * gate * (1 + x * (1 - gate))


class Product(ABC):
    """How a layer multiplies, and the float product that it stands for; without the layer's tensors.

    Those come with each call, so that autograd sees when they are written to before the way back.
    """

    #: The dimension of an output that holds its channels.
    channel_dim: ClassVar[int] = -1

    @abstractmethod
    def compute(self, x: Tensor, bias: Tensor | None, stored: Stored, activation: str) -> Tensor:
        """Answer what the layer answers, in the dtype of ``x``: the call of an operator."""

    @abstractmethod
    def weight(self, stored: Stored) -> Tensor:
        """Answer the weight, dequantized, float32, output channels first."""

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Answer the float product of ``x`` ``[..., K]`` and ``weight`` ``[N, K]``."""
        return F.linear(x, weight)

    def multiply_back(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Answer the gradient with respect to the input of :meth:`multiply`, which has ``shape``."""
        return gradient @ weight

    def map_batch(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Answer ``function``, which takes inputs of this layer, for ``x`` with one dimension more in front."""
        return function(x)


def are_recorded(x: Tensor, bias: Tensor | None) -> bool:
    """Say whether the call of a layer is to be derived, backward or forward."""
    if _levels._current_level >= 0:
        return True  # tangents show on no attribute of a tensor
    return (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled()


def straight_through(
    product: Product, x: Tensor, bias: Tensor | None, stored: Stored, activation: str = "none"
) -> Tensor:
    """Answer what a layer answers, such that derivatives reach its input.

    Args:
        product: How the layer multiplies.
        x: Its input, float32, bfloat16 or float16.
        bias: ``[N]`` of any floating dtype, or ``None``.
        stored: The tensors that ``product`` asks for.
        activation: What the layer computes on top.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return product.compute(x, bias, stored, activation)  # programs without Python hold operators alone
    if not torch.compiler.is_compiling():
        # A layer that was moved or copied in inference mode holds tensors that cannot be kept for the way back.
        bias, *stored_now = (_ordinary(tensor) for tensor in (bias, *stored))
        return _apply(_StraightThrough, product, activation, x, bias, stored_now)
    # The compiler joins what is written apart, and a Function cannot be called inside another's way back there.
    out = _apply(_Traced, product, "none", x if activation == "none" else x.float(), bias, stored)
    return activation_function(activation)(out).to(x.dtype)


def _ordinary(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def _apply(
    step: type[_Traced], product: Product, activation: str, x: Tensor, bias: Tensor | None, stored: Iterable[Any]
) -> Tensor:
    out: Tensor = step.apply(product, activation, x, bias, *stored)  # type: ignore[no-untyped-call]
    return out


class _Traced(torch.autograd.Function):
    """A layer as one step of autograd; in compiled graphs, which take no ``jvp``."""

    @staticmethod
    def forward(product: Product, activation: str, x: Tensor, bias: Tensor | None, *stored: Tensor | None) -> Tensor:
        return product.compute(x, bias, stored, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        product, activation, x, bias, *stored = inputs
        ctx.product, ctx.activation = product, activation
        ctx.shape, ctx.dtype, ctx.device, ctx.output_shape = x.shape, x.dtype, x.device, output.shape
        kept = (None if activation == "none" else x, bias, *stored)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, *stored = ctx.saved_tensors
        product: Product = ctx.product
        grad_x = grad_bias = None
        # Also where the caller runs the way back under autocast: the product is float32.
        with torch.autocast(gradient.device.type, enabled=False):
            inner = gradient.float()
            if ctx.activation != "none":
                inner = _through_activation(inner, ctx.activation, product, x, bias, stored)
            if ctx.needs_input_grad[2]:
                grad_x = product.multiply_back(inner, product.weight(tuple(stored)), ctx.shape).to(ctx.dtype)
            if ctx.needs_input_grad[3]:
                grad_bias = inner.movedim(product.channel_dim, -1).sum_to_size(bias.shape).to(bias.dtype)
        return None, None, grad_x, grad_bias, *(None for _ in stored)


class _StraightThrough(_Traced):
    """A layer as one step of autograd, with derivatives of any order, in either direction, and of batches."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, bias, *stored = ctx.saved_tensors
        product: Product = ctx.product
        _, _, of_x, of_bias, *_ = tangents
        with torch.autocast(ctx.device.type, enabled=False):
            tangent: Tensor | None = None
            if of_x is not None:
                tangent = product.multiply(of_x.float(), product.weight(tuple(stored)))
            if of_bias is not None:
                zeros = torch.zeros(ctx.output_shape, device=of_bias.device) if tangent is None else tangent
                tangent = (zeros.movedim(product.channel_dim, -1) + of_bias).movedim(-1, product.channel_dim)
            assert tangent is not None
            if ctx.activation != "none":
                tangent = _through_activation(tangent, ctx.activation, product, x, bias, stored)
        return tangent.to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        product, activation, x, bias, *stored = inputs
        if any(dim is not None for dim in in_dims[3:]):
            raise InputError(
                "torch.vmap maps over the inputs of a quantized layer, and was given the tensors of several layers",
                suggestion="Call one layer after the other.",
            )
        # A row, or a sample, has the same answer in any company.
        rows = x.movedim(in_dims[2], 0)
        return product.map_batch(lambda x: _apply(_StraightThrough, product, activation, x, bias, stored), rows), 0


def _through_activation(
    tangent: Tensor, activation: str, product: Product, x: Tensor, bias: Tensor | None, stored: list[Tensor | None]
) -> Tensor:
    """Answer ``tangent`` times the activation's derivative at what the quantized layer computes before it."""
    before = _apply(_StraightThrough, product, "none", x.float(), bias, stored)
    return _DERIVATIVES[activation](tangent, before)
