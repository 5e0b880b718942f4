"""Quantized lookup tables, alone and in bags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant.core import LayerScheme
from mono_quant.errors import InputError, InputTypeError, QuantizationError
from mono_quant.modules import (
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    quantize_embedding_bag_module,
    quantize_embedding_module,
)
from tests.modules.layers import ASYMMETRIC, HALF, PER_TENSOR, SYMMETRIC, case_id, quantize, sqnr

every_scheme = pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, PER_TENSOR, HALF], ids=case_id)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3), rows=st.integers(1, 30), size=st.integers(0, 20),
    scheme=st.sampled_from([SYMMETRIC, ASYMMETRIC, PER_TENSOR, HALF]), dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_lookup_answers_rows_of_the_dequantized_weight(
    shape: list[int],
    rows: int,
    size: int,
    scheme: LayerScheme,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    seed: int,
    backend: str,
) -> None:
    torch.manual_seed(seed)
    layer = quantize(nn.Embedding.from_pretrained(torch.randn(rows, size)).to(dtype), scheme)
    indices = torch.randint(0, rows, shape, dtype=index_dtype)
    out = layer(indices)
    assert out.dtype == dtype
    assert torch.equal(out, layer.weight[indices.long()])


@every_scheme
def test_the_noise_is_far_below_the_signal(scheme: LayerScheme, backend: str) -> None:
    embedding = nn.Embedding(50, 64)
    indices = torch.randint(0, 50, (8, 9))
    assert sqnr(embedding(indices), quantize(embedding, scheme)(indices)) > 38


@every_scheme
@pytest.mark.parametrize("index", [-1, 5, 1 << 40])
def test_an_index_outside_the_table_is_an_index_error_as_in_pytorch(
    scheme: LayerScheme, index: int, backend: str
) -> None:
    layer = quantize(nn.Embedding(5, 3), scheme)
    bag = quantize(nn.EmbeddingBag(5, 3), scheme)
    indices = torch.tensor([[0, 1, index, 2]])
    with pytest.raises(IndexError):
        nn.Embedding(5, 3)(indices)
    with pytest.raises(IndexError):
        layer(indices)
    with pytest.raises(IndexError):
        bag(indices)


def test_indices_of_any_strides_work(backend: str) -> None:
    layer = quantize_embedding_module(nn.Embedding(20, 6))
    indices = torch.randint(0, 20, (4, 10))
    assert torch.equal(layer(indices.t()), layer(indices).transpose(0, 1))
    assert torch.equal(layer(indices[:, ::3]), layer(indices)[:, ::3])


def test_rows_of_every_size_come_out_right(backend: str) -> None:
    weight = torch.randn(6, 40)
    weight[0] = 0.0
    weight[1] = 0.3
    weight[2] *= 1e-41
    weight[3] = weight[3].sign() * 1e30
    weight[4].abs_()
    for symmetric in (True, False):
        out = quantize_embedding_module(nn.Embedding.from_pretrained(weight), symmetric=symmetric)(torch.arange(6))
        assert torch.equal(out[0], torch.zeros(40))
        assert (out[2] - weight[2]).abs().max() <= torch.finfo(torch.float32).tiny
        for row in (1, 3, 4, 5):
            assert sqnr(weight[row], out[row]) > 35


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@every_scheme
def test_empty_tables_work(scheme: LayerScheme, backend: str) -> None:
    assert quantize(nn.Embedding(0, 4), scheme)(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 4)
    assert quantize(nn.Embedding(4, 0), scheme)(torch.tensor([1, 2])).shape == (2, 0)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_a_max_norm_cannot_be_quantized(make: Any) -> None:
    layer = make(5, 3, max_norm=1.0)
    quantized_type = QuantizedEmbedding if make is nn.Embedding else QuantizedEmbeddingBag
    reason = quantized_type.unsupported_reason(layer)
    assert reason is not None
    assert "max_norm=1.0" in reason
    with pytest.raises(QuantizationError, match=r"max_norm=1\.0"):
        quantize(layer, SYMMETRIC)


def test_options_of_the_gradient_come_back() -> None:
    embedding = nn.Embedding(5, 3, padding_idx=-1, scale_grad_by_freq=True, sparse=True)
    back = quantize_embedding_module(embedding).to_float()
    assert (back.padding_idx, back.scale_grad_by_freq, back.sparse) == (4, True, True)
    bag = nn.EmbeddingBag(5, 3, mode="sum", padding_idx=2, scale_grad_by_freq=True, sparse=True)
    bag_back = quantize_embedding_bag_module(bag).to_float()
    assert (bag_back.padding_idx, bag_back.scale_grad_by_freq, bag_back.sparse) == (2, True, True)


def test_the_constructors_make_layers_of_zeros() -> None:
    layer = QuantizedEmbedding(5, 3, padding_idx=-2)
    assert layer.padding_idx == 3
    assert layer.scheme == ASYMMETRIC
    assert torch.equal(layer(torch.arange(5)), torch.zeros(5, 3))
    bag = QuantizedEmbeddingBag(5, 3, mode="sum", symmetric=True)
    assert torch.equal(bag(torch.ones(2, 4, dtype=torch.int64)), torch.zeros(2, 3))
    source = quantize_embedding_bag_module(nn.EmbeddingBag(5, 3, mode="sum"), symmetric=True)
    bag.load_state_dict(source.state_dict())
    assert torch.equal(bag.weight, source.weight)


def test_other_modules_and_dtypes_are_refused() -> None:
    with pytest.raises(InputTypeError, match="found Linear"):
        quantize_embedding_module(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="found Embedding"):
        quantize_embedding_bag_module(nn.Embedding(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="int32"):
        quantize_embedding_module(nn.Embedding(2, 2), dtype=torch.int32)


@st.composite
def bags(draw: st.DrawFn) -> tuple[nn.EmbeddingBag, Tensor, Tensor | None, Tensor | None]:
    """A float layer, indices, offsets and weights in every form that PyTorch takes."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 6))
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    last = draw(st.booleans())
    bag = nn.EmbeddingBag(
        rows, draw(st.integers(1, 9)), mode=mode, include_last_offset=last,
        padding_idx=draw(st.sampled_from([None, 0, rows - 1])),
    )  # fmt: skip
    if bag.padding_idx is not None:
        nn.init.constant_(bag.weight[bag.padding_idx], 100.0)
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    if draw(st.booleans()):
        indices = torch.randint(0, rows, (draw(st.integers(0, 4)), draw(st.integers(1, 5))), dtype=index_dtype)
        offsets = None
    else:
        lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
        indices = torch.randint(0, rows, (sum(lengths),), dtype=index_dtype)
        ends = torch.tensor(lengths).cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends if last else ends[:-1]]).to(index_dtype)
    weights = torch.randn(indices.shape) if mode == "sum" and draw(st.booleans()) else None
    return bag, indices, offsets, weights


@given(example=bags(), scheme=st.sampled_from([SYMMETRIC, ASYMMETRIC, HALF]))
def test_a_bag_reduces_rows_of_the_dequantized_weight(
    example: tuple[nn.EmbeddingBag, Tensor, Tensor | None, Tensor | None], scheme: LayerScheme, backend: str
) -> None:
    bag, indices, offsets, weights = example
    layer = quantize(bag, scheme)
    expected = layer.to_float()(indices, offsets, weights).detach()
    torch.testing.assert_close(layer(indices, offsets, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_nothing_but_padding_answers_zeros(mode: str, backend: str) -> None:
    layer = quantize_embedding_bag_module(nn.EmbeddingBag(5, 3, mode=mode, padding_idx=1))
    assert torch.equal(layer(torch.ones(2, 4, dtype=torch.int64)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_is_rounded_once(mode: str, dtype: torch.dtype, backend: str) -> None:
    layer = quantize_embedding_bag_module(nn.EmbeddingBag(50, 16, mode=mode).to(dtype))
    indices = torch.randint(0, 50, (4, 30))
    out = layer(indices)
    assert out.dtype == dtype
    layer.float_dtype = torch.float32
    assert torch.equal(out, layer(indices).to(dtype))


def test_weights_of_samples_that_do_not_fit_are_named(backend: str) -> None:
    indices = torch.ones(2, 4, dtype=torch.int64)
    for padding_idx in (None, 0):
        layer = quantize_embedding_bag_module(nn.EmbeddingBag(5, 3, mode="mean", padding_idx=padding_idx))
        with pytest.raises(InputError, match="mode='sum'"):
            layer(indices, None, torch.ones(2, 4))
        layer = quantize_embedding_bag_module(nn.EmbeddingBag(5, 3, mode="sum", padding_idx=padding_idx))
        with pytest.raises(InputError, match=r"\[2, 4\]"):
            layer(indices, None, torch.ones(2, 3))


def test_a_bag_needs_offsets_where_pytorchs_does() -> None:
    layer = quantize_embedding_bag_module(nn.EmbeddingBag(5, 3))
    with pytest.raises(ValueError, match="offsets"):
        layer(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="offsets"):
        layer(torch.tensor([[1, 2, 3]]), torch.tensor([0]))


def test_the_representations_name_the_scheme() -> None:
    assert repr(QuantizedEmbedding(5, 3, padding_idx=1)) == (
        "QuantizedEmbedding(5, 3, padding_idx=1, int8 dynamic, asymmetric, channels)"
    )
    assert repr(QuantizedEmbeddingBag(5, 3, mode="sum", dtype=torch.float16)) == (
        "QuantizedEmbeddingBag(5, 3, mode='sum', float16)"
    )
