"""Tensors whose contents torch is about to swap: whoever holds them beside their modules lets go first.

With ``torch.__future__.set_swap_module_params_on_conversion(True)`` modules that are moved or loaded keep their
tensors, and :func:`torch.utils.swap_tensors` puts other contents into them. It refuses to where a tensor is held
outside of Python, as the native library holds those of whole models, or weakly, as backends hold a weight from which
they derived something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final
from weakref import WeakSet, finalize

import torch
from torch import Tensor

from mono_quant.ops import torch_cpu


class HeldLayers:
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
        _held.add(self)

    def let_go(self) -> None:
        """Make the library forget them."""
        self.is_held = False
        self._release()


_held: Final[WeakSet[HeldLayers]] = WeakSet()


def let_go_before_swaps(tensors: Iterable[Tensor | None] = ()) -> None:
    """Where torch swaps tensors, make the library forget all models, and backends what they derived from ``tensors``.

    All models, since a layer does not know those it belongs to; their next calls hand the weights over again.
    """
    if torch.__future__.get_swap_module_params_on_conversion():
        for held in tuple(_held):
            held.let_go()
        for tensor in tensors:
            if tensor is not None:
                torch_cpu.forget(tensor)
