"""Tensors whose contents torch is about to swap: whoever holds them beside their modules lets go first.

With ``torch.__future__.set_swap_module_params_on_conversion(True)`` modules that are moved or loaded keep their
tensors, and :func:`torch.utils.swap_tensors` puts other contents into them. It refuses to where a tensor is held
outside of Python, as the native library holds those of whole models, or weakly, as backends hold a weight from which
they derived something. A norm that is moved or loaded by itself is a module of PyTorch, which asks nobody to let go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from mono_quant.locks import ForkSafeLock
from mono_quant.ops import torch_cpu


class Holder(Protocol):
    """What holds tensors of modules."""

    def let_go(self) -> None:
        """Hold them no longer."""


_holders: Final[WeakSet[Holder]] = WeakSet()
_lock = ForkSafeLock()


def ask_before_swaps(holder: Holder) -> None:
    """Have ``holder`` let go before torch swaps tensors: once."""
    _holders.add(holder)


def let_go_before_swaps(tensors: Iterable[Tensor | None] = ()) -> None:
    """Where torch swaps tensors, let all holders go, and backends what they derived from ``tensors``.

    All, since a module does not know who holds its tensors; the next call of a model hands them over again.
    """
    if not torch.__future__.get_swap_module_params_on_conversion():
        return
    with _lock:  # whoever finds none here is to find none held
        try:
            while True:  # one by one: another thread may add some meanwhile
                _holders.pop().let_go()
        except KeyError:  # there are none
            pass
    for tensor in tensors:
        if tensor is not None:
            torch_cpu.forget(tensor)
