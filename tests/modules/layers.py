"""Float layers of every kind that has a quantized counterpart, with inputs, and what the numbers must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mono_quant.core import LayerScheme
from mono_quant.core.layer_scheme import FLOAT16, WEIGHT_ONLY
from mono_quant.modules import QuantizedModule, counterpart_for_scheme

SYMMETRIC = LayerScheme(symmetric=True)
ASYMMETRIC = LayerScheme(symmetric=False)
PER_TENSOR = LayerScheme(symmetric=False, per_channel=False)
HALF = LayerScheme(FLOAT16, bits=16)
INT4 = LayerScheme(WEIGHT_ONLY, bits=4, group_size=8)
INT4_ASYMMETRIC = LayerScheme(WEIGHT_ONLY, bits=4, symmetric=False, group_size=8)
INT8_WEIGHT_ONLY = LayerScheme(WEIGHT_ONLY, bits=8)

EVERYWHERE = (SYMMETRIC, ASYMMETRIC, PER_TENSOR, HALF)
LINEAR_ONLY = (INT4, INT4_ASYMMETRIC, INT8_WEIGHT_ONLY)


@dataclass(frozen=True)
class Case:
    """A float layer and inputs for it.

    Attributes:
        name: For the test's id.
        make: Answers a new layer.
        inputs: Answers an input for a batch of the given size, first dimension the batch.
        schemes: What it can be quantized to.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    schemes: tuple[LayerScheme, ...] = EVERYWHERE

    def quantized(self, scheme: LayerScheme) -> QuantizedModule:
        return quantize(self.make(), scheme)

    def takes_floats(self) -> bool:
        return self.inputs(1).is_floating_point()


def quantize(module: nn.Module, scheme: LayerScheme) -> QuantizedModule:
    """Answer the quantized copy that the registry finds for ``module``."""
    quantized_type = counterpart_for_scheme(module, scheme)
    assert quantized_type is not None
    return quantized_type.from_float(module, scheme)


CASES = (
    Case(
        "linear", lambda: nn.Linear(24, 10), lambda batch: torch.randn(batch, 5, 24), schemes=EVERYWHERE + LINEAR_ONLY
    ),
    Case("linear_without_bias", lambda: nn.Linear(24, 10, bias=False), lambda batch: torch.randn(batch, 24)),
    Case("conv1d", lambda: nn.Conv1d(4, 6, 3, padding="same"), lambda batch: torch.randn(batch, 4, 9)),
    Case("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), lambda b: torch.randn(b, 4, 9, 8)),
    Case("conv2d_reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
         lambda batch: torch.randn(batch, 4, 9, 8)),
    Case("conv3d", lambda: nn.Conv3d(2, 3, 2, dilation=2), lambda batch: torch.randn(batch, 2, 5, 6, 4)),
    Case("embedding", lambda: nn.Embedding(11, 7, padding_idx=3), lambda batch: torch.randint(0, 11, (batch, 5))),
    Case("embedding_bag", lambda: nn.EmbeddingBag(11, 7, padding_idx=3), lambda b: torch.randint(0, 11, (b, 5))),
)  # fmt: skip

CASES_AND_SCHEMES = tuple((case, scheme) for case in CASES for scheme in case.schemes)


def case_id(value: Case | LayerScheme) -> str:
    return value.name if isinstance(value, Case) else str(value).replace(", ", "-").replace(" ", "_")


def rounded_rows(x: Tensor) -> Tensor:
    """Answer float64 ``x`` after its rows (the last dimension) went to 8 bits and back."""
    codes, scale, zero_point = torch.ops.mono_quant.quantize_rows(x)
    return (codes.double() - zero_point.unsqueeze(-1)) * scale.double().unsqueeze(-1)


def rounded_samples(x: Tensor) -> Tensor:
    """Answer float64 ``x`` after its samples (the first dimension) went to 8 bits and back."""
    return rounded_rows(x.flatten(1)).reshape(x.shape)


def float64_twin(layer: QuantizedModule) -> nn.Module:
    """Answer the standard layer with the dequantized weight, in float64: with rounded inputs, what must come out."""
    return layer.to_float().double()


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """Compare with what exact arithmetic gives: float32's rounding, then that of the output's dtype."""
    relative = max(1e-5, 2 * torch.finfo(actual.dtype).eps)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=1e-5 * largest, equal_nan=True)


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Answer the signal to quantization noise ratio in dB."""
    reference, approximation = reference.detach().double(), approximation.detach().double()
    noise = (reference - approximation).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise))
