"""AWQ and SmoothQuant: a scale is chosen only where it lowers the error of the outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant.algorithms.awq import search_awq_scale
from mono_quant.algorithms.folding import Fold
from mono_quant.algorithms.grid import Grid
from mono_quant.algorithms.samples import InputSamples
from mono_quant.algorithms.scaling import choose_scale
from mono_quant.algorithms.smoothquant import quantized_rows, search_smoothing_scale
from mono_quant.algorithms.targets import find_targets
from mono_quant.core import LayerScheme
from tests.algorithms.cases import INT4, INT8, correlated_rows, weights


def _error(matrix: Tensor, scheme: LayerScheme, rows: Tensor, scale: Tensor, quantize_inputs: bool) -> Tensor:
    scaled, inputs = matrix * scale, rows / scale
    grid = Grid.from_range(scaled, scheme)
    inputs = quantized_rows(inputs) if quantize_inputs else inputs
    return (inputs @ grid.values(grid.round(scaled)).t() - rows @ matrix.t()).square().sum()


@given(seed=st.integers(0, 300))
def test_awq_never_raises_the_error_on_its_sample(seed: int) -> None:
    matrix, rows = weights(seed), correlated_rows(seed + 1, 40)
    scale = search_awq_scale([matrix], [INT4], rows)
    if scale is not None:
        plain = _error(matrix, INT4, rows, torch.ones(48), False)
        assert _error(matrix, INT4, rows, scale, False) < plain * (1 + 1e-4)


@given(seed=st.integers(0, 300))
def test_smoothing_never_raises_the_error_on_its_sample(seed: int) -> None:
    matrix, rows = weights(seed), correlated_rows(seed + 1, 40)
    scale = search_smoothing_scale([matrix], [INT8], rows)
    if scale is not None:
        plain = _error(matrix, INT8, rows, torch.ones(48), True)
        assert _error(matrix, INT8, rows, scale, True) < plain * (1 + 1e-4)


def test_an_outlier_channel_is_worth_a_scale() -> None:
    matrix, rows = weights(1), correlated_rows(2)
    for scale, scheme, inputs in (
        (search_awq_scale([matrix], [INT4], rows), INT4, False),
        (search_smoothing_scale([matrix], [INT8], rows), INT8, True),
    ):
        assert scale is not None
        assert scale[5] > 1.5 * scale.median()
        assert _error(matrix, scheme, rows, scale, inputs) < 0.9 * _error(matrix, scheme, rows, torch.ones(48), inputs)


def test_no_scale_is_better_than_none_for_even_inputs() -> None:
    rows = torch.where(torch.rand(64, 16) < 0.5, -1.0, 1.0)
    assert search_awq_scale([torch.ones(4, 16)], [INT4], rows) is None
    assert search_smoothing_scale([torch.ones(4, 16)], [INT8], rows) is None


@pytest.mark.parametrize("scaling", ["awq", "smoothquant"])
def test_inputs_of_one_channel_share_its_scale(scaling: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.Linear(48, 12))
    model[1].weight.data = weights(1)
    scheme = INT4 if scaling == "awq" else INT8
    targets = find_targets(model, {"1": scheme})
    channels = torch.arange(24).repeat_interleave(2)
    sample = InputSamples(targets["1"])
    sample(correlated_rows(2))
    scale = choose_scale(scaling, model, targets, Fold("0", {"1": channels}), sample)
    assert scale is not None
    assert scale.shape == (24,)
    assert bool((scale > 0).all())


def test_nothing_is_chosen_for_inputs_that_were_never_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    targets = find_targets(model, {"1": INT8})
    fold = Fold("0", {"1": torch.arange(8)})
    assert choose_scale("smoothquant", model, targets, fold, InputSamples(targets["1"])) is None
