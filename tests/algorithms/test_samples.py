"""Samples of a layer's inputs: even, deterministic, bounded; means exact."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mono_quant.algorithms.samples import InputMean, InputSamples
from mono_quant.algorithms.targets import Target, find_targets, second_moments
from tests.algorithms.cases import INT8


def _target(layer: nn.Module) -> Target:
    return find_targets(nn.Sequential(layer), {"0": INT8})["0"]


@given(sizes=st.lists(st.integers(0, 40), max_size=12), limit=st.integers(1, 20))
def test_the_sample_is_every_kth_row_and_bounded(sizes: list[int], limit: int) -> None:
    watcher = InputSamples(_target(nn.Linear(2, 3)), limit)
    rows = torch.arange(sum(sizes)).float().unsqueeze(1).expand(-1, 2).clone()
    for part in rows.split(sizes):
        watcher(part)
    found = watcher.rows[:, 0]
    assert len(found) < 2 * limit
    assert len(found) >= min(limit, len(rows))
    if len(found) > 1:
        stride = int(found[1])
        assert torch.equal(found, rows[::stride, 0])


@given(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=5), kind=st.sampled_from([InputSamples, InputMean]))
def test_the_mean_is_that_of_all_rows(sizes: list[int], kind: type[InputSamples]) -> None:
    watcher = kind(_target(nn.Linear(4, 3)), 2)
    parts = [torch.randn(size, 4) for size in sizes]
    assert watcher.mean is None
    for part in parts:
        watcher(part.unsqueeze(0))
    assert watcher.mean is not None
    assert torch.allclose(watcher.mean, torch.cat(parts).mean(dim=0), atol=1e-6)


def test_rows_of_a_convolution_multiply_with_its_matrix() -> None:
    cases = [
        (nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2), torch.randn(2, 3, 9, 8)),
        (nn.Conv2d(3, 5, (1, 3), padding="same", padding_mode="circular"), torch.randn(2, 3, 6, 7)),
        (nn.Conv1d(3, 5, 4, stride=3, padding=2), torch.randn(2, 3, 20)),
        (nn.Conv1d(3, 5, 3), torch.randn(3, 20)),
        (nn.Linear(6, 5), torch.randn(2, 4, 6)),
    ]
    for layer, tensor in cases:
        target = _target(layer)
        rows = torch.cat(list(target.rows(tensor)))
        found = rows @ target.matrix.t() + layer.bias
        output = layer(tensor)
        if not isinstance(layer, nn.Linear):
            output = output.movedim(-1 - len(layer.kernel_size), -1)
        assert torch.allclose(found, output.reshape(found.shape), atol=1e-5)


def test_second_moments_are_means_over_all_rows() -> None:
    target = _target(nn.Linear(4, 3))
    parts = [torch.randn(5, 4), torch.randn(1, 3, 4)]
    rows = torch.cat([part.reshape(-1, 4) for part in parts])
    assert torch.allclose(second_moments(target, parts), rows.t() @ rows / len(rows), atol=1e-6)


def test_layers_without_rows_say_why() -> None:
    assert "embedding" in str(_target(nn.Embedding(4, 8)).why_data_free())
    assert "grouped" in str(_target(nn.Conv2d(4, 4, 3, groups=4)).why_data_free())
    assert "dimensions" in str(_target(nn.Conv3d(4, 4, 3)).why_data_free())
    assert _target(nn.Conv2d(4, 4, 3)).why_data_free() is None
