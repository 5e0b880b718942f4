"""Activations as unsigned 8-bit codes with one scale and zero point for a whole tensor."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant.errors import ConfigurationError

LARGEST_CODE: Final = 255

_FEW_CHANNELS: Final = 4


class QParams(NamedTuple):
    """What the codes of a tensor stand for: ``value = scale * (code - zero_point)``.

    Attributes:
        scale: Positive; a float32 number.
        zero_point: 0 to 255, so that 0.0 is exact.
    """

    scale: float
    zero_point: int


class Activation(NamedTuple):
    """A function that a layer applies before it rounds.

    Attributes:
        name: ``none``, ``relu``, ``clamp``, ``hardswish`` or ``silu``.
        low: Lower bound of ``clamp``.
        high: Upper bound of ``clamp``.
    """

    name: str = "none"
    low: float = 0.0
    high: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        match self.name:
            case "none":
                return x
            case "relu":
                return F.relu(x)
            case "clamp":
                return x.clamp(self.low, self.high)
            case "hardswish":
                return F.hardswish(x)
            case "silu":
                return F.silu(x)
        raise ConfigurationError(f"activation {self.name!r} is unknown")

    def code_bounds(self, out: QParams) -> tuple[int, int] | None:
        """Answer the codes between which the function clamps; ``None`` if it does more than clamp."""
        match self.name:
            case "none":
                return 0, LARGEST_CODE
            case "relu":
                return out.zero_point, LARGEST_CODE
            case "clamp":
                low, high = (round(bound / out.scale) + out.zero_point for bound in (self.low, self.high))
                return max(low, 0), max(min(high, LARGEST_CODE), 0)
        return None


def round_to_codes(values: Tensor, out: QParams) -> Tensor:
    """Answer ``values`` (float32, overwritten) as uint8 codes: rounded half to even, then moved by the zero point."""
    codes = values.mul_(1.0 / out.scale).round_().add_(out.zero_point).clamp_(0, LARGEST_CODE)
    return codes.to(torch.uint8)


def quantize(x: Tensor, out: QParams) -> Tensor:
    """Answer floating-point ``x`` as uint8 codes; images and volumes come out channels-last.

    Works sample by sample, so that all but the first pass find their data in the cache; but not in a program that is
    exported, whose number of samples that would fix.
    """
    if torch.compiler.is_exporting():
        return round_to_codes(x.to(torch.float32, copy=True), out).contiguous(memory_format=memory_format(x.dim()))
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=memory_format(x.dim()))
    for sample, target in zip(x, codes, strict=True):
        fresh = round_to_codes(sample.to(torch.float32, copy=True), out)
        if sample.dim() > 1 and sample.shape[0] <= _FEW_CHANNELS and fresh.is_contiguous():
            # Interleaving a few planes is several times faster than a copy between the layouts.
            torch.stack(fresh.unbind(0), -1, out=target.movedim(0, -1))
        else:
            target.copy_(fresh)
    return codes


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Answer what uint8 ``codes`` stand for, float32, in the same memory layout."""
    return codes.float().sub_(qparams.zero_point).mul_(qparams.scale)


def memory_format(dim: int) -> torch.memory_format:
    """Answer the layout in which convolutions are fast: channels last where that exists."""
    if dim == 4:
        return torch.channels_last
    return torch.channels_last_3d if dim == 5 else torch.contiguous_format
