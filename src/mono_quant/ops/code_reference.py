"""What a chain of steps on 8-bit codes answers: the specification of ``run_codes``, and its shapes.

See :mod:`mono_quant.ops.codes` for the steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant.errors import ConfigurationError, InputError
from mono_quant.ops.codes import (
    FINISHES,
    LARGEST_CODE,
    AddStep,
    ConvStep,
    GlobalAverageStep,
    MaxPoolStep,
    MultiplyStep,
    QuantizeStep,
    Step,
    TableStep,
    constant_array,
    decode_program,
)


def run_codes(inputs: list[Tensor], constants: Tensor, program: str) -> list[Tensor]:
    """Run a chain of steps.

    Args:
        inputs: float32 or uint8 ``[B, C, H, W]``, the same ``B``.
        constants: uint8 ``[bytes]``, what the steps point into.
        program: See :func:`mono_quant.ops.codes.encode_program`.

    Returns:
        The outputs: uint8 codes or float32, channels-last where they are images.

    Raises:
        InputError: A float input holds NaN.
    """
    _, outputs, links = decode_program(program)
    values = list(inputs)
    for link in links:
        other = values[link.second] if link.second >= 0 else None
        values.append(_run(link.step, values[link.first], other, constants))
    return [_empty(values[number]).copy_(values[number]) for number in outputs]


def _run(step: Step, x: Tensor, other: Tensor | None, constants: Tensor) -> Tensor:
    match step:
        case QuantizeStep():
            if bool(x.isnan().any()):
                raise InputError("run_codes met NaN in its input; 8-bit codes have no NaN")
            return _codes(x * step.inverse, -float(step.zero), float(LARGEST_CODE - step.zero), step.zero)
        case ConvStep():
            return _convolve(step, x, other, constants)
        case AddStep():
            assert other is not None
            total = x.float() * step.a_scale + other.float() * step.b_scale + step.shift
            return _codes(total, step.low, step.high, step.zero)
        case MultiplyStep():
            assert other is not None
            product = (x.to(torch.int32) - step.a_zero) * (other.to(torch.int32) - step.b_zero)
            return _codes(product.float() * step.scale, step.low, step.high, step.zero)
        case MaxPoolStep():
            return _max_pool(step, x)
        case GlobalAverageStep():
            total = x.sum((2, 3), keepdim=bool(step.keepdim), dtype=torch.int64).float()
            return (total / x.shape[2:].numel() - step.zero) * step.scale
        case TableStep():
            return constant_array(constants, step.table, torch.uint8, LARGEST_CODE + 1)[x.to(torch.int32)]
    raise ConfigurationError(f"{type(step).__name__} is no step of run_codes")


def _codes(values: Tensor, low: float, high: float, zero: int) -> Tensor:
    return (values.clamp(low, high).round() + zero).to(torch.uint8)


def _convolve(step: ConvStep, x: Tensor, other: Tensor | None, constants: Tensor) -> Tensor:
    sides = [step.padding_w, step.padding_right, step.padding_h, step.padding_bottom]
    padded = F.pad(x, sides, value=step.x_zero).double()
    strides, dilations = (step.stride_h, step.stride_w), (step.dilation_h, step.dilation_w)
    # float64 holds every sum of 8-bit products exactly.
    total = F.conv2d(padded, step.weight_of(constants).double(), None, strides, 0, dilations, step.groups)
    offset, scale, bias = (
        constant_array(constants, at, dtype, step.outputs).reshape(1, -1, 1, 1)
        for at, dtype in ((step.offset, torch.int32), (step.scale, torch.float32), (step.bias, torch.float32))
    )
    value = (total - offset).float() * scale + bias
    if other is not None:
        value = value + (other.to(torch.int32) - step.other_zero).float() * step.other_scale
    finish = FINISHES[step.finish]
    if finish == "float":
        return value
    if finish == "hardswish":
        value = value * (value + 3).clamp(0, 6) * (1 / 6) * step.inverse
    elif finish == "silu":
        value = value / (torch.exp(-value) + 1) * step.inverse
    return _codes(value, step.low, step.high, step.zero)


def _max_pool(step: MaxPoolStep, x: Tensor) -> Tensor:
    # Float, since PyTorch's own maxima of bytes are for small images only; padding is minus infinity.
    pooled = F.max_pool2d(
        x.float(),
        (step.kernel_h, step.kernel_w),
        (step.stride_h, step.stride_w),
        (step.padding_h, step.padding_w),
        (step.dilation_h, step.dilation_w),
        bool(step.ceil_mode),
    )
    return pooled.to(torch.uint8)


def run_codes_shape(inputs: list[Tensor], constants: Tensor, program: str) -> list[Tensor]:
    """Answer the outputs of :func:`run_codes` without their values.

    Raises:
        RuntimeError: A window is larger than its image.
    """
    _, outputs, links = decode_program(program)
    values = list(inputs)
    for link in links:
        x, step = values[link.first], link.step
        batch, channels, height, width = x.shape
        dtype = torch.uint8
        if isinstance(step, ConvStep):
            channels, height = step.outputs, _windows(height, *_along_h(step))
            width = _windows(width, *_along_w(step))
            dtype = torch.float32 if FINISHES[step.finish] == "float" else dtype
        elif isinstance(step, MaxPoolStep):
            height = _windows(height, *_along_h(step), bool(step.ceil_mode))
            width = _windows(width, *_along_w(step), bool(step.ceil_mode))
        elif isinstance(step, GlobalAverageStep):
            shape = (batch, channels, 1, 1) if step.keepdim else (batch, channels)
            values.append(x.new_empty(shape, dtype=torch.float32))
            continue
        elif isinstance(step, MultiplyStep):
            # One of them may have one pixel a sample.
            other = values[link.second]
            height, width = max(height, other.shape[2]), max(width, other.shape[3])
        values.append(x.new_empty((batch, channels, height, width), dtype=dtype))
    return [_empty(values[number]) for number in outputs]


def _along_h(step: ConvStep | MaxPoolStep) -> tuple[int, int, int, int, int]:
    end = step.padding_bottom if isinstance(step, ConvStep) else step.padding_h
    return step.kernel_h, step.stride_h, step.padding_h, end, step.dilation_h


def _along_w(step: ConvStep | MaxPoolStep) -> tuple[int, int, int, int, int]:
    end = step.padding_right if isinstance(step, ConvStep) else step.padding_w
    return step.kernel_w, step.stride_w, step.padding_w, end, step.dilation_w


def _windows(
    size: Any, kernel: int, stride: int, padding: int, end: int, dilation: int, ceil_mode: bool = False
) -> Any:
    # Where sizes are rounded up, a last window may reach beyond the padding.
    span = size + padding + end - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)
    # Sizes may be symbols, of which this makes a condition of the traced program.
    torch._check(span >= 0, lambda: f"a window of {kernel} pixels is larger than an image of {size}")
    count = span // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # a window starts inside the image or its left padding
    return count


def _empty(x: Tensor) -> Tensor:
    # Not contiguous(): images of one channel or one pixel already are, with other strides.
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
