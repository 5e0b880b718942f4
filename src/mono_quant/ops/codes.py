"""Steps on 8-bit codes: what each step means, and how a chain of them is written down.

A chain is text, so that it passes through ``torch.compile`` and ``torch.export`` as a constant. Values have numbers:
first the inputs, then what the steps answer, in order. Images are ``[B, C, H, W]``, channels-last in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from mono_quant.core.packing import unpack_tiles
from mono_quant.errors import ConfigurationError

LARGEST_CODE: Final = 255

#: The most kernel positions of a depthwise convolution.
LARGEST_KERNEL: Final = 256

#: Constants start at multiples of this many bytes, and arrays by channel are padded to multiples of as many channels.
ALIGNMENT: Final = 64

#: Activations of :class:`ConvStep` by number. ``clamp`` only bounds; ``float`` answers float32 and applies nothing.
FINISHES: Final = ("clamp", "hardswish", "silu", "float")


class Step:
    """One step. Its parameters are its fields, integers and float32 numbers."""

    kind: ClassVar[int]

    def encode(self) -> list[int]:
        """Answer the parameters as integers; floats as the bits of a float32."""
        return [
            struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)
            for value in (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        ]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Self:
        """Undo :meth:`encode`."""
        values: list[Any] = [
            struct.unpack("<f", struct.pack("<i", number))[0] if f.type == "float" else number
            for f, number in zip(fields(cls), numbers, strict=True)  # type: ignore[arg-type]
        ]
        return cls(*values)


@dataclass(frozen=True)
class QuantizeStep(Step):
    """Float32 to codes: ``round(x * inverse) + zero``, within 0 and 255."""

    kind: ClassVar[int] = 0
    inverse: float
    zero: int


@dataclass(frozen=True)
class ConvStep(Step):
    """A convolution over all channels.

    ``v = float32(sum - offset[c]) * scale[c] + bias[c]``, where the sum is over codes and weights and padding is
    ``x_zero``; with a second input, ``v + (other - other_zero) * other_scale``. Then
    ``round(min(max(f(v) * inverse, low), high)) + zero``, half to even. With the finish ``clamp`` there is neither
    ``f`` nor ``inverse``: scales and bias are in units of output codes.

    Attributes:
        outputs: Output channels.
        weight, offset, scale, bias: Where they start in the constants, in bytes. ``weight`` is in tiles (see
            ``pack_weight``) of ``[outputs, kernel_h * kernel_w * channels]``; the others are int32, float32 and float32
            ``[outputs]``, padded to a multiple of 64.
        finish: Index into :data:`FINISHES`.
        low, high: Bounds of the codes less ``zero``.
        bounded: Whether they are tighter than 0 and 255, or sums may be huge.
        channels: Input channels.
        padding_h, padding_w, padding_bottom, padding_right: Above, left, below and right of the image.
    """

    kind: ClassVar[int] = 1
    outputs: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    x_zero: int
    weight: int
    offset: int
    scale: int
    bias: int
    finish: int
    inverse: float
    low: float
    high: float
    zero: int
    bounded: int
    other_scale: float
    other_zero: int
    channels: int
    padding_bottom: int
    padding_right: int

    def weight_of(self, constants: Tensor) -> Tensor:
        """Answer the weight as ``[outputs, channels / groups, kernel_h, kernel_w]``."""
        depth = self.kernel_h * self.kernel_w * self.channels
        shape = (-(-self.outputs // 16), -(-depth // 64), 16, 16, 4)
        tiles = constant_array(constants, self.weight, torch.int8, torch.Size(shape).numel()).reshape(shape)
        plain = unpack_tiles(tiles, self.outputs, depth)
        return plain.reshape(self.outputs, self.kernel_h, self.kernel_w, self.channels).permute(0, 3, 1, 2)

    @property
    def groups(self) -> int:
        return 1


@dataclass(frozen=True)
class DepthwiseStep(ConvStep):
    """A convolution of each channel by itself; ``weight`` is int8 ``[kernel_h * kernel_w, channels]``, padded too."""

    kind: ClassVar[int] = 2

    def weight_of(self, constants: Tensor) -> Tensor:
        taps, padded = self.kernel_h * self.kernel_w, _padded(self.channels)
        plain = constant_array(constants, self.weight, torch.int8, taps * padded).reshape(taps, padded)[
            :, : self.channels
        ]
        return plain.t().reshape(self.channels, 1, self.kernel_h, self.kernel_w)

    @property
    def groups(self) -> int:
        return self.channels


@dataclass(frozen=True)
class AddStep(Step):
    """``round(min(max(a * a_scale + b * b_scale + shift, low), high)) + zero``."""

    kind: ClassVar[int] = 3
    a_scale: float
    b_scale: float
    shift: float
    low: float
    high: float
    zero: int


@dataclass(frozen=True)
class MultiplyStep(Step):
    """``round(min(max((a - a_zero) * (b - b_zero) * scale, low), high)) + zero``; one of
    the inputs may have a single pixel."""

    kind: ClassVar[int] = 4
    a_zero: int
    b_zero: int
    scale: float
    low: float
    high: float
    zero: int


@dataclass(frozen=True)
class MaxPoolStep(Step):
    """Maxima over windows; padding never wins."""

    kind: ClassVar[int] = 5
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    ceil_mode: int


@dataclass(frozen=True)
class GlobalAverageStep(Step):
    """``(sum / pixels - zero) * scale`` in float32, ``[B, C, 1, 1]`` or, without ``keepdim``, ``[B, C]``."""

    kind: ClassVar[int] = 6
    zero: int
    scale: float
    keepdim: int


@dataclass(frozen=True)
class TableStep(Step):
    """A code for each code: ``table`` is where 256 bytes start in the constants."""

    kind: ClassVar[int] = 7
    table: int


KINDS: Final[tuple[type[Step], ...]] = (
    QuantizeStep, ConvStep, DepthwiseStep, AddStep, MultiplyStep, MaxPoolStep, GlobalAverageStep, TableStep,
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A step and the numbers of the values that it reads (the second may be -1: none)."""

    step: Step
    first: int
    second: int = -1


def encode_program(inputs: int, outputs: Sequence[int], links: Sequence[Link]) -> str:
    """Write a chain of steps down for ``run_codes``.

    Args:
        inputs: How many tensors it takes; they have the numbers from 0.
        outputs: Numbers of the values that it answers, each once; those of steps, which have the numbers after the
            inputs.
        links: The steps, in order.
    """
    numbers = [inputs, len(outputs), len(links), *outputs]
    for number, link in enumerate(links, inputs):
        parameters = link.step.encode()
        numbers += [link.step.kind, number, link.first, link.second, len(parameters), *parameters]
    return " ".join(map(str, numbers))


def decode_program(program: str) -> tuple[int, list[int], list[Link]]:
    """Undo :func:`encode_program`.

    Raises:
        ConfigurationError: The text is none of its answers.
    """
    try:
        numbers = [int(word) for word in program.split()]
        inputs, output_count, link_count = numbers[:3]
        outputs, at = numbers[3 : 3 + output_count], 3 + output_count
        links = []
        for _ in range(link_count):
            kind, _, first, second, count = numbers[at : at + 5]
            links.append(Link(KINDS[kind].decode(numbers[at + 5 : at + 5 + count]), first, second))
            at += 5 + count
        if len(set(outputs)) < len(outputs):
            raise ValueError(f"it names an output twice: {outputs}")
    except (ValueError, IndexError) as error:
        raise ConfigurationError(f"the program of run_codes is damaged: {error}") from error
    return inputs, outputs, links


def _padded(channels: int) -> int:
    return -(-channels // ALIGNMENT) * ALIGNMENT


def constant_array(constants: Tensor, at: int, dtype: torch.dtype, count: int) -> Tensor:
    """Answer ``count`` numbers that start at byte ``at`` of the constants."""
    return constants[at : at + count * dtype.itemsize].view(dtype)
