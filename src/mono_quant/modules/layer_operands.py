"""What the operator of a whole layer computes with, gathered from the modules inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, starmap
from operator import attrgetter, contains, is_, itemgetter
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from mono_quant.modules.linear import QuantizedLinear
from mono_quant.modules.weight_only import WeightOnlyLinear

LinearLayer = QuantizedLinear | WeightOnlyLinear

_NO_ZERO_POINTS: Final = torch.empty(0, dtype=torch.int8, device="cpu")
_BUFFERS: Final = attrgetter("_buffers")
_PARAMETERS: Final = attrgetter("_parameters")
_DTYPE: Final = attrgetter("dtype")
_FORWARD: Final = attrgetter("forward")
# Behind the last of what is compared: if there are more or fewer than were known, it meets something else.
_END: Final = (object(),)
#: A mapping, such as a module's ``__dict__``, and a name in it.
Setting = tuple[dict[str, Any], str]
_FLAGS: Final = tuple(itemgetter(name) for name in ("training", "_forward_hooks", "_forward_pre_hooks"))


@dataclass(frozen=True)
class Operands:
    """The weights of an operator, and by what to tell whether they are still the layer's.

    That is asked at every call, of some eighty objects, right after weights have gone through the caches: so the loops
    are those of the interpreter, not written out.

    Attributes:
        modules: All modules inside the layer.
        linears, norms: Those that the operator computes, in its order.
        weights: For each linear layer tiles, column sums, scales, bias and zero points (empty for a symmetric weight),
            or words of few-bit values and their bits in the place of the first two; then the parameters of the norms.
            The layer's own tensors, not copies or views: what is written into them, or put into the place of their
            data, is to be seen.
        constants: What the layout read from the layer.
        settings: Where that, and what decides whether the operator applies, was read.
        kinds: The classes of the layer and of the modules inside, whose ``forward`` others may exchange.
    """

    modules: tuple[nn.Module, ...]
    linears: tuple[LinearLayer, ...]
    norms: tuple[nn.Module, ...]
    weights: list[Tensor]
    constants: Mapping[str, Any]
    settings: tuple[Setting, ...]
    kinds: tuple[type[nn.Module], ...]
    _children: tuple[Mapping[str, nn.Module | None], ...]
    _states: tuple[Mapping[str, Any], ...]
    _known: tuple[object, ...]

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        linears: tuple[LinearLayer, ...],
        norms: tuple[nn.Module, ...],
        weights: list[Tensor],
        constants: Mapping[str, Any],
        settings: tuple[Setting, ...],
    ) -> Self:
        """Take note of what is in ``layer`` now."""
        children = tuple(module._modules for module in layer.modules() if module._modules)
        inside = tuple(layer.modules())[1:]
        kinds = kinds_in(layer)
        known = tuple(_contents(children, linears, norms, settings, kinds))
        states = tuple(module.__dict__ for module in inside)
        return cls(inside, linears, norms, weights, constants, settings, kinds, children, states, known)

    def are_current(self) -> bool:
        """Say whether no module, no tensor and no setting of the layer has been replaced since.

        Another tensor's data in the place of its own is seen by the operator, which looks at each anew.
        """
        return all(
            map(is_, _contents(self._children, self.linears, self.norms, self.settings, self.kinds), self._known)
        )

    def may_want_to_be_called(self) -> bool:
        """Say whether a module inside is in training mode, or has hooks or a ``forward`` of its own."""
        states = self._states
        return any(any(map(flag, states)) for flag in _FLAGS) or any(map(contains, states, repeat("forward")))


def _contents(
    children: tuple[Mapping[str, nn.Module | None], ...],
    linears: tuple[nn.Module, ...],
    norms: tuple[nn.Module, ...],
    settings: tuple[Setting, ...],
    kinds: tuple[type[nn.Module], ...],
) -> Iterator[object]:
    # Layers replace their dict of buffers when they pack or unpack their weight: it is read anew each time.
    held = chain(children, map(_BUFFERS, linears), map(_PARAMETERS, norms))
    # A norm that is moved to another dtype keeps its parameters.
    dtypes = map(_DTYPE, chain.from_iterable(map(dict.values, map(_PARAMETERS, norms))))
    named = map(dict.values, held)
    return chain(chain.from_iterable(named), starmap(dict.get, settings), dtypes, map(_FORWARD, kinds), _END)


def kinds_in(layer: nn.Module) -> tuple[type[nn.Module], ...]:
    """Answer the classes of ``layer`` and of the modules inside, their own where they were exchanged."""
    return tuple(dict.fromkeys(getattr(module, "float_type", type(module)) for module in layer.modules()))


def gather(
    layer: nn.Module,
    linear_names: Sequence[str],
    norm_parameters: Sequence[str],
    constants: Mapping[str, Any],
    settings: Sequence[Setting],
) -> Operands | None:
    """Answer the operands of a layer, its weights in tiles.

    Args:
        layer: All of whose linear layers are int8 or few-bit ones, with weights of their own.
        linear_names, norm_parameters: Dotted names, in the order of the operator.
        constants: What the operator needs besides.
        settings: Where it was read.

    Returns:
        The operands, or ``None`` where a weight is not in tiles: another thread has just chosen another backend, or a
        tensor is on another device.
    """
    linears = tuple(layer.get_submodule(name) for name in linear_names)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in norm_parameters)
    norms = tuple(layer.get_submodule(name) for name in owners)
    weights: list[Tensor] = []
    for linear in linears:
        assert isinstance(linear, LinearLayer)
        tensors = _tensors_of(linear)
        if tensors is None:
            return None
        weights += tensors
    # Themselves, not views of them: their data may be exchanged. Where this runs no gradients are recorded.
    # Not by get_parameter: functional_call puts tensors of other types in their places.
    for owner, _, leaf in (name.rpartition(".") for name in norm_parameters):
        parameter = layer.get_submodule(owner)._parameters[leaf]
        assert parameter is not None
        weights.append(parameter)
    if any(tensor.device.type != "cpu" for tensor in weights):
        return None
    return Operands.of(layer, linears, norms, weights, constants, tuple(settings))  # type: ignore[arg-type]


def _tensors_of(linear: LinearLayer) -> list[Tensor] | None:
    """Answer the tensors of one linear layer, ``None`` where its weight is not in tiles or on another device."""
    if isinstance(linear, QuantizedLinear):
        weight = linear._packed_weight()
        if weight is None:
            return None
    elif linear.weight_packed.device.type == "cpu":
        weight = linear.weight_packed, torch.tensor([linear.scheme.bits], dtype=torch.int32, device="cpu")
    else:
        return None
    buffers = linear._buffers
    scale, bias, zero_point = buffers["weight_scale"], buffers.get("bias"), buffers.get("weight_zero_point")
    assert scale is not None
    bias = torch.zeros(linear.out_features, dtype=torch.float32, device="cpu") if bias is None else bias
    return [*weight, scale, bias, _NO_ZERO_POINTS if zero_point is None else zero_point]
