"""Whole layers of transformers that run as one operator.

Once all linear layers inside such a layer are int8, one call can compute it in the processor's caches, where its
modules would pass every intermediate value through memory and Python. The modules keep their places, names and buffers;
only the class of the layer changes, to one that derives from it, so that ``isinstance`` and all else go on as before.

Which float classes can run so is registered by name (see :mod:`mono_quant.integrations`); what their operators are is
in :mod:`mono_quant.modules.encoder_layer` and :mod:`mono_quant.modules.decoder_layer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mono_quant.core.layer_scheme import INT8_DYNAMIC
from mono_quant.modules.base import has_foreign_forward, has_own_forward
from mono_quant.modules.exchanged_class import ExchangedClass, qualified_name
from mono_quant.modules.fusion import FusedActivation, activation_name, register_pair
from mono_quant.modules.gradients import are_recorded
from mono_quant.modules.layer_operands import Operands, Setting, gather, kinds_in
from mono_quant.modules.linear import QuantizedLinear
from mono_quant.modules.notices import report_once
from mono_quant.modules.weight_only import WeightOnlyLinear
from mono_quant.ops import get_backend

# Sums of products of 8-bit codes fit 32 bits up to this many inputs.
_DEEPEST: Final = 32768
#: What operators take: bfloat16 is computed in float32 and rounded where it leaves a layer.
FLOATS: Final = (torch.float32, torch.bfloat16)
_BIASES: Final = (*FLOATS, torch.float16)
_HOOKS: Final = "has hooks, which want to be called"
_GRADIENTS: Final = "gradients are recorded; call the model under torch.no_grad() or torch.inference_mode()"


class LayerLayout(ABC):
    """Where a layer of some class keeps its parts, and the operator that computes it."""

    @property
    @abstractmethod
    def linears(self) -> tuple[str, ...]:
        """Dotted names of the linear layers, in the order of the operator."""

    @property
    @abstractmethod
    def norms(self) -> tuple[str, ...]:
        """Dotted names of the norms, in the order of the operator."""

    @property
    @abstractmethod
    def norm_parameters(self) -> tuple[str, ...]:
        """Names of the parameters of each norm, in the order of the operator."""

    @property
    @abstractmethod
    def activated(self) -> tuple[str, str]:
        """Dotted names of the linear layer that computes the activation, and of the activation."""

    @property
    def takes_few_bits(self) -> bool:
        """Whether the operator computes linear layers with weights of few bits as well as int8 ones."""
        return False

    @abstractmethod
    def objection(self, layer: nn.Module) -> str | None:
        """Answer why the operator would not compute what ``layer`` does, beyond what all layouts ask for."""

    @abstractmethod
    def constants(self, layer: nn.Module) -> Mapping[str, Any]:
        """Answer the numbers that the operator needs from ``layer``."""

    @abstractmethod
    def settings(self, layer: nn.Module) -> Sequence[Setting]:
        """Answer where :meth:`constants` and :meth:`objection` look, beyond modules and tensors."""

    @abstractmethod
    def run(self, layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer what ``layer`` answers for a call, or ``NotImplemented`` where the operator does not apply."""


_LAYOUTS: dict[str, LayerLayout] = {}
_FUSED: dict[type[nn.Module], type[FusedLayer]] = {}
_IDLE_HOOKS: list[Callable[[Callable[..., Any], bool], bool]] = []


def register_layout(qualified_name: str, layout: LayerLayout) -> None:
    """Let layers of a class of an optional library run as one operator.

    Args:
        qualified_name: The class, such as ``"package.module.EncoderLayer"``.
        layout: Where it keeps its parts.
    """
    _LAYOUTS[qualified_name] = layout
    register_pair(qualified_name, *layout.activated)


def register_idle_hooks(is_idle: Callable[[Callable[..., Any], bool], bool]) -> None:
    """Let an optional library leave hooks in layers that run as one operator.

    Args:
        is_idle: Answers whether a hook is known to do nothing during the call that is being made; told whether it is
            the hook of a whole layer (which is not called where all layers of a model run as one).
    """
    _IDLE_HOOKS.append(is_idle)


class FusedLayer(ExchangedClass):
    """What a layer becomes that runs as one operator: a subclass of this and of the layer's own class.

    Where an input or the layer's state does not allow it (training, gradients, hooks on modules inside, modules in
    their places, other dtypes, ``torch.export``, another backend), ``forward`` is that of the layer's own class.
    """

    cache_name = "_fused_operands"
    layout: LayerLayout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training and get_backend() == "native":
            out = self.layout.run(self, args, kwargs)
            if out is not NotImplemented:
                return out
        return super().forward(*args, **kwargs)

    @classmethod
    def derived(cls, float_type: type[nn.Module]) -> type[Self]:
        if float_type not in _FUSED:
            layout = _LAYOUTS[qualified_name(float_type)]
            body = {"float_type": float_type, "layout": layout, "__module__": float_type.__module__}
            made = type(f"Fused{float_type.__name__}", (FusedLayer, float_type), body)
            _FUSED.setdefault(float_type, made)  # of two threads that come here at once, both get the same class
        return _FUSED[float_type]  # type: ignore[return-value]

    def operands(self) -> Operands | None:
        """Answer what the operator computes with, gathered again if the layer has changed.

        ``None`` where the layer has become one that no operator computes.
        """
        found: Operands | None = self.__dict__.get(self.cache_name)
        if found is None or not found.are_current():
            self.__dict__.pop(self.cache_name, None)
            reason = why_not_fused(self)
            if reason is not None:
                self.report(reason)
                return None
            layout = self.layout
            parameters = [f"{norm}.{name}" for norm in layout.norms for name in layout.norm_parameters]
            found = gather(self, layout.linears, parameters, layout.constants(self), layout.settings(self))
            if found is not None:
                self.__dict__[self.cache_name] = found
        return found

    def takes(self, x: object) -> bool:
        """Say whether ``x`` is what operators take: float32 or bfloat16 on the CPU, no gradients, not traced."""
        if torch.compiler.is_exporting():
            return False
        if type(x) is not Tensor or x.dtype not in FLOATS or x.dim() != 3 or not _is_plain(x):
            found = f"a {type(x).__name__}"
            if isinstance(x, Tensor):
                found += f" of {x.dtype} with {x.dim()} dimensions on {x.device}"
                found += "" if x.layout == torch.strided else f", {x.layout}"
            self.report(f"its input is {found}")
            return False
        if are_recorded(x, None):
            self.report(_GRADIENTS)
            return False
        return torch.compiler.is_compiling() or not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]

    def is_compiled_whole(self) -> bool:
        """Say whether a graph that is being compiled can call this layer, see :mod:`.compiled_layer`."""
        if torch.is_grad_enabled():
            self.report(_GRADIENTS)
            return False
        return not torch.compiler._is_exporting_flag

    def needs_its_parts(self, operands: Operands) -> bool:
        """Say whether the modules inside have to be called: for hooks, training (of dropout) or gradients."""
        reason = why_parts(operands)
        if reason is not None:
            self.report(reason)
        return reason is not None

    def takes_mask(self, mask: object, samples: int, queries: int, keys: int) -> bool:
        """Say whether operators take ``mask``: bool, float32 or bfloat16 ``[samples or 1, 1, queries or 1, keys]``."""
        if mask is None:
            return True
        if not isinstance(mask, Tensor):
            self.report(f"its mask is a {type(mask).__name__}")
            return False
        fits = mask.dim() == 4 and mask.dtype in (torch.bool, *FLOATS) and _is_plain(mask)
        if fits:
            shape = mask.shape
            fits = shape[0] in (1, samples) and shape[1] == 1 and shape[2] in (1, queries) and shape[3] == keys
        if not fits:
            self.report(f"its mask is {mask.dtype} of shape {tuple(mask.shape)}")
        return fits

    def adds_mask_of_bools(self, mask: Tensor | None, operands: Operands) -> bool:
        """Say whether the layer adds ``mask`` to its scores as 0 and 1, where operators hide what is ``False``."""
        added = mask is not None and mask.dtype == torch.bool and operands.constants["adds_bools"]
        if added:
            self.report("its mask is of bools, which its attention adds to the scores")
        return bool(added)

    def report(self, reason: str) -> None:
        """Say once that layers of this class run part by part."""
        report_once(f"a {type(self).__name__} runs part by part: {reason}")

    def report_unknown(self, argument: str) -> None:
        """Say once that layers of this class run part by part where they are called with ``argument``."""
        self.report(f"it is called with {argument}, which its operator does not know")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


def why_parts(operands: Operands) -> str | None:
    """Answer why modules inside have to be called: for hooks, training (of dropout) or gradients; else ``None``."""
    if operands.may_want_to_be_called():
        for module in operands.modules:
            reason = _want_of(module)
            if reason is not None:
                return _about(module, reason)
    if _has_any_global_hook():
        return "there are hooks on all modules, which want to be called"
    if torch.is_grad_enabled() and any(
        p is not None and p.requires_grad for norm in operands.norms for p in norm._parameters.values()
    ):
        return _GRADIENTS
    return None


def hooks_of(module: nn.Module) -> str:
    """Answer, as a reason, that a module has hooks."""
    return _about(module, _HOOKS)


def _about(module: nn.Module, reason: str) -> str:
    return f"a {type(module).__name__} in it {reason}"


def _want_of(module: nn.Module) -> str | None:
    """Answer why a module that is in training mode, has hooks or a ``forward`` of its own has to be called."""
    whole = isinstance(module, FusedLayer)
    if not (_are_idle(module._forward_hooks, whole) and _are_idle(module._forward_pre_hooks, whole)):
        return _HOOKS
    if module.training:
        return "is in training mode"
    return "has a forward of its own" if has_own_forward(module) else None


def _are_idle(hooks: Mapping[int, Callable[..., Any]], whole: bool) -> bool:
    return all(any(is_idle(hook, whole) for is_idle in _IDLE_HOOKS) for hook in hooks.values())


def is_fusible_type(module: nn.Module) -> bool:
    """Say whether ``module`` is of a class whose layers can run as one operator."""
    return qualified_name(type(module)) in _LAYOUTS


def fuse_single_layers(model: nn.Module) -> list[str]:
    """Let every layer in ``model`` that can run as one operator do so; see :func:`mono_quant.modules.fuse_layers`."""
    fused = []
    for name, module in model.named_modules():
        if is_fusible_type(module) and why_not_fused(module) is None:
            FusedLayer.take_place(module)
            fused.append(name)
    return fused


def unfused_layers(model: nn.Module) -> dict[str, str]:
    """Answer the names of the layers in ``model`` whose class can run as one operator but that do not, and why."""
    found = {}
    for name, module in model.named_modules():
        if is_fusible_type(module):
            found[name] = why_not_fused(module) or "it has not been tried"
    return found


def why_not_fused(layer: nn.Module) -> str | None:
    """Answer why a layer of a registered class cannot run as one operator; ``None`` if it can, or already does."""
    layout = layer.layout if isinstance(layer, FusedLayer) else _LAYOUTS[qualified_name(type(layer))]
    objection = layout.objection(layer)
    if objection is not None:
        return objection
    for kind in kinds_in(layer):
        if has_foreign_forward(kind):
            return f"the forward of {kind.__name__} is not its own"
    for name in layout.linears:
        reason = _why_not_linear(layer.get_submodule(name), name == layout.activated[0], layout)
        if reason is not None:
            return f"{name} {reason}"
    activated, activation = layout.activated
    if gate_activation(layer, layout) is None:
        return f"{activation} is not computed by {activated}"
    dtypes = set()
    for name in layout.norms:
        parameters = layer.get_submodule(name)._parameters
        if parameters.keys() != set(layout.norm_parameters):
            return f"{name} has not the parameters {', '.join(layout.norm_parameters)}"
        for parameter in parameters.values():
            if parameter is None or parameter.dtype not in FLOATS:
                return f"{name} is not float32 or bfloat16"
            dtypes.add(parameter.dtype)
    return "its norms are of two dtypes" if len(dtypes) > 1 else None


def _why_not_linear(linear: nn.Module, activated: bool, layout: LayerLayout) -> str | None:
    few_bits = layout.takes_few_bits and type(linear) is WeightOnlyLinear
    if not few_bits and (type(linear) is not QuantizedLinear or linear.scheme.kind != INT8_DYNAMIC):
        return "is not an int8 linear layer"
    assert isinstance(linear, QuantizedLinear | WeightOnlyLinear)
    bias = linear._buffers.get("bias")
    if any(parameter is not None for parameter in linear._parameters.values()):
        return "has a bias that is a parameter"
    if bias is not None and bias.requires_grad:
        return "has a bias that requires grad"
    if bias is not None and bias.dtype not in _BIASES:
        return f"has a bias of {bias.dtype}"
    if not linear.in_features or not linear.out_features:
        return "has no inputs or no outputs"
    if isinstance(linear, WeightOnlyLinear):
        return None
    if linear.shares_weight:
        return "shares its weight with another layer"
    if linear.in_features > _DEEPEST:
        return f"has more than {_DEEPEST} inputs"
    return "computes an activation" if linear.activation != "none" and not activated else None


def gate_activation(layer: nn.Module, layout: LayerLayout) -> str | None:
    """Answer the operators' name of the activation in ``layer``, ``None`` where they cannot compute it.

    An int8 linear layer computes it itself by then; behind one with a weight of few bits, a module does.
    """
    linear, activation = (layer.get_submodule(name) for name in layout.activated)
    if isinstance(linear, WeightOnlyLinear):
        return activation_name(activation)
    fused = isinstance(activation, FusedActivation) and activation.linear is linear
    return linear.activation if fused and isinstance(linear, QuantizedLinear) else None
