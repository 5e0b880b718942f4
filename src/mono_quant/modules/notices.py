"""What the logger ``mono_quant`` says about how models run: each thing once."""

from __future__ import annotations

import logging

import torch

_LOG = logging.getLogger("mono_quant")
_reported: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def report_once(message: str) -> None:
    """Warn, the first time that ``message`` comes up."""
    if message not in _reported:
        _reported.add(message)
        _LOG.warning(message)
