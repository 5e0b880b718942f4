"""Inputs that a layer cannot take are refused by an error that names the layer, on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mono_quant import ops
from mono_quant.errors import InputError, InputTypeError
from mono_quant.modules import (
    quantize_embedding_bag_module,
    quantize_embedding_module,
    quantize_linear_module,
    quantize_linear_module_int4,
)
from mono_quant.modules.base import QuantizedModule


@pytest.fixture(params=ops.available_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.use_backend(request.param):
        yield request.param


def _linears() -> list[QuantizedModule]:
    layer = nn.Linear(64, 8)
    return [
        quantize_linear_module(layer),
        quantize_linear_module(layer, torch.float16),
        quantize_linear_module_int4(layer, group_size=32),
    ]


@pytest.mark.parametrize("kind", range(3), ids=("int8", "float16", "int4"))
class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_other_dtypes_are_refused_by_name(self, kind: int, dtype: torch.dtype) -> None:
        layer = _linears()[kind]
        with pytest.raises(InputTypeError, match=rf"{type(layer).__name__}\(in_features=64, .*found .*{dtype}"):
            layer(torch.zeros(2, 64).to(dtype))

    @pytest.mark.parametrize("shape", [(), (63,), (2, 65), (64, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_other_lengths_are_refused_with_the_shape(
        self, kind: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        with pytest.raises(InputError, match=r"expects \[\.\.\., 64\], found an input of shape") as caught:
            _linears()[kind](torch.zeros(shape, dtype=dtype))
        assert str(list(shape)) in str(caught.value)

    def test_float64_is_computed_in_float32(self, kind: int) -> None:
        layer, x = _linears()[kind], torch.randn(3, 64, dtype=torch.float64)
        out = layer(x)
        assert out.dtype == torch.float64
        assert torch.equal(out, layer(x.float()).double())

    def test_a_bias_that_someone_replaced_is_used(self, kind: int) -> None:
        layer, x = _linears()[kind], torch.randn(3, 64)
        before = layer(x)
        layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
        torch.testing.assert_close(layer(x), before + 1)


@pytest.mark.parametrize("indices", [torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int8)])
def test_indices_of_other_dtypes_are_refused_by_name(indices: Tensor) -> None:
    table = nn.Embedding(10, 8)
    layers = [
        quantize_embedding_module(table),
        quantize_embedding_module(table, torch.float16),
        quantize_embedding_bag_module(nn.EmbeddingBag(10, 8)),
    ]
    for layer in layers:
        with pytest.raises(InputTypeError, match=rf"{type(layer).__name__}\(10, 8, .*found {indices.dtype}"):
            layer(indices)
