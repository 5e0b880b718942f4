"""Chains of steps on codes for ``run_codes``, with operands drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import pack_tiles
from mono_quant.ops import codes
from mono_quant.ops.codes import Link


def join(pieces: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Answer tensors as the bytes that steps point into, and where each starts."""
    content, starts = bytearray(), []
    for piece in pieces:
        starts.append(len(content))
        content += piece.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content += bytes(-len(content) % 64)
    aligned = torch.zeros(len(content), dtype=torch.uint8)
    aligned.copy_(torch.frombuffer(content, dtype=torch.uint8))
    return aligned, starts


def by_channel(values: Tensor) -> Tensor:
    """Answer a value for each channel, padded as the operator wants them."""
    return torch.cat([values, values.new_zeros(-len(values) % 64)])


def images(generator: torch.Generator, *shape: int) -> Tensor:
    made = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return made.contiguous(memory_format=torch.channels_last)


@dataclass
class ConvCase:
    """A convolution by itself, with what it reads."""

    inputs: list[Tensor]
    constants: Tensor
    program: str
    finish: str


def conv_case(
    seed: int,
    batch: int,
    channels: int,
    outputs: int,
    kernel: tuple[int, int],
    size: tuple[int, int],
    *,
    depthwise: bool = False,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    finish: str = "clamp",
    adds: bool = False,
    bounded: bool = False,
    zero: int = 3,
    out_zero: int = 0,
) -> ConvCase:
    """Make a convolution. ``padding`` is above, left, below, right; ``size`` is that of the image."""
    generator = torch.Generator().manual_seed(seed)
    if depthwise:
        outputs = channels
    x = images(generator, batch, channels, *size)
    weight = torch.randint(-128, 128, (outputs, 1 if depthwise else channels, *kernel), generator=generator)
    weight = weight.to(torch.int8)
    if depthwise:
        packed = torch.zeros(kernel[0] * kernel[1], -(-channels // 64) * 64, dtype=torch.int8)
        packed[:, :channels] = weight.flatten(1).t()
    else:
        packed = pack_tiles(weight.permute(0, 2, 3, 1).flatten(1).contiguous())
    spread = 20.0 if finish == "clamp" else 1.0
    scale = (torch.rand(outputs, generator=generator) + 0.01) * spread / 2000 / weight[0].numel() ** 0.5
    bias = torch.randn(outputs, generator=generator) * spread
    offset = weight.flatten(1).sum(1, dtype=torch.int32) * zero
    constants, starts = join([packed, by_channel(offset), by_channel(scale), by_channel(bias)])
    low, high = (0.0, 100.0) if bounded else (-float(out_zero), 255.0 - out_zero)
    kind = codes.DepthwiseStep if depthwise else codes.ConvStep
    step = kind(
        outputs, *kernel, *stride, *padding[:2], *dilation, zero, *starts, codes.FINISHES.index(finish), 20.0, low,
        high, out_zero, int(bounded or finish != "clamp"), 0.7, 11, channels, *padding[2:],
    )  # fmt: skip
    inputs = [x]
    if adds:
        spatial = [
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, before, after, d, k, s in zip(size, padding[:2], padding[2:], dilation, kernel, stride, strict=True)
        ]
        inputs.append(images(generator, batch, outputs, *spatial))
    links = [Link(step, 0, 1 if adds else -1)]
    return ConvCase(inputs, constants, codes.encode_program(len(inputs), [len(inputs)], links), finish)


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    """Convolutions of all kinds whose kernel fits the padded image."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (2, 3), (7, 1)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    size = tuple(d * (k - 1) + draw(st.integers(1, 9)) for d, k in zip(dilation, kernel, strict=True))
    sizes: Any = st.sampled_from([1, 3, 4, 8, 15, 16, 24, 40, 64, 65, 96, 130])
    finish = draw(st.sampled_from(codes.FINISHES))
    return conv_case(
        draw(st.integers(0, 2**31)),
        draw(st.integers(1, 4)),
        draw(sizes),
        draw(sizes),
        kernel,
        (size[0], size[1]),
        depthwise=draw(st.booleans()),
        stride=draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1)])),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 4)),
        dilation=dilation,
        finish=finish,
        adds=finish in ("clamp", "float") and draw(st.booleans()),
        bounded=finish == "clamp" and draw(st.booleans()),
        zero=draw(st.sampled_from([0, 3, 255])),
        out_zero=draw(st.sampled_from([0, 7, 128])),
    )


def chain(batch: int = 3, size: tuple[int, int] = (14, 11), channels: int = 8, seed: int = 0) -> ConvCase:
    """A small network of every kind of step with two outputs: codes and means."""
    generator = torch.Generator().manual_seed(seed)
    first = conv_case(seed, 1, channels, 24, (3, 3), (5, 5))
    second = conv_case(seed + 1, 1, 24, 24, (3, 3), (5, 5), depthwise=True)
    table = torch.arange(255, -1, -1, dtype=torch.uint8)
    constants, starts = join([first.constants, second.constants, table])

    def moved(case: ConvCase, start: int, **changes: Any) -> codes.Step:
        step: Any = codes.decode_program(case.program)[2][0].step
        fields = {f: getattr(step, f) + start for f in ("weight", "offset", "scale", "bias")}
        return type(step)(**{**step.__dict__, **fields, **changes})

    same = {"padding_h": 1, "padding_w": 1, "padding_bottom": 1, "padding_right": 1}
    image = torch.randn(batch, channels, *size, generator=generator)
    steps = [
        Link(codes.QuantizeStep(40.0, 128), 0),
        Link(moved(first, starts[0], **same), 1),
        Link(codes.MaxPoolStep(3, 2, 2, 2, 1, 1, 1, 1, 1), 2),
        Link(moved(second, starts[1], **same), 3),
        Link(codes.AddStep(0.5, 0.25, -3.5, 0.0, 255.0, 0), 4, 3),
        Link(codes.TableStep(starts[2]), 5),
        Link(codes.GlobalAverageStep(40, 0.05, 1), 6),
        Link(codes.QuantizeStep(20.0, 17), 7),
        Link(codes.MultiplyStep(3, 17, 0.01, -9.0, 246.0, 9), 6, 8),
        Link(codes.GlobalAverageStep(9, 0.125, 0), 9),
    ]
    return ConvCase([image], constants, codes.encode_program(1, [9, 10], steps), "clamp")
