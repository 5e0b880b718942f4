"""Encoder layers of transformers that run as one operator.

Such a layer is attention and a feed-forward pair, each added to its input and normalized. Once all its linear layers
are int8 it can be computed in one call, sequence by sequence in the processor's caches, instead of in thirteen that
pass every intermediate value through memory. The modules inside keep their places, names and buffers; only the class of
the layer changes, to one that derives from it, so that ``isinstance`` and everything else go on as before.

Which float classes are such layers is registered by name (see :mod:`mono_quant.integrations.encoders`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.core.layer_scheme import INT8_DYNAMIC
from mono_quant.modules.fusion import FusedActivation
from mono_quant.modules.linear import QuantizedLinear
from mono_quant.ops import get_backend

_LOG = logging.getLogger("mono_quant")
_CACHE: Final = "_encoder_operands"
_NO_ZERO_POINTS: Final = torch.empty(0, dtype=torch.int8)
# Sums of products of 8-bit codes fit 32 bits up to this many inputs.
_LARGEST_WIDTH: Final = 32768


@dataclass(frozen=True)
class EncoderLayout:
    """Where an encoder layer of some class keeps its parts: dotted names, from the layer.

    Attributes:
        query, key, value, output, up, down: The linear layers.
        activation: The activation between ``up`` and ``down``.
        attention_norm, output_norm: The norms after attention and after the feed-forward pair.
        heads: The attribute that holds the number of attention heads.
        scale: The attribute that holds what scores are multiplied with.
        refuse: Answers why a layer of this class computes something else, or ``None``.
    """

    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    activation: str
    attention_norm: str
    output_norm: str
    heads: str
    scale: str
    refuse: Callable[[nn.Module], str | None]

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers in the order of the operator."""
        return self.query, self.key, self.value, self.output, self.up, self.down

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms in the order of the operator."""
        return self.attention_norm, self.output_norm


_LAYOUTS: dict[str, EncoderLayout] = {}
_FUSED: dict[type[nn.Module], type[FusedEncoderLayer]] = {}


def register_encoder_layer(qualified_name: str, layout: EncoderLayout) -> None:
    """Let layers of a class of an optional library run as one operator.

    Args:
        qualified_name: The class, such as ``"package.module.EncoderLayer"``. Its ``forward`` takes hidden states
            ``[samples, length, width]`` and a mask first, and answers hidden states.
        layout: Where it keeps its parts.
    """
    _LAYOUTS[qualified_name] = layout


class FusedEncoderLayer(nn.Module):
    """What a layer becomes that runs as one operator: a subclass of this and of the layer's own class.

    Where an input or the layer's state does not allow it (training, gradients, hooks on modules inside, other dtypes,
    ``torch.compile``, another backend), ``forward`` is that of the layer's own class.
    """

    float_type: type[nn.Module]
    layout: EncoderLayout

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if not _asks_for_more(args, kwargs):
            out = _run(self, hidden_states, attention_mask)
            if out is not None:
                return out
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__dict__.copy()
        state.pop(_CACHE, None)
        return _new_layer, (self.float_type,), state


def _new_layer(float_type: type[nn.Module]) -> nn.Module:
    kind = _fused_class(float_type)
    layer: nn.Module = kind.__new__(kind)
    return layer


def _fused_class(float_type: type[nn.Module]) -> type[FusedEncoderLayer]:
    if float_type not in _FUSED:
        body = {"float_type": float_type, "layout": _LAYOUTS[_name_of(float_type)], "__module__": float_type.__module__}
        made = type(f"Fused{float_type.__name__}", (FusedEncoderLayer, float_type), body)
        _FUSED.setdefault(float_type, made)  # of two threads that come here at once, both get the same class
    return _FUSED[float_type]


def _name_of(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def fuse_encoder_layers(model: nn.Module) -> list[str]:
    """Let every encoder layer in ``model`` that can run as one operator do so.

    A layer can if all its linear layers are int8, its norms are float32, and its activation is computed inside the
    linear layer before (see :func:`mono_quant.modules.fuse_activations`, which comes first).

    Args:
        model: Changed in place.

    Returns:
        The names of the layers that run as one operator now.
    """
    fused = []
    for name, module in model.named_modules():
        if _name_of(type(module)) in _LAYOUTS and why_not_fused(module) is None:
            module.__class__ = _fused_class(type(module))
            fused.append(name)
    return fused


def restore_encoder_layers(model: nn.Module) -> None:
    """Give every layer of :func:`fuse_encoder_layers` in ``model`` its own class back."""
    for module in model.modules():
        if isinstance(module, FusedEncoderLayer):
            module.__dict__.pop(_CACHE, None)
            module.__class__ = module.float_type  # type: ignore[assignment]


def why_not_fused(layer: nn.Module) -> str | None:
    """Answer why an encoder layer of a registered class cannot run as one operator; ``None`` if it can."""
    layout = _LAYOUTS[_name_of(type(layer))]
    reason = layout.refuse(layer)
    if reason is not None:
        return reason
    for name in layout.linears:
        linear = layer.get_submodule(name)
        if type(linear) is not QuantizedLinear or linear.scheme.kind != INT8_DYNAMIC:
            return f"{name} is not an int8 linear layer"
        if linear.shares_weight:
            return f"{name} shares its weight with another layer"
        if max(linear.in_features, linear.out_features) > _LARGEST_WIDTH:
            return f"{name} is wider than {_LARGEST_WIDTH}"
        if name != layout.up and linear.activation != "none":
            return f"{name} computes an activation"
    activation = layer.get_submodule(layout.activation)
    if not isinstance(activation, FusedActivation) or activation.linear is not layer.get_submodule(layout.up):
        return f"{layout.activation} is not computed by {layout.up}"
    for name in layout.norms:
        norm = layer.get_submodule(name)
        if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
            return f"{name} is not a layer norm over rows"
        if norm.weight is None or norm.bias is None or norm.weight.dtype != torch.float32:
            return f"{name} has no float32 weight and bias"
    return None


def _asks_for_more(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether the call wants more than hidden states from hidden states and a mask."""
    if any(value is not None for value in args):
        return True
    return any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "past_key_values")) or bool(
        kwargs.get("output_attentions")
    )


@dataclass(frozen=True)
class _Operands:
    """The operator's weights, and by what to tell whether they are still the layer's."""

    modules: tuple[nn.Module, ...]
    linears: tuple[QuantizedLinear, ...]
    norms: tuple[nn.LayerNorm, ...]
    sources: tuple[tuple[Tensor | None, ...], ...]
    weights: list[Tensor]
    heads: int
    scale: float

    def are_current(self) -> bool:
        for linear, (tiles, scale, bias) in zip(self.linears, self.sources, strict=False):
            buffers = linear._buffers
            if buffers.get("packed_weight") is not tiles or buffers.get("weight_scale") is not scale:
                return False
            if buffers.get("bias") is not bias:
                return False
        return all(norm._parameters["weight"] is source[0] and norm._parameters["bias"] is source[1]
                   for norm, source in zip(self.norms, self.sources[len(self.linears):], strict=True))  # fmt: skip


def _run(layer: FusedEncoderLayer, x: Tensor, mask: Tensor | None) -> Tensor | None:
    if torch.compiler.is_compiling() or layer.training or get_backend() != "native":
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    if type(x) is not Tensor or x.dtype != torch.float32 or x.dim() != 3 or x.device.type != "cpu":
        _report(layer, f"its input is a {type(x).__name__} of {x.dtype} with {x.dim()} dimensions on {x.device}")
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None
    operands: _Operands | None = layer.__dict__.get(_CACHE)
    if operands is None or not operands.are_current():
        operands = _gather(layer)
        layer.__dict__[_CACHE] = operands
    for module in operands.modules:
        if module._forward_hooks or module._forward_pre_hooks:
            _report(layer, f"a {type(module).__name__} in it has hooks, which want to be called")
            return None
    if mask is not None and not _fits(mask, x):
        _report(layer, f"its mask has shape {tuple(mask.shape)} and {mask.dtype}")
        return None
    first, second = operands.norms
    out: Tensor = torch.ops.mono_quant.encoder_layer.default(
        x, mask, operands.weights, operands.heads, operands.scale, first.eps, second.eps, operands.linears[4].activation
    )
    return out


def _fits(mask: Tensor, x: Tensor) -> bool:
    if mask.dtype not in (torch.bool, torch.float32) or mask.dim() != 4 or mask.device.type != "cpu":
        return False
    samples, length = x.shape[0], x.shape[1]
    shape = mask.shape
    return shape[0] in (1, samples) and shape[1] == 1 and shape[2] in (1, length) and shape[3] == length


def _gather(layer: FusedEncoderLayer) -> _Operands:
    layout = layer.layout
    linears = tuple(layer.get_submodule(name) for name in layout.linears)
    norms = tuple(layer.get_submodule(name) for name in layout.norms)
    sources: list[tuple[Tensor | None, ...]] = []
    weights: list[Tensor] = []
    for linear in linears:
        assert isinstance(linear, QuantizedLinear)
        packed = linear._packed_weight()
        assert packed is not None, "fused layers hold int8 weights of their own"
        buffers = linear._buffers
        scale, bias, zero_point = buffers["weight_scale"], buffers.get("bias"), buffers.get("weight_zero_point")
        assert scale is not None
        sources.append((packed[0], scale, bias))
        values = torch.zeros(linear.out_features) if bias is None else bias.float()
        zeros = _NO_ZERO_POINTS if zero_point is None else zero_point.reshape(-1)
        weights += [*packed, scale.reshape(-1), values, zeros]
    for norm in norms:
        assert isinstance(norm, nn.LayerNorm)
        sources.append((norm.weight, norm.bias))
        weights += [norm.weight.detach(), norm.bias.detach()]
    return _Operands(
        tuple(layer.modules())[1:], linears, norms, tuple(sources), weights,  # type: ignore[arg-type]
        int(_attribute(layer, layout.heads)), float(_attribute(layer, layout.scale)),
    )  # fmt: skip


def _attribute(layer: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(layer.get_submodule(owner), attribute)


_reported: set[str] = set()


def _report(layer: nn.Module, reason: str) -> None:
    message = f"a {type(layer).__name__} runs part by part: {reason}"
    if message not in _reported:
        _reported.add(message)
        _LOG.warning(message)
