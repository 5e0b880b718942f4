"""Where a linear layer computes the activation that follows it.

What is known of such a pair is known of one place: in the parent's ``forward`` the activation is all that reads the
layer's output. Whoever calls the layer elsewhere (a model that runs the layers of an ``nn.Sequential`` one by one and
keeps what they answer, say), hooks it, or puts something else in the place of either, is to get what the layer itself
answers. So at each call the layer looks who calls it, and computes the activation only for the very code of which that
is known, in evaluation mode. The activation's place knows by the tensor it is given whether that was so.

Compiled graphs hold layer and activation apart: the compiler joins what stands in memory between two operators itself.
"""

from __future__ import annotations

import sys
import threading
from types import CodeType
from typing import Final
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mono_quant.modules.base import has_own_forward
from mono_quant.modules.traced_children import sole_readers

_CALL: Final = nn.Module._call_impl.__code__
_OUTER_CALL: Final = nn.Module._wrapped_call_impl.__code__
# Stands between that and a layer's forward while torch.jit traces.
_TRACED_CALL: Final = nn.Module._slow_forward.__code__
_SEQUENTIAL: Final = nn.Sequential.forward.__code__
_REMEMBERED: Final = 8

_threads = threading.local()
_known: dict[tuple[CodeType, tuple[str, str]], bool] = {}


def activates_here(linear: nn.Module, names: tuple[str, str]) -> bool:
    """Say whether the caller's caller, the ``forward`` of ``linear``, is called where it is to compute its activation.

    Args:
        linear: The layer.
        names: Of it and of the activation, in the parent in which they are a pair.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    frame = sys._getframe(1).f_back
    if frame is not None and frame.f_code is _TRACED_CALL:
        frame = frame.f_back
    frame = frame.f_back if frame is not None and frame.f_code is _CALL else None
    frame = frame.f_back if frame is not None and frame.f_code is _OUTER_CALL else None
    if frame is None:
        return False
    code = frame.f_code
    parent = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(parent, nn.Module) or getattr(type(parent).forward, "__code__", None) is not code:
        return False
    return _is_intact(parent, linear, names) and _is_known(parent, code, names)


def _is_intact(parent: nn.Module, linear: nn.Module, names: tuple[str, str]) -> bool:
    children = parent._modules
    activation = children.get(names[1])
    if parent.training or children.get(names[0]) is not linear or activation is None:
        return False
    if activation.__dict__.get("linear") is not linear or not (_is_plain(linear) and _is_plain(activation)):
        return False
    present = list(children.values())
    return present.count(linear) == present.count(activation) == 1 and not _has_any_global_hook()


def _is_plain(module: nn.Module) -> bool:
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or has_own_forward(module)
    )


def _is_known(parent: nn.Module, code: CodeType, names: tuple[str, str]) -> bool:
    if code is _SEQUENTIAL:
        order = list(parent._modules)
        return order[order.index(names[0]) + 1 :][:1] == [names[1]]
    found = _known.get((code, names))
    if found is None:
        found = _known[code, names] = names in sole_readers(parent)
    return found


def note_activated(output: Tensor) -> None:
    """Take note that an output of a linear layer has gone through its activation."""
    try:
        noted = _threads.noted
    except AttributeError:
        noted = _threads.noted = []
    if len(noted) >= _REMEMBERED:
        noted[:] = [held for held in noted if held() is not None]
    noted.append(ref(output))


def is_activated(x: Tensor) -> bool:
    """Say, once, whether ``x`` is an output of which :func:`note_activated` was told in this thread."""
    noted: list[ref[Tensor]] = getattr(_threads, "noted", [])
    for at in range(len(noted) - 1, -1, -1):
        if noted[at]() is x:
            del noted[at]
            return True
    return False
