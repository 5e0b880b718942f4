"""What all layers of transformers that run as one operator have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from mono_quant.modules.fused_layer import register_idle_hooks
from mono_quant.modules.layer_operands import Setting

# The release since which layers answer hidden states alone, and attention is a function that the configuration names.
_FIRST: Final = 5
# The functions that compute the softmax of scaled products; a layer made without a model has no name for its own.
_EAGER: Final = (None, "eager")
_ATTENTION: Final = (*_EAGER, "sdpa")
_CAPTURING: Final = "transformers.utils.output_capturing"


def why_not_whole(attention: nn.Module) -> str | None:
    """Answer why an operator would not compute what a layer with this attention does, ``None`` if nothing is known.

    Args:
        attention: The module that holds the configuration.
    """
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    if version.split(".")[0].isdecimal() and int(version.split(".")[0]) < _FIRST:
        return f"it is a layer of transformers {version}, expected {_FIRST}.0 or newer"
    found = _attention_of(attention)
    return None if found in _ATTENTION else f"its attention is {found!r}, expected 'sdpa' or 'eager'"


def adds_bools(attention: nn.Module) -> bool:
    """Say whether the layer of this attention adds masks of bools to its scores, as 0 and 1, and hides nothing.

    Args:
        attention: The module that holds the configuration.
    """
    return _attention_of(attention) in _EAGER


def _attention_of(attention: nn.Module) -> Any:
    return getattr(getattr(attention, "config", None), "_attn_implementation", None)


def attention_settings(attention: nn.Module) -> list[Setting]:
    """Answer where :func:`why_not_whole` and :func:`adds_bools` look."""
    config = getattr(attention, "config", None)
    found: list[Setting] = [(attention.__dict__, "config")]
    if config is not None:
        # What the property ``_attn_implementation`` answers.
        found.append((config.__dict__, "_attn_implementation_internal"))
    return found


def _captures_nothing(hook: Callable[..., Any], whole: bool) -> bool:
    """Say whether ``hook`` is one that transformers leaves in a model, and idle.

    It leaves them once hidden states or attentions were asked for. They are idle where nothing is collected. Hidden
    states come from whole layers: hooks inside are idle for those too.
    """
    if getattr(hook, "__module__", None) != _CAPTURING:
        return False
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    if collector is None:
        return False
    return all("hidden_states" in name and not whole for name in collector.get() or ())


register_idle_hooks(_captures_nothing)
