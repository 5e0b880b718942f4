"""Bad data, bad weights and bad options: named, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mono_quant.errors import ConfigurationError, InputError, InputTypeError, QuantizationError
from mono_quant.graph import StaticOptions, program, quantize_static
from tests.graph.conftest import example_of
from tests.graph.networks import small


@pytest.mark.parametrize("capture", [True, False])
def test_bad_data_is_named_and_the_model_left_as_it_was(capture: bool) -> None:
    model = small()
    model.train()
    good = torch.randn(4, 3, 8, 8)

    def breaks() -> Iterator[Tensor]:
        yield good
        raise OSError("gone")

    cases: list[tuple[Any, type[Exception], str]] = [
        ([], InputError, "empty"),
        ([good, good * torch.nan], InputError, "batch 1 holds NaN"),
        ([good, torch.randn(4, 2, 8, 8)], InputError, "batch 1"),
        ([good, good.double()], InputError, "batch 1"),
        ("images", InputTypeError, "str"),
        (breaks(), OSError, "gone"),
    ]
    for data, error, match in cases:
        with pytest.raises(error, match=match):
            quantize_static(model, data, StaticOptions(capture=capture))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("capture", [True, False])
def test_a_weight_that_is_not_finite_names_its_layer(capture: bool) -> None:
    model = small()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match="'2'"):
        quantize_static(model, torch.randn(8, 3, 8, 8), StaticOptions(capture=capture))


def test_nan_at_run_time_is_an_error_and_not_an_answer() -> None:
    quantized = example_of("residuals").quantized
    x = torch.randn(2, 3, 32, 32)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        quantized(x)


def test_impossible_options_are_refused() -> None:
    makers: list[Callable[[], StaticOptions]] = [
        lambda: StaticOptions(observer="best"),
        lambda: StaticOptions(calibration_samples=0),
    ]
    for make in makers:
        with pytest.raises(ConfigurationError):
            make()


def test_an_input_that_does_not_suit_a_fused_run_leaves_it_on_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = quantize_static(small(), [torch.randn(4, 3, 8, 8)])
    usual, odd = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 9)
    expected = quantized(usual)
    calls: list[tuple[int, ...]] = []
    run = program.FusedRun.__call__

    def picky(self: program.FusedRun, values: list[Any]) -> None:
        given = tuple(values[self.inputs[0]].shape)
        calls.append(given)
        if given != (2, 3, 8, 8):
            raise RuntimeError("not an input for this run")
        run(self, values)

    monkeypatch.setattr(program.FusedRun, "__call__", picky)
    first = quantized(odd)
    if not calls:
        pytest.skip("the native kernels do not run here")
    assert torch.equal(quantized(odd), first)
    assert torch.equal(quantized(usual), expected)
    # Tried once for each kind of input, and still in use for those that suit it.
    assert calls == [(2, 3, 9, 9), (2, 3, 8, 8)]
    monkeypatch.setattr(program, "_REMEMBERED", 3)
    for size in range(10, 20):
        quantized(torch.randn(2, 3, size, size))
        assert len(quantized._unfit) <= 3  # type: ignore[arg-type]
