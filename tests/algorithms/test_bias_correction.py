"""Bias correction: the mean output of a layer is that of the float layer again."""

from __future__ import annotations

import torch

from mono_quant.algorithms.bias_correction import corrected_bias
from mono_quant.core import quantize_weight_groupwise
from tests.algorithms.cases import correlated_rows, weights


def test_the_mean_output_is_that_of_the_float_layer() -> None:
    matrix, bias = weights(1), torch.randn(12)
    rows = correlated_rows(2) + 3.0
    drifted = rows + 0.5
    quantized = quantize_weight_groupwise(matrix, 16)
    found = corrected_bias(matrix, quantized, rows.mean(dim=0), drifted.mean(dim=0), bias)
    expected = (rows @ matrix.t() + bias).mean(dim=0)
    assert torch.allclose((drifted @ quantized.dequantize().t() + found).mean(dim=0), expected, atol=1e-3)


def test_a_layer_without_bias_gets_one_in_its_weights_dtype() -> None:
    matrix = weights(3).to(torch.bfloat16)
    mean = torch.ones(48)
    found = corrected_bias(matrix, quantize_weight_groupwise(matrix, 16), mean, mean, None)
    assert found.dtype == torch.bfloat16
    assert found.shape == (12,)
