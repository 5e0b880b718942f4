"""HQQ: the fit is never worse than round-to-nearest, and stays within what can be stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.algorithms.grid import Grid
from mono_quant.algorithms.hqq import fit_grid
from mono_quant.core import LayerScheme
from mono_quant.errors import ConfigurationError, QuantizationError
from tests.algorithms.cases import INT4, INT4_SYMMETRIC, SCHEMES, weights


def _errors(matrix: Tensor, grid: Grid, norm: float, importance: Tensor | None = None) -> Tensor:
    error = (grid.values(grid.round(matrix)) - matrix).abs().pow(norm)
    if importance is not None:
        error = error * importance
    return error.unflatten(1, (-1, grid.group_size)).sum(dim=2)


@given(
    seed=st.integers(0, 1000),
    scheme=st.sampled_from([scheme for scheme in SCHEMES if scheme.per_channel]),
    norm=st.sampled_from([0.7, 1.0, 2.0]),
    weighted=st.booleans(),
)
def test_no_group_is_worse_than_round_to_nearest(seed: int, scheme: LayerScheme, norm: float, weighted: bool) -> None:
    matrix = weights(seed)
    importance = torch.rand(48, generator=torch.Generator().manual_seed(seed)) if weighted else None
    before = _errors(matrix, Grid.from_range(matrix, scheme), norm, importance)
    after = _errors(matrix, fit_grid(matrix, scheme, importance, norm), norm, importance)
    assert bool((after <= before * (1 + 1e-4)).all())


@pytest.mark.parametrize("scheme", [INT4, INT4_SYMMETRIC])
def test_four_bits_lose_clearly_less(scheme: LayerScheme) -> None:
    matrix = weights(1, out_features=64)
    before = _errors(matrix, Grid.from_range(matrix, scheme), 2.0).sum()
    assert _errors(matrix, fit_grid(matrix, scheme), 2.0).sum() < 0.95 * before


def test_one_scale_for_the_whole_weight_stays_one_scale() -> None:
    grid = fit_grid(weights(2), LayerScheme(per_channel=False))
    assert len(grid.scale.unique()) == 1
    assert grid.scale.shape == (12, 1)


@given(seed=st.integers(0, 100), offset=st.sampled_from([-50.0, 0.0, 3.0, 50.0]))
def test_zero_points_are_integers_that_fit_into_a_byte(seed: int, offset: float) -> None:
    grid = fit_grid(weights(seed) + offset, INT4)
    assert grid.zero_point is not None
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    assert float(grid.zero_point.min()) >= -128
    assert float(grid.zero_point.max()) <= 127


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 5.0, -3e37])
def test_constant_groups_are_kept(value: float) -> None:
    matrix = torch.full((2, 32), value)
    for scheme in (INT4, INT4_SYMMETRIC):
        grid = fit_grid(matrix, scheme)
        assert torch.allclose(grid.values(grid.round(matrix)), matrix, rtol=1e-3, atol=1e-37)


def test_importance_shifts_the_error_to_inputs_that_matter_less() -> None:
    matrix = weights(4, out_features=64)
    importance = torch.ones(48)
    importance[::2] = 100.0
    heavy = importance > 1
    plain, aware = (fit_grid(matrix, INT4, weight) for weight in (None, importance))

    def heavy_error(grid: Grid) -> float:
        return float((grid.values(grid.round(matrix)) - matrix)[:, heavy].square().sum())

    assert heavy_error(aware) < heavy_error(plain)


def test_wrong_values_are_refused() -> None:
    for norm in (0.0, -1.0, 2.5, float("nan")):
        with pytest.raises(ConfigurationError, match="norm="):
            fit_grid(weights(0), INT4, norm=norm)
    broken = weights(0)
    broken[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match="NaN"):
        fit_grid(broken, INT4)


def test_an_empty_weight_is_no_error() -> None:
    assert fit_grid(torch.empty(0, 16), INT4).scale.shape == (0, 1)
