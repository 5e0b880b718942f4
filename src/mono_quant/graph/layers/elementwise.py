"""Steps that work on codes one by one: into and out of 8 bits, between scales, sums, products and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mono_quant.errors import InputError
from mono_quant.graph.arithmetic import LARGEST_CODE, QParams, dequantize, quantize, round_to_codes
from mono_quant.graph.layers.layer import Layer


@dataclass(frozen=True)
class OutputSpec:
    """Scale and zero point of the codes that a step answers."""

    output: QParams

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", QParams(*self.output))


@dataclass(frozen=True)
class InputSpec:
    """Scale and zero point of the codes that a step takes."""

    input: QParams

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", QParams(*self.input))


@dataclass(frozen=True)
class TwoInputSpec:
    """Scales and zero points of the codes that a step takes and answers."""

    first: QParams
    second: QParams
    output: QParams

    def __post_init__(self) -> None:
        for name in ("first", "second", "output"):
            object.__setattr__(self, name, QParams(*getattr(self, name)))


class Quantize(Layer):
    """Float values to codes; values beyond the calibrated range become its nearest end.

    Raises:
        InputError: The values hold NaN, which no code stands for, or are integers.
    """

    kind: ClassVar[str] = "quantize"
    spec_type: ClassVar[type[Any]] = OutputSpec
    spec: OutputSpec

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise InputError(f"a statically quantized layer takes floating-point numbers, found {x.dtype}")
        if torch.compiler.is_exporting():
            # A program cannot branch on values, but it can refuse them.
            torch._assert_async(~x.detach().isnan().any(), "a statically quantized layer met NaN in an input")
        elif x.numel() and bool(torch.aminmax(x.detach())[0].isnan()):
            raise InputError(
                f"a statically quantized layer met NaN in an input of shape {list(x.shape)}; 8-bit codes have no NaN"
            )
        return quantize(x, self.spec.output)


class Dequantize(Layer):
    """Codes to float32 values."""

    kind: ClassVar[str] = "dequantize"
    spec_type: ClassVar[type[Any]] = InputSpec
    spec: InputSpec

    def forward(self, x: Tensor) -> Tensor:
        return dequantize(x, self.spec.input)


class Add(Layer):
    """The sum of two tensors of codes, rounded once; shapes broadcast."""

    kind: ClassVar[str] = "add"
    spec_type: ClassVar[type[Any]] = TwoInputSpec
    spec: TwoInputSpec

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b, output = self.spec.first, self.spec.second, self.spec.output
        values = first.float().mul_(a.scale)
        values = values.add(second.float(), alpha=b.scale).sub_(a.scale * a.zero_point + b.scale * b.zero_point)
        return round_to_codes(values, output)


class Multiply(Layer):
    """The product of two tensors of codes, rounded once; shapes broadcast (gates of one value a channel)."""

    kind: ClassVar[str] = "multiply"
    spec_type: ClassVar[type[Any]] = TwoInputSpec
    spec: TwoInputSpec

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b, output = self.spec.first, self.spec.second, self.spec.output
        values = (first.float() - a.zero_point) * (second.float() - b.zero_point).mul_(a.scale * b.scale)
        return round_to_codes(values, output)


class Table(Layer):
    """Any function of one value, or a change of scale: a code for each code, exact up to the one rounding.

    Buffers: ``table`` uint8 ``[256]``.
    """

    kind: ClassVar[str] = "table"
    spec_type: ClassVar[type[Any]] = OutputSpec
    table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x.to(torch.int32)]


def table_of(function: Callable[[Tensor], Tensor], given: QParams, output: QParams) -> Table:
    """Answer the table of a float function from codes of one scale to codes of another."""
    codes = torch.arange(LARGEST_CODE + 1, dtype=torch.uint8)
    values = function(dequantize(codes, given))
    return Table(OutputSpec(output), table=round_to_codes(values.clone(), output))
