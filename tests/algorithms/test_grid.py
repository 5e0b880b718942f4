"""The grid of values that codes can stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant.algorithms.grid import Grid
from mono_quant.core import LayerScheme, quantize_weight_groupwise, quantize_weight_int8
from mono_quant.errors import ConfigurationError
from mono_quant.modules.base import quantize_by_scheme
from tests.algorithms.cases import SCHEMES, weights


@given(seed=st.integers(0, 1000), scheme=st.sampled_from(SCHEMES))
def test_from_range_gives_the_codes_of_plain_quantization(seed: int, scheme: LayerScheme) -> None:
    matrix = weights(seed)
    grid = Grid.from_range(matrix, scheme)
    found = grid.tensor(grid.round(matrix), scheme, matrix.shape)
    if scheme.kind == "weight_only":
        expected = quantize_weight_groupwise(matrix, scheme.group_size or 48, scheme.symmetric, scheme.bits)
    else:
        expected = quantize_by_scheme(matrix, scheme)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero_point is None) == (expected.zero_point is None)
    assert found.group_size == expected.group_size


def test_values_are_what_the_tensor_dequantizes_to() -> None:
    matrix = weights(3)
    for scheme in SCHEMES:
        grid = Grid.from_range(matrix, scheme)
        codes = grid.round(matrix)
        assert torch.equal(grid.values(codes), grid.tensor(codes, scheme, matrix.shape).dequantize())


def test_a_convolution_keeps_its_shape() -> None:
    weight = torch.randn(6, 4, 3, 3)
    grid = Grid.from_range(weight.flatten(1), LayerScheme())
    found = grid.tensor(grid.round(weight.flatten(1)), LayerScheme(), weight.shape)
    assert torch.equal(found.codes, quantize_weight_int8(weight, symmetric=True).codes)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not divide"):
        Grid.from_range(weights(0), LayerScheme("weight_only", bits=4, group_size=32))
