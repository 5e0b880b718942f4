"""Models whose layers run as one operator, all of them in one call.

To call thirty layers one by one takes Python longer than the processor takes for many of them, and between two calls
the memory that holds the weights is idle. So a model whose ``forward`` calls its layers in a loop, each with the answer
of the one before and all with the same other arguments, sees in that loop a list of a single layer: all of them. As
with single layers (:mod:`mono_quant.modules.fused_layer`), modules keep their places, names and buffers, and only the
class of the model changes, to one that derives from it.

What the operators are is in :mod:`mono_quant.modules.encoder_stack` and :mod:`mono_quant.modules.decoder_stack`.
"""

from __future__ import annotations

import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mono_quant.modules.base import has_foreign_forward
from mono_quant.modules.exchanged_class import ExchangedClass, qualified_name
from mono_quant.modules.fused_layer import FusedLayer, LayerLayout, fuse_single_layers
from mono_quant.modules.notices import report_once
from mono_quant.modules.stack_operands import StackOperands
from mono_quant.ops import get_backend

_running = threading.local()


def _refuse_nothing(model: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class StackLayout:
    """Where a model keeps its layers, and what is to be known about its ``forward``.

    It must call each of them with hidden states first and all with the same other arguments, and answer what the last
    one answers.

    Attributes:
        layers: The attribute that holds the list of layers.
        refuse: Answers why a model of this class does not do so, or ``None``.
    """

    layers: str
    refuse: Callable[[nn.Module], str | None] = _refuse_nothing


class LayerStack(ExchangedClass):
    """What a model becomes whose layers can run as one operator: a subclass of a kind of this and of its own class.

    Where an input or the layers' state does not allow it, each layer is called in turn.

    Attributes:
        layer_layout: The kind of layout that all layers must have.
        goes_by_slices: Whether the loop of the model goes over a slice ``self.<layers>[:n]``, not over the list itself.
        compiles: Whether compiled graphs call all layers as one as well.
    """

    cache_name = "_stack_operands"
    layer_layout: ClassVar[type[LayerLayout]]
    goes_by_slices: ClassVar[bool]
    compiles: ClassVar[bool]
    stack: StackLayout
    known_forward: Callable[..., Any] | None

    @abstractmethod
    def run_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run all layers in one call.

        Args:
            args, kwargs: What the layers would be called with.

        Returns:
            Hidden states; why the layers cannot run in one call; or ``NotImplemented`` where a layer says best why.
        """

    @abstractmethod
    def gather(self) -> Any:
        """Hand the weights of the layers, all of them fused, to the native library.

        Returns:
            The operands (:class:`~mono_quant.modules.stack_operands.StackOperands`); why the layers cannot run in one
            call; or ``NotImplemented`` where a layer has said so itself.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, LayerStack):  # a hook that came before has given the class back
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or self.training or get_backend() != "native" or self._goes_apart():
            return super().forward(*args, **kwargs)
        before = getattr(_running, "model", None)
        _running.model = self
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.model = before

    @classmethod
    def derived(cls, float_type: type[nn.Module]) -> type[Self]:
        if float_type not in _STACKED:
            kind, layout = _STACKS[qualified_name(float_type)]
            body: dict[str, Any] = {
                "float_type": float_type,
                "stack": layout,
                layout.layers: _SeenLayers(layout.layers),
            }
            body["known_forward"] = None if has_foreign_forward(float_type) else staticmethod(float_type.forward)
            # It keeps its name, which transformers writes into configurations.
            named = {"__module__": float_type.__module__, "__qualname__": float_type.__qualname__}
            made = type(float_type.__name__, (kind, float_type), body | named)
            _STACKED.setdefault(float_type, made)  # of two threads that come here at once, both get the same class
        return _STACKED[float_type]  # type: ignore[return-value]

    def all_layers(self) -> nn.ModuleList:
        """Answer the layers, whoever asks."""
        return self._modules[self.stack.layers]  # type: ignore[return-value]

    def operands(self) -> StackOperands | None:
        """Answer what the operator computes with, gathered again if a layer has changed; ``None`` where it cannot."""
        found: StackOperands | None = self.__dict__.get(self.cache_name)
        layers = self.all_layers()
        if found is not None and found.are_current(layers):
            return found
        self.__dict__.pop(self.cache_name, None)
        gathered = self.gather() if all_fused(layers, self.layer_layout) else NotImplemented
        if not isinstance(gathered, StackOperands):
            self.report(gathered)
            return None
        self.__dict__[self.cache_name] = gathered
        return gathered

    def report(self, reason: Any) -> None:
        """Say once why layers run one by one; ``NotImplemented`` stands for what is known to them, who say it."""
        if reason is not NotImplemented:
            _report_one_by_one(type(self), reason)

    def _goes_apart(self) -> bool:
        """Say whether the layers must be called one by one, whatever they are called with."""
        if self.float_type.forward is not self.known_forward:
            self.report("the forward of the class has been replaced")
            return True
        if self.stack.layers not in self._modules:
            return True
        # A graph of make_fx outlives the numbers by which the library knows the layers.
        tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
        return tracing is not None and tracing.get_proxy_mode() is not None

    def _call_all(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand for all layers in the loop of the model."""
        out = self.run_all((hidden_states, *args), kwargs)
        if isinstance(out, Tensor):
            return out
        self.report(out)
        for layer in self.all_layers():
            hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states


def all_fused(layers: Any, kind: type[LayerLayout]) -> bool:
    """Say whether each of ``layers`` can run as one operator and has a layout of ``kind``."""
    return all(isinstance(layer, FusedLayer) and isinstance(layer.layout, kind) for layer in layers)


def _report_one_by_one(model_type: type[nn.Module], reason: str) -> None:
    report_once(f"the layers of a {model_type.__name__} run one by one: {reason}")


class _AllAsOne:
    """What the loop of a model sees instead of its list of layers: whoever asks for all of them gets one.

    The loop does so once. Whatever asks later while the model runs, a hook perhaps, gets the layers.
    """

    def __init__(self, model: LayerStack) -> None:
        self._model = model
        self._layers = model.all_layers()

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers if self._model.goes_by_slices or not len(self._layers) else self._as_one())

    def __getitem__(self, at: Any) -> Any:
        everything = isinstance(at, slice) and at.start is None and at.step is None
        if self._model.goes_by_slices and everything and len(self) and (at.stop is None or at.stop >= len(self)):
            return self._as_one()
        return self._layers[at]

    def _as_one(self) -> list[Any]:
        if not torch.compiler.is_compiling():
            _running.model = None
        return [self._model._call_all]


class _SeenLayers:
    """The list of layers, or in the loop of the model one that stands for all: an attribute of a :class:`LayerStack`.

    One that an instance may have a value of its own for, since that is what a list of no modules is.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, model: LayerStack | None, owner: type[LayerStack]) -> Any:
        if model is None:
            return self
        if self._name not in model._modules:
            raise AttributeError(f"{owner.__name__} has no layers under the name {self._name!r}")
        return _seen_layers(model)


def _seen_layers(model: LayerStack) -> Any:
    if torch.compiler.is_compiling():
        eager = torch.compiler._is_exporting_flag or model.training or get_backend() != "native"
        as_one = model.compiles and not eager
    else:
        as_one = getattr(_running, "model", None) is model
    return _AllAsOne(model) if as_one else model.all_layers()


_STACKS: dict[str, tuple[type[LayerStack], StackLayout]] = {}
_STACKED: dict[type[nn.Module], type[LayerStack]] = {}


def register_stack(qualified_name: str, kind: type[LayerStack], layout: StackLayout) -> None:
    """Let models of a class of an optional library run all their layers as one operator.

    Args:
        qualified_name: The class, such as ``"package.module.DecoderModel"``.
        kind: What it becomes.
        layout: Where it keeps its layers.
    """
    _STACKS[qualified_name] = kind, layout


def fuse_layers(model: nn.Module) -> list[str]:
    """Let every layer in ``model`` that can run as one operator do so, and models of such layers run all in one call.

    A layer can if all its linear layers are int8 with a weight of their own (in decoders also with weights of few
    bits), its norms are float32 or bfloat16, and its activation is computed inside the int8 linear layer before (see
    :func:`mono_quant.modules.fuse_activations`, which comes first).

    Args:
        model: Changed in place.

    Returns:
        The names of the layers that run as one operator now.
    """
    fused = fuse_single_layers(model)
    for module in model.modules():
        kind, layout = _STACKS.get(qualified_name(type(module)), (None, None))
        if kind is None or layout is None or isinstance(module, LayerStack):
            continue
        layers = getattr(module, layout.layers)
        if not len(layers) or not all_fused(layers, kind.layer_layout):
            continue  # a layer that is not says why
        reason = layout.refuse(module)
        if has_foreign_forward(type(module)):
            reason = f"the forward of {type(module).__name__} is not its own"
        if reason is None:
            kind.take_place(module)
        else:
            _report_one_by_one(type(module), reason)
    return fused
