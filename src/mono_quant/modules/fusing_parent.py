"""Modules in whose ``forward`` a linear layer computes the activation that follows it.

What is known of such a pair is known of one place: in the parent's ``forward`` the activation is all that reads the
layer's output. Whoever calls the layer elsewhere (a model that runs the layers of an ``nn.Sequential`` one by one and
keeps what they answer, say), hooks it, or puts something else in the place of either, is to get what the layer itself
answers. So the parent notes that its ``forward`` is running, and the layer computes the activation only then; and only
in evaluation mode, in which that ``forward`` was looked at.

As with whole layers (:mod:`mono_quant.modules.fused_layer`), only the parent's class changes, to one that derives from
it.
"""

from __future__ import annotations

import threading
from typing import Any, Self

import torch
from torch import nn

from mono_quant.modules.exchanged_class import ExchangedClass


class _Call:
    """A parent's ``forward`` that is running.

    Attributes:
        parent: Whose it is.
        activated: The linear layers that have computed their activations.
    """

    __slots__ = ("activated", "parent")

    def __init__(self, parent: FusingParent) -> None:
        self.parent = parent
        self.activated: list[nn.Module] = []


_threads = threading.local()
# The same for the one thread that traces a graph: a compiler can follow this list, but none of a thread's own.
_traced: list[_Call] = []
_derived: dict[type[nn.Module], type[FusingParent]] = {}


class FusingParent(ExchangedClass):
    """What the parent of such pairs becomes: a subclass of this and of its own class."""

    cache_name = "_nothing"
    is_layer = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        running = _running()
        running.append(_Call(self))
        try:
            return super().forward(*args, **kwargs)
        finally:
            running.pop()

    @classmethod
    def derived(cls, float_type: type[nn.Module]) -> type[Self]:
        if float_type not in _derived:
            # It keeps its name, which is what people see of it.
            named = {"__module__": float_type.__module__, "__qualname__": float_type.__qualname__}
            made = type(float_type.__name__, (FusingParent, float_type), {"float_type": float_type, **named})
            _derived.setdefault(float_type, made)  # of two threads that come here at once, both get the same class
        return _derived[float_type]  # type: ignore[return-value]

    def lets_activate(self, linear: nn.Module, names: tuple[str, str]) -> bool:
        """Say whether ``linear`` and what holds the place of its activation are where they were, and not watched."""
        children = self._modules
        activation = children.get(names[1])
        return (
            not self.training
            and children.get(names[0]) is linear
            and activation is not None
            and activation.__dict__.get("linear") is linear
            and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
            and not (activation._forward_hooks or activation._forward_pre_hooks or "forward" in activation.__dict__)
        )


def _running() -> list[_Call]:
    if torch.compiler.is_compiling():
        return _traced
    try:
        found: list[_Call] = _threads.running
    except AttributeError:
        found = _threads.running = []
    return found


def activates_here(linear: nn.Module, names: tuple[str, str]) -> bool:
    """Say whether the ``forward`` of the parent in which ``linear`` computes an activation is what runs here.

    Args:
        linear: The layer; if so, it is expected to compute the activation now.
        names: Of it and of the activation, in that parent.
    """
    running = _running()
    if not running:
        return False
    call = running[-1]
    activates = call.parent.lets_activate(linear, names)
    if activates:
        call.activated.append(linear)
    return activates


def has_activated(linear: nn.Module) -> bool:
    """Say whether ``linear`` has computed its activation in the ``forward`` that runs here."""
    running = _running()
    return bool(running) and linear in running[-1].activated


def own_type(module: nn.Module) -> type[nn.Module]:
    """Answer the class that ``module`` had before it became a parent of fused pairs, if it did."""
    return module.float_type if isinstance(module, FusingParent) else type(module)
