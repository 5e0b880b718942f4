"""What the operator of a whole layer computes with, gathered from the modules inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.modules.linear import QuantizedLinear

_NO_ZERO_POINTS: Final = torch.empty(0, dtype=torch.int8)


@dataclass(frozen=True)
class Operands:
    """The weights of an operator, and by what to tell whether they are still the layer's.

    Attributes:
        places: All modules inside the layer: the dict that holds each, its name there, itself and its attributes.
        linears, norms: Those that the operator computes, in its order.
        weights: For each linear layer tiles, column sums, scales, bias and zero points (empty for a symmetric weight);
            then the parameters of the norms.
        constants: What the layout read from the layer.
    """

    places: tuple[tuple[Mapping[str, nn.Module | None], str, nn.Module, Mapping[str, Any]], ...]
    linears: tuple[QuantizedLinear, ...]
    norms: tuple[nn.Module, ...]
    sources: tuple[tuple[Tensor | None, ...], ...]
    weights: list[Tensor]
    constants: Mapping[str, Any]

    def are_current(self) -> bool:
        """Say whether no module and no tensor of the layer has been replaced since."""
        for holder, name, module, _ in self.places:
            if holder.get(name) is not module:
                return False
        for linear, (tiles, scale, bias, zero_point) in zip(self.linears, self.sources, strict=False):
            buffers = linear._buffers
            if buffers.get("packed_weight") is not tiles or buffers.get("weight_scale") is not scale:
                return False
            if buffers.get("bias") is not bias or buffers.get("weight_zero_point") is not zero_point:
                return False
        for norm, source in zip(self.norms, self.sources[len(self.linears) :], strict=True):
            if any(found is not known for found, known in zip(norm._parameters.values(), source, strict=True)):
                return False
        return True


def gather(
    layer: nn.Module, linear_names: Sequence[str], norm_names: Sequence[str], constants: Mapping[str, Any]
) -> Operands | None:
    """Answer the operands of a layer, its weights in tiles.

    Args:
        layer: All of whose linear layers are int8, with weights of their own.
        linear_names, norm_names: Dotted names, in the order of the operator.
        constants: What the operator needs besides.

    Returns:
        The operands, or ``None`` where a weight is not in tiles: another thread has just chosen another backend, or the
        weight is on another device.
    """
    linears = tuple(layer.get_submodule(name) for name in linear_names)
    norms = tuple(layer.get_submodule(name) for name in norm_names)
    sources: list[tuple[Tensor | None, ...]] = []
    weights: list[Tensor] = []
    for linear in linears:
        assert isinstance(linear, QuantizedLinear)
        packed = linear._packed_weight()
        if packed is None:
            return None
        buffers = linear._buffers
        scale, bias, zero_point = buffers["weight_scale"], buffers.get("bias"), buffers.get("weight_zero_point")
        assert scale is not None
        sources.append((packed[0], scale, bias, zero_point))
        values = torch.zeros(linear.out_features) if bias is None else bias.float()
        zeros = _NO_ZERO_POINTS if zero_point is None else zero_point.reshape(-1)
        weights += [*packed, scale.reshape(-1), values, zeros]
    for norm in norms:
        parameters = tuple(norm._parameters.values())
        sources.append(parameters)
        # Themselves, not views of them: their data may be exchanged. Where this runs no gradients are recorded.
        weights += [p for p in parameters if p is not None]
    places = tuple(
        (holder._modules, name, child, child.__dict__)
        for holder in layer.modules()
        for name, child in holder._modules.items()
        if child is not None
    )
    return Operands(places, linears, norms, tuple(sources), weights, constants)  # type: ignore[arg-type]
