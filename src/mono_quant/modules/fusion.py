"""Activations computed inside the linear layer before them, where that is known to be the same function.

A pair is fused when the linear layer's output goes to the activation and nowhere else in the ``forward`` of their
parent: directly in an ``nn.Sequential``, or proven by following that ``forward`` (see
:mod:`mono_quant.modules.traced_children`). Elsewhere both go on to be what they were (see
:mod:`mono_quant.modules.fused_pairs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Final, TypeGuard

import torch
from torch import Tensor, nn

from mono_quant.core.layer_scheme import FLOAT16
from mono_quant.errors import InputError
from mono_quant.modules.base import has_own_forward
from mono_quant.modules.exchanged_class import qualified_name
from mono_quant.modules.fused_pairs import is_activated
from mono_quant.modules.linear import QuantizedLinear
from mono_quant.modules.traced_children import sole_readers

_GELU_BY_APPROXIMATION: Final = {"none": "gelu", "tanh": "gelu_tanh"}

# Activations of optional libraries by qualified name: what they compute, given the module.
_BY_NAME: dict[str, Callable[[nn.Module], str | None]] = {}
# Pairs inside modules of optional libraries, by the module's qualified name.
_PAIRS: dict[str, tuple[str, str]] = {}


class FusedActivation(nn.Module):
    """Holds the place of an activation that a linear layer computes; hands its input on where it has done so.

    Attributes:
        activation: The module that stood here, for the way back.
        linear: The layer that computes it. Neither is a child of this module.
    """

    activation: nn.Module
    linear: QuantizedLinear

    def __init__(self, activation: nn.Module, linear: QuantizedLinear) -> None:
        super().__init__()
        self.training = activation.training
        self.__dict__.update(activation=activation, linear=linear)

    def forward(self, input: Tensor) -> Tensor:
        # In compiled graphs, layers compute their activations only where those are theirs wherever they are called.
        apart = self.linear.activates_inside is not None
        if not apart or (not torch.compiler.is_dynamo_compiling() and is_activated(input)):
            return input
        activated: Tensor = self.activation(input)
        return activated

    def extra_repr(self) -> str:
        return f"{self.activation}, computed by the linear layer before it"


def register_activation(qualified_name: str, name_of: Callable[[nn.Module], str | None]) -> None:
    """Let an activation module of an optional library be fused.

    Args:
        qualified_name: Its type, such as ``"package.module.Activation"``.
        name_of: Answers the operators' name of what one module computes, or ``None``.
    """
    _BY_NAME[qualified_name] = name_of


def register_pair(qualified_name: str, linear: str, activation: str) -> None:
    """Let a linear layer and an activation inside modules of an optional library be a pair.

    Args:
        qualified_name: The type of these modules.
        linear, activation: Dotted names inside such a module; of two children of one parent.
    """
    _PAIRS[qualified_name] = linear, activation


def activation_name(module: nn.Module) -> str | None:
    """Answer the operators' name of what ``module`` computes, or ``None`` if they cannot compute it."""
    if _has_hooks(module) or has_own_forward(module):
        return None
    kind = type(module)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return _GELU_BY_APPROXIMATION.get(str(module.approximate))
    name_of = _BY_NAME.get(qualified_name(kind))
    return None if name_of is None else name_of(module)


def fuse_activations(model: nn.Module) -> list[str]:
    """Fuse every pair of quantized linear layer and activation in ``model`` that is known to be one.

    Returns:
        The names of the linear layers that compute an activation now.
    """
    used = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    registered = _registered_pairs(model)
    fused = []
    for parent_name, parent in list(model.named_modules()):
        for linear, activation in dict.fromkeys([*_pairs(parent), *registered.get(id(parent), [])]):
            if used[id(parent._modules[linear])] == 1:
                _fuse_inside(parent, linear, activation)
                fused.append(f"{parent_name}.{linear}" if parent_name else linear)
    return fused


def _registered_pairs(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Answer, by the ``id`` of their parent, the pairs of children that are known by the class of a module around."""
    found: dict[int, list[tuple[str, str]]] = {}
    for module in model.modules():
        for kind in type(module).__mro__:
            names = _PAIRS.get(qualified_name(kind))
            if names is None:
                continue
            above, _, linear = names[0].rpartition(".")
            parent = module.get_submodule(above)
            activation = names[1].rpartition(".")[2]
            if _fusible(parent._modules.get(linear)) and activation_name(_child(parent, activation)):
                found.setdefault(id(parent), []).append((linear, activation))
    return found


def fuse_saved_pair(model: nn.Module, linear_name: str, activation_name_: str) -> None:
    """Fuse a pair that was fused when its model was saved: inside their parent, or as :func:`fuse_pair` does.

    Raises:
        InputError: See :func:`fuse_pair`.
    """
    parent_name, _, linear = linear_name.rpartition(".")
    above, _, activation = activation_name_.rpartition(".")
    parent = _submodule(model, parent_name)
    pair = linear, activation
    # Few pairs have to be looked for in the whole model.
    if above == parent_name and (pair in _pairs(parent) or pair in _registered_pairs(model).get(id(parent), [])):
        _fuse_inside(parent, linear, activation)
    else:
        fuse_pair(model, linear_name, activation_name_)


def _fuse_inside(parent: nn.Module, linear: str, activation: str) -> None:
    """Fuse a pair for the parent's ``forward`` alone."""
    fuse_pair(parent, linear, activation)
    parent._modules[linear].__dict__["activates_inside"] = (linear, activation)


def fuse_pair(model: nn.Module, linear_name: str, activation_name_: str) -> None:
    """Let a quantized linear layer compute the activation that follows it.

    It is the caller who knows that the activation's input is this layer's output, and that nothing else reads it,
    wherever the layer is called.

    Args:
        model: Holds both, at any depth; changed in place.
        linear_name: Name of a :class:`QuantizedLinear`.
        activation_name_: Name of a ReLU, GELU (exact or tanh) or SiLU module.

    Raises:
        InputError: A name is wrong, the layer already computes an activation, or this one cannot be computed.
    """
    linear = _submodule(model, linear_name)
    activation = _submodule(model, activation_name_)
    if not computes_activations(linear):
        raise InputError(
            f"{linear_name!r} is a {type(linear).__name__}; only int8 and bfloat16 linear layers compute activations"
        )
    if linear.activation != "none":
        raise InputError(f"{linear_name!r} computes {linear.activation} already")
    name = activation_name(activation)
    if name is None:
        raise InputError(
            f"{activation_name_!r} is a {type(activation).__name__}; expected ReLU, GELU or SiLU without hooks"
        )
    linear.activation = name
    parent = _submodule(model, activation_name_.rpartition(".")[0])
    parent._modules[activation_name_.rpartition(".")[2]] = FusedActivation(activation, linear)


def fused_pairs(model: nn.Module) -> dict[str, str]:
    """Answer for each fused activation's name that of the linear layer which computes it."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        name: names[id(module.linear)]
        for name, module in model.named_modules()
        if isinstance(module, FusedActivation) and id(module.linear) in names
    }


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"the model has no module {name!r}: {error}") from None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def computes_activations(module: nn.Module | None) -> TypeGuard[QuantizedLinear]:
    """Say whether ``module`` is a layer that can compute the activation after it."""
    return isinstance(module, QuantizedLinear) and module.scheme.kind != FLOAT16


def _fusible(module: nn.Module | None) -> bool:
    return computes_activations(module) and module.activation == "none" and not _has_hooks(module)


def _pairs(parent: nn.Module) -> list[tuple[str, str]]:
    """Answer the child names of linear layers and the activations that alone read their outputs."""
    children = parent._modules
    if not any(_fusible(child) for child in children.values()):
        return []
    if not any(child is not None and activation_name(child) for child in children.values()):
        return []
    known = list(pairwise(children)) if type(parent) is nn.Sequential else sorted(sole_readers(parent))
    return [(a, b) for a, b in known if _fusible(children.get(a)) and activation_name(_child(parent, b))]


def _child(parent: nn.Module, name: str) -> nn.Module:
    child = parent._modules.get(name)
    return nn.Identity() if child is None else child


def restore_activations(model: nn.Module) -> None:
    """Put every fused activation back in its place, in ``model`` itself."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, FusedActivation):
                child.linear.activation, child.linear.activates_inside = "none", None
                parent._modules[name] = child.activation
