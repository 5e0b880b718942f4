"""Bad data, bad weights and bad options: named, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant import ops
from mono_quant.errors import ConfigurationError, InputError, InputTypeError, QuantizationError
from mono_quant.graph import StaticOptions, program, quantize_static
from mono_quant.ops import native
from tests.graph.conftest import decibels, example_of
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


WINDOWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(4, 8, 5), (4, 9)),
    "strides": (lambda: nn.Conv2d(4, 8, 5, stride=3), (9, 3)),
    "groups": (lambda: nn.Conv2d(4, 8, 5, stride=3, groups=2), (4, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 5, groups=4), (4, 4)),
    "dilation": (lambda: nn.Conv2d(4, 8, 3, dilation=3, padding=1), (4, 9)),
    "maxima": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.MaxPool2d(5)), (9, 4)),
    "rounded up": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.MaxPool2d(5, 2, ceil_mode=True)), (3, 9)),
    "means": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.AvgPool2d(5)), (4, 9)),
    "one dimension": (lambda: nn.Conv1d(4, 8, 5, stride=2), (4,)),
    "nothing": (lambda: nn.Conv2d(4, 8, 3, padding=1), (0, 5)),
}


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_an_image_that_is_smaller_than_a_window_is_refused_by_every_backend(name: str, batch: int) -> None:
    make, sides = WINDOWS[name]
    model = nn.Sequential(make(), nn.ReLU(), nn.Flatten(2)).eval()
    large = tuple(12 for _ in sides)
    quantized, _ = quantize_static(model, torch.randn(4, 4, *large))
    with pytest.raises(RuntimeError), torch.no_grad():
        model(torch.randn(batch, 4, *sides))
    for backend in ("native", "torch", "reference"):
        if backend == "native" and not native.is_loaded():
            continue
        with ops.use_backend(backend):
            with pytest.raises(InputError, match="the static graph failed at"):
                quantized(torch.randn(batch, 4, *sides))
            with torch.no_grad():
                assert quantized(torch.randn(batch, 4, *large)).shape == model(torch.randn(batch, 4, *large)).shape


def test_a_last_window_may_reach_beyond_the_image_where_sizes_are_rounded_up() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.MaxPool2d(4, 2, ceil_mode=True), nn.Conv2d(8, 8, 1)).eval()
    quantized, _ = quantize_static(model, torch.randn(16, 4, 12, 12))
    x = torch.randn(2, 4, 3, 9)
    with torch.no_grad():
        assert decibels(model(x), quantized(x)) > 25
