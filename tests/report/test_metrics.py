"""Metrics: exact where the answer is known, and well-behaved at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mono_quant.core import quantize_weight_int8
from mono_quant.errors import InputError, InputTypeError
from mono_quant.modules import QuantizedLinear, WeightOnlyLinear, quantize_linear_module, quantize_linear_module_int4
from mono_quant.report import (
    calculate_model_size,
    calculate_sqnr,
    cosine_similarity,
    max_abs_error,
    model_bytes,
    nearest_neighbour_agreement,
    sqnr_db,
)

seeds = st.integers(0, 2**31)
scales = st.sampled_from([1e-30, 1e-4, 1.0, 1e4, 1e30])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sqnr_of_a_tenth_of_the_signal_is_twenty_decibels() -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    assert sqnr_db(x, 1.1 * x) == pytest.approx(20.0, abs=1e-4)


def test_sqnr_has_the_name_of_version_1_1() -> None:
    assert calculate_sqnr is sqnr_db


@given(seeds, scales)
def test_sqnr_does_not_depend_on_the_unit(seed: int, scale: float) -> None:
    x, noise = normal(seed, 100).double(), normal(seed + 1, 100).double()
    expected = sqnr_db(x, x + 0.01 * noise)
    assert sqnr_db(scale * x, scale * (x + 0.01 * noise)) == pytest.approx(expected, abs=1e-6)


def test_sqnr_survives_values_whose_squares_overflow() -> None:
    x = torch.tensor([1e200, -1e200], dtype=torch.float64)
    assert sqnr_db(x, 1.1 * x) == pytest.approx(20.0, abs=1e-6)


@given(seeds, st.integers(0, 3))
def test_sqnr_of_a_tensor_with_itself_is_infinite(seed: int, rank: int) -> None:
    x = normal(seed, *[3] * rank)
    assert sqnr_db(x, x.clone()) == math.inf


def test_sqnr_of_long_tensors_adds_up_all_pieces() -> None:
    x = torch.ones(1 << 19)
    y = x.clone()
    y[-1] = 0.0
    assert sqnr_db(x, y) == pytest.approx(10 * math.log10(1 << 19))


def test_sqnr_tells_nan_infinity_and_a_missed_zero_apart() -> None:
    x = torch.tensor([1.0, 2.0])
    assert math.isnan(sqnr_db(x, torch.tensor([1.0, math.nan])))
    assert sqnr_db(x, torch.tensor([1.0, math.inf])) == -math.inf
    assert sqnr_db(torch.zeros(2), x) == -math.inf
    assert sqnr_db(torch.zeros(2), torch.zeros(2)) == math.inf


def test_sqnr_leaves_infinities_that_agree_out() -> None:
    masked, other = torch.tensor([-math.inf, 1.0]), torch.tensor([-math.inf, 1.1])
    assert sqnr_db(masked, other) == pytest.approx(20.0, abs=1e-4)


def test_sqnr_dequantizes_its_second_argument() -> None:
    weight = normal(0, 8, 16)
    quantized = quantize_weight_int8(weight, symmetric=True)
    assert sqnr_db(weight, quantized) == sqnr_db(weight, quantized.dequantize())
    assert 30 < sqnr_db(weight, quantized) < 60


@pytest.mark.parametrize("metric", [sqnr_db, cosine_similarity, max_abs_error])
def test_metrics_refuse_other_shapes_and_types(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(InputError, match=r"\(2,\) and \(3,\)"):
        metric(torch.ones(2), torch.ones(3))
    with pytest.raises(InputTypeError, match="list"):
        metric(torch.ones(2), [1.0, 2.0])


@given(seeds, scales)
def test_cosine_is_one_for_a_positive_multiple_and_minus_one_for_a_negative_one(seed: int, scale: float) -> None:
    x = normal(seed, 50)
    assert cosine_similarity(x, scale * x) == pytest.approx(1.0, abs=1e-6)
    assert cosine_similarity(x, -scale * x) == pytest.approx(-1.0, abs=1e-6)


def test_cosine_of_orthogonal_zero_and_non_finite_vectors() -> None:
    x = torch.tensor([1.0, 0.0])
    assert cosine_similarity(x, torch.tensor([0.0, 1.0])) == 0.0
    assert cosine_similarity(x, torch.zeros(2)) == 0.0
    assert cosine_similarity(torch.zeros(2), torch.zeros(2)) == 1.0
    assert math.isnan(cosine_similarity(x, torch.tensor([math.nan, 0.0])))


def test_max_abs_error_is_the_largest_difference_and_keeps_nan() -> None:
    x = torch.zeros(1 << 19)
    y = x.clone()
    y[3], y[-1] = -2.0, 1.0
    assert max_abs_error(x, y) == 2.0
    y[5] = math.nan
    assert math.isnan(max_abs_error(x, y))
    assert max_abs_error(torch.zeros(0), torch.zeros(0)) == 0.0


@given(seeds, st.integers(1, 10), st.integers(11, 40))
def test_neighbours_agree_with_themselves_and_with_any_scaling_of_rows(seed: int, k: int, rows: int) -> None:
    x = normal(seed, rows, 8)
    assert nearest_neighbour_agreement(x, x, k) == 1.0
    assert nearest_neighbour_agreement(x, x * 4.0, k) == 1.0


def test_neighbour_agreement_counts_shared_neighbours_without_the_row_itself() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1])
    moved = torch.tensor([0.0, 1.0, 0.1, 1.1])
    first, second = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, moved))
    # The nearest of rows 0..3 are 1, 0, 3, 2 in the first and 2, 3, 0, 1 in the second.
    assert nearest_neighbour_agreement(first, second, k=1) == 0.0
    # All others but the farthest: {1,2},{0,2},{1,3},{1,2} against {1,2},{2,3},{0,1},{1,2}.
    assert nearest_neighbour_agreement(first, second, k=2) == pytest.approx((2 + 1 + 1 + 2) / 8)


def test_neighbour_agreement_spans_more_rows_than_one_piece() -> None:
    x = normal(0, 600, 16)
    assert nearest_neighbour_agreement(x, x) == 1.0
    assert nearest_neighbour_agreement(x, normal(1, 600, 16)) < 0.2


@pytest.mark.parametrize(("first", "second", "k"), [((4, 2), (5, 2), 1), ((4,), (4,), 1), ((4, 2), (4, 2), 4)])
def test_neighbour_agreement_refuses_what_it_cannot_count(first: tuple[int], second: tuple[int], k: int) -> None:
    with pytest.raises(InputError):
        nearest_neighbour_agreement(torch.ones(first), torch.ones(second), k)


def test_model_bytes_counts_parameters_and_buffers() -> None:
    assert model_bytes(nn.Linear(3, 5)) == 4 * (15 + 5)
    assert model_bytes(nn.BatchNorm1d(3)) == 4 * 12 + 8


def test_model_bytes_counts_tied_tensors_once_in_modules_and_state_dicts() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert model_bytes(model) == 64
    assert model_bytes(model.state_dict()) == 64


def test_model_bytes_counts_quantized_layers_as_stored() -> None:
    linear = nn.Linear(64, 16)
    assert model_bytes(quantize_linear_module(linear, symmetric=True)) == 64 * 16 + 4 * 16 + 4 * 16
    packed = quantize_linear_module_int4(linear, group_size=32)
    assert model_bytes(packed) == 64 * 16 // 2 + 4 * 2 * 16 + 2 * 8 + 4 * 16
    assert model_bytes(packed) == model_bytes(packed.state_dict())


def test_model_bytes_does_not_change_when_a_quantized_layer_has_run() -> None:
    layer = quantize_linear_module(nn.Linear(64, 16))
    before = model_bytes(layer)
    layer(torch.ones(2, 64))
    assert model_bytes(layer) == before


def test_model_bytes_works_on_meta_and_lazy_modules() -> None:
    assert model_bytes(nn.Linear(3, 5, device="meta")) == 80
    assert model_bytes(nn.Sequential(nn.LazyLinear(4), nn.Linear(3, 5))) == 80


@pytest.mark.parametrize("model", [3, [torch.ones(2)], {"a": 1}])
def test_model_bytes_refuses_what_is_no_model(model: object) -> None:
    with pytest.raises(InputTypeError):
        model_bytes(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantize", [quantize_linear_module, quantize_linear_module_int4])
def test_model_size_is_in_mib_and_keeps_the_number_of_parameters(quantize: object) -> None:
    assert callable(quantize)
    linear = nn.Linear(128, 256)
    size, parameters = calculate_model_size(linear)
    assert (size, parameters) == (4 * (128 * 256 + 256) / 2**20, 128 * 256 + 256)
    layer = quantize(linear)
    assert isinstance(layer, QuantizedLinear | WeightOnlyLinear)
    assert calculate_model_size(layer)[1] == parameters
    assert calculate_model_size(layer.state_dict())[1] == parameters
