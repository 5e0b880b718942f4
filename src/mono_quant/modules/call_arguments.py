"""What layers of an optional library are called with: under which names, and what of it operators do not know."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import nn

#: The names that a cache has had as an argument, the newest first: transformers 5.24 renamed it.
CACHE_NAMES: Final = ("cache", "past_key_values")

_parameters: dict[type[nn.Module], tuple[str, ...]] = {}
_cache_names: dict[type[nn.Module], tuple[str, ...]] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def parameter_names(layer_type: type[nn.Module]) -> tuple[str, ...]:
    """Answer the names of what the ``forward`` of a class takes, in their order.

    A class that hands everything on to the ``forward`` of its base takes what that takes.
    """
    if layer_type not in _parameters:
        _parameters[layer_type] = _find_parameters(layer_type)
    return _parameters[layer_type]


def _find_parameters(layer_type: type[nn.Module]) -> tuple[str, ...]:
    for kind in layer_type.__mro__:
        forward = kind.__dict__.get("forward")
        if forward is not None:
            parameters = inspect.signature(forward).parameters
            if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
                return tuple(parameters)[1:]
    return ()


def name_of_place(layer_type: type[nn.Module], place: int) -> str:
    """Answer the name of what the ``forward`` of a class takes at ``place``."""
    names = parameter_names(layer_type)
    return names[place] if place < len(names) else f"argument {place + 1}"


def cache_name_among(names: Collection[str]) -> str | None:
    """Answer which of ``names`` is that of a cache; the newest, if they are several."""
    return next((name for name in CACHE_NAMES if name in names), None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cache_names(layer_type: type[nn.Module]) -> tuple[str, ...]:
    """Answer the names under which layers of a class take a cache, their own first.

    Older ones follow, as a layer that was given a new name renames what comes under an old one. Layers that came before
    a name was new pass it by. Looked for once, as this is asked at every call.
    """
    found = _cache_names.get(layer_type)
    if found is None:
        own = cache_name_among(parameter_names(layer_type)) or CACHE_NAMES[-1]
        found = _cache_names[layer_type] = CACHE_NAMES[CACHE_NAMES.index(own) :]
    return found


def cache_in(layer_type: type[nn.Module], kwargs: Mapping[str, Any]) -> Any:
    """Answer the cache that a layer of a class makes use of when it is called with ``kwargs``; ``None`` for none."""
    for name in cache_names(layer_type):
        if name in kwargs:
            return kwargs[name]
    return None


def unknown_names(kwargs: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Answer the names of what could change the answer of a layer, and is not among ``known``.

    ``None`` and ``False`` ask for nothing.
    """
    return [name for name, value in kwargs.items() if name not in known and value is not None and value is not False]
