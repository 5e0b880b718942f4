"""GPTQ: never worse than round-to-nearest on the layer's own objective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant.algorithms.gptq import GPTQOptions, output_error, quantize_gptq
from mono_quant.algorithms.grid import Grid
from mono_quant.algorithms.hqq import fit_grid
from mono_quant.core import LayerScheme
from mono_quant.errors import ConfigurationError, QuantizationError
from tests.algorithms.cases import INT4, INT8, SCHEMES, correlated_rows, moments, weights


@given(
    seed=st.integers(0, 1000),
    scheme=st.sampled_from(SCHEMES),
    order=st.booleans(),
    revisions=st.integers(0, 2),
    count=st.sampled_from([5, 200]),
)
def test_no_output_is_worse_than_round_to_nearest(
    seed: int, scheme: LayerScheme, order: bool, revisions: int, count: int
) -> None:
    matrix, hessian = weights(seed), moments(correlated_rows(seed + 1, count))
    found = quantize_gptq(matrix, hessian, scheme, GPTQOptions(activation_order=order, revisions=revisions))
    error = output_error(matrix, found.grid.values(found.codes), hessian)
    grid = Grid.from_range(matrix, scheme)
    nearest = output_error(matrix, grid.values(grid.round(matrix)), hessian)
    assert bool((error <= nearest * (1 + 1e-5)).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_correlated_inputs_are_made_use_of(scheme: LayerScheme) -> None:
    matrix, hessian = weights(1, out_features=64), moments(correlated_rows(2))
    found = quantize_gptq(matrix, hessian, scheme)
    grid = fit_grid(matrix, scheme)
    error = output_error(matrix, found.grid.values(found.codes), hessian).sum()
    assert error < 0.6 * output_error(matrix, grid.values(grid.round(matrix)), hessian).sum()


def test_the_error_is_that_of_the_outputs() -> None:
    matrix, rows = weights(3), correlated_rows(4)
    other = matrix + 0.1 * torch.randn_like(matrix)
    expected = ((rows @ matrix.t() - rows @ other.t()) ** 2).mean(dim=0)
    assert torch.allclose(output_error(matrix, other, moments(rows)), expected, rtol=1e-3)


def test_revisions_only_help() -> None:
    matrix, hessian = weights(5, out_features=40), moments(correlated_rows(6))
    errors = []
    for revisions in (0, 1, 3):
        found = quantize_gptq(matrix, hessian, INT4, GPTQOptions(revisions=revisions))
        errors.append(output_error(matrix, found.grid.values(found.codes), hessian))
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert bool((errors[2] <= errors[1] * (1 + 1e-5)).all())
    assert errors[2].sum() < errors[0].sum()


def test_codes_and_scales_fit_the_scheme() -> None:
    matrix, hessian = weights(7), moments(correlated_rows(8))
    for scheme in SCHEMES:
        found = quantize_gptq(matrix, hessian, scheme)
        assert torch.equal(found.codes, found.codes.round())
        assert found.grid.qmin <= float(found.codes.min())
        assert float(found.codes.max()) <= found.grid.qmax
        assert bool((found.grid.scale > 0).all())
        if not scheme.per_channel:
            assert len(found.grid.scale.unique()) == 1


def test_the_result_does_not_depend_on_the_scale_of_the_inputs() -> None:
    matrix, hessian = weights(9), moments(correlated_rows(10))
    small, large = (quantize_gptq(matrix, hessian * factor, INT8) for factor in (2.0**-40, 2.0**20))
    assert torch.equal(small.codes, large.codes)


def test_dead_inputs_are_rounded_to_nearest() -> None:
    rows = correlated_rows(11)
    rows[:, 16:32] = 0
    matrix = weights(12)
    found = quantize_gptq(matrix, moments(rows), INT4)
    values = found.grid.values(found.codes)[:, 16:32]
    scale = found.grid.columns()[0][:, 16:32]
    assert bool(((values - matrix[:, 16:32]).abs() <= 4 * scale).all())


def test_a_hessian_that_is_not_positive_definite_takes_more_damping() -> None:
    hessian = moments(correlated_rows(13))
    hessian[0, 0] = -0.05 * hessian.diagonal().mean()
    found = quantize_gptq(weights(14), hessian, INT8)
    assert found.damping > GPTQOptions().damping


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(48, 48), "all zero"),
        (torch.full((48, 48), float("nan")), "not finite"),
        (torch.eye(48) - 5 * torch.diag(torch.arange(48) == 3).float(), "not positive definite"),
    ],
)
def test_a_hopeless_hessian_is_refused(hessian: torch.Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_gptq(weights(15), hessian, INT8)


def test_the_weight_is_not_modified() -> None:
    matrix, hessian = weights(16), moments(correlated_rows(17))
    before = matrix.clone(), hessian.clone()
    quantize_gptq(matrix, hessian, INT4)
    assert torch.equal(matrix, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("options", [{"damping": -0.1}, {"damping": 2.0}, {"revisions": -1}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        GPTQOptions(**options)  # type: ignore[arg-type]
