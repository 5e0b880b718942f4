"""What the operator of all layers of a model computes with: the operands of each, handed over once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final
from weakref import finalize

from torch import Tensor, nn

from mono_quant.modules.layer_operands import Operands
from mono_quant.modules.swapped_tensors import ask_before_swaps

#: What every operator takes once for all layers, among their constants.
SHARED: Final = ("heads", "scale", "adds_bools", "activation")
# How operators call data that came into the place of a held tensor's and that they cannot read as it lies.
_OTHER_DATA: Final = "been given data of another kind"


class HeldWeights:
    """The weights of all layers of a model in the native library, until this object is gone or lets go of them.

    Args:
        number: By which the library knows them.
        release: Makes the library forget them.

    Attributes:
        is_held: Whether the library still holds them.
    """

    def __init__(self, number: int, release: Callable[[int], None]) -> None:
        self.number = number
        self.is_held = True
        self._release = finalize(self, release, number)
        ask_before_swaps(self)

    def let_go(self) -> None:
        """Make the library forget them."""
        self.is_held = False
        self._release()


@dataclass(frozen=True, eq=False)
class StackOperands:
    """The layers' operands as they were when the native library was handed their weights.

    Attributes:
        layers: The list of them, which others may have taken the place of since.
        held: The weights in the library, until these operands are gone or torch swaps tensors.
        contents: By what to tell whether they are still the model's; its constants are those of the first layer.
        each, types: The layers, as the list goes over them, and their classes.
        places: What the layers have under ``index`` among their constants: places in a cache.
    """

    layers: nn.ModuleList
    held: HeldWeights
    contents: Operands
    each: tuple[nn.Module, ...]
    types: tuple[type[nn.Module], ...]
    places: tuple[int, ...]

    def are_current(self, layers: nn.ModuleList) -> bool:
        """Say whether no layer, no module in one, no tensor and no setting has been replaced since.

        And whether the library still holds the weights.
        """
        if layers is not self.layers or not self.held.is_held or tuple(layers) != self.each:
            return False
        return self.types == tuple(map(type, self.each)) and self.contents.are_current()

    def call(self, operator: Callable[..., Any], *args: Any) -> Any:
        """Answer what ``operator`` answers for these layers; or, having computed nothing, why it does not.

        ``NotImplemented`` stands for weights that another thread has just made the library forget.
        """
        try:
            return operator(self.held.number, *args)
        except RuntimeError as error:
            if not self.held.is_held:
                return NotImplemented
            if _OTHER_DATA in str(error):
                return "a tensor has been given data of another layout, dtype or device"
            raise


def hand_over(
    layers: nn.ModuleList,
    sizes: Callable[[Operands], Hashable],
    hold: Callable[[list[Tensor], Operands, list[float]], int],
    release: Callable[[int], None],
) -> Any:
    """Hand the weights of ``layers``, all of them fused, to the native library.

    Args:
        layers: Each with ``eps`` among its constants.
        sizes: Answers of a layer what must be the same in all of them, beside :data:`SHARED`.
        hold: From the weights of all layers, the operands of the first, and the ``eps`` of all, answers a number.
        release: Called with that number when nobody knows it any more.

    Returns:
        The operands (:class:`StackOperands`); why the layers cannot run in one call; or ``NotImplemented`` where a
        layer has said so itself.
    """
    found: list[Operands] = []
    for layer in layers:
        operands = layer.operands()  # type: ignore[operator]
        if operands is None:
            return NotImplemented
        found.append(operands)
    weights = [tensor for each in found for tensor in each.weights]
    if len({(sizes(each), *(each.constants[name] for name in SHARED)) for each in found}) > 1:
        return "their sizes, heads, dtypes, attention or activations differ"
    if not all(tensor.is_contiguous() for tensor in weights):
        return "a weight is not contiguous"
    number = hold(weights, found[0], [eps for each in found for eps in each.constants["eps"]])
    linears = tuple(linear for each in found for linear in each.linears)
    norms = tuple(norm for each in found for norm in each.norms)
    settings = tuple(setting for each in found for setting in each.settings)
    contents = Operands.of(layers, linears, norms, [], found[0].constants, settings)
    places = tuple(each.constants.get("index", 0) for each in found)
    each = tuple(layers)
    return StackOperands(layers, HeldWeights(number, release), contents, each, tuple(map(type, each)), places)
