"""Static quantization from end to end: right answers for every batch, codes all the way, honest reports."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant import ops
from mono_quant.errors import InputError, QuantizationError
from mono_quant.graph import StaticGraph, StaticOptions, quantize_static
from mono_quant.graph.layers.conv import QuantizedConvolution
from mono_quant.graph.layers.elementwise import Quantize
from mono_quant.modules import notices
from tests.graph.conftest import Example, decibels, example_of, leaves
from tests.graph.networks import small


def kinds(model: nn.Module) -> list[str]:
    assert isinstance(model, StaticGraph)
    return [str(layer.kind) for layer in model.layers]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_answers_are_close_for_every_batch_size(example: Example, batch: int) -> None:
    inputs = example.inputs(batch)
    with torch.no_grad():
        expected = example.model(*inputs)
    found = example.quantized(*inputs)
    assert decibels(expected, found) > 25
    assert example.report.sqnr_db is not None
    assert example.report.sqnr_db > 30
    for exact, approximate in zip(leaves(expected), leaves(found), strict=True):
        assert approximate.shape == exact.shape
        assert approximate.dtype == exact.dtype


def test_an_empty_batch_has_an_empty_answer(example: Example) -> None:
    inputs = example.inputs(0)
    if example is example_of("decides"):
        pytest.skip("its own code decides about the sum of its values")
    for tensor in leaves(example.quantized(*inputs)):
        assert tensor.shape[0] == 0


def test_a_sample_does_not_depend_on_its_batch(graph_example: Example) -> None:
    inputs = graph_example.inputs(6)
    whole = leaves(graph_example.quantized(*inputs))
    for index in (0, 5):
        single = leaves(graph_example.quantized(*[tensor[index : index + 1] for tensor in inputs]))
        for alone, together in zip(single, whole, strict=True):
            torch.testing.assert_close(alone[0], together[index], rtol=1e-5, atol=1e-5)


def test_the_quantized_model_holds_buffers_only_and_the_float_model_is_untouched(graph_example: Example) -> None:
    assert list(graph_example.quantized.parameters()) == []
    before = {key: value.clone() for key, value in graph_example.model.state_dict().items()}
    graph_example.quantized(*graph_example.inputs(2))
    for key, value in graph_example.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_activations_stay_codes_between_layers() -> None:
    expected = {
        "residuals": 1, "inverted": 2, "branches": 1, "volumes": 1, "signals": 1,
    }  # fmt: skip
    for name, entries in expected.items():
        found = kinds(example_of(name).quantized)
        assert found.count("quantize") == entries, name
    assert "dequantize" not in kinds(example_of("residuals").quantized)
    assert "dequantize" not in kinds(example_of("inverted").quantized)
    assert "dequantize" not in kinds(example_of("branches").quantized)


def test_every_layer_is_quantized_and_named_as_in_the_model(graph_example: Example) -> None:
    weights = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    names = {name for name, module in graph_example.model.named_modules() if isinstance(module, weights)}
    assert names <= set(graph_example.report.layers)
    assert graph_example.report.captured
    assert graph_example.report.samples == 48


def test_the_report_says_what_runs_in_float_and_why() -> None:
    cuts = example_of("signals").report.cuts
    assert ("aten.softmax.int", "it has no 8-bit form") in {(cut.operation, cut.reason) for cut in cuts}
    assert ("aten.add.Tensor", "nothing after it takes 8-bit codes") in {(cut.operation, cut.reason) for cut in cuts}
    assert example_of("residuals").report.cuts == []


def test_the_specification_gives_the_same_answers(graph_example: Example) -> None:
    inputs = graph_example.inputs(2)
    slow = copy.deepcopy(graph_example.quantized)
    with ops.use_backend("reference"):
        expected = slow(*inputs)
    assert decibels(expected, graph_example.quantized(*inputs)) > 35


def test_other_image_sizes_are_accepted_where_the_model_allows_them() -> None:
    for name, size in (("residuals", (3, 48, 40)), ("inverted", (3, 31, 17))):
        example = example_of(name)
        assert example.report.dynamic_sizes
        x = torch.randn(3, *size)
        with torch.no_grad():
            assert decibels(example.model(x), example.quantized(x)) > 25


def test_arguments_may_be_given_by_name() -> None:
    example = example_of("signals")
    x, weights = example.inputs(3)
    expected = example.quantized(x, weights)
    for found in (example.quantized(x, weights=weights), example.quantized(weights=weights, x=x)):
        assert torch.equal(found[0], expected[0])
    for call in (
        lambda: example.quantized(x),
        lambda: example.quantized(x, weights, x),
        lambda: example.quantized(y=x),
    ):
        with pytest.raises(InputError, match="takes x, weights"):
            call()


def test_integers_beside_the_images_pass_through() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 8, 3), nn.Embedding(5, 8)

        def forward(self, x: Tensor, kind: Tensor) -> Tensor:
            return F.relu(self.conv(x)).mean((2, 3)) + self.table(kind)  # type: ignore[no-any-return]

    model = Conditional().eval()
    data = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(2)]
    quantized, _ = quantize_static(model, data)
    with torch.no_grad():
        assert decibels(model(*data[0]), quantized(*data[0])) > 30


def test_layers_named_in_skip_stay_in_float() -> None:
    model = small()
    x = torch.randn(16, 3, 8, 8)
    for capture in (True, False):
        quantized, report = quantize_static(model, x, StaticOptions(skip=frozenset({"2"}), capture=capture))
        assert report.layers == ["0"]
        assert report.skipped == {"2": "named in skip"}
        assert sum(isinstance(module, QuantizedConvolution) for module in quantized.modules()) == 1
        with torch.no_grad():
            assert decibels(model(x), quantized(x)) > 30
    with pytest.raises(QuantizationError, match="no layer"):
        quantize_static(model, x, StaticOptions(skip=frozenset({"0", "2"})))


def test_a_model_that_cannot_be_captured_is_quantized_layer_by_layer_and_says_why() -> None:
    example = example_of("decides")
    assert not example.report.captured
    assert "torch.export" in example.report.reason
    assert example.report.layers == ["conv", "head"]
    assert example.report.skipped == {
        "circular": "its padding mode is circular", "unused": "the calibration data never reached it",
    }  # fmt: skip
    assert any("layer by layer" in warning for warning in example.report.warnings)
    assert type(example.quantized) is type(example.model)
    assert not example.quantized.training


def test_half_precision_models_are_quantized_layer_by_layer() -> None:
    model = small().to(torch.bfloat16)
    x = torch.randn(8, 3, 8, 8, dtype=torch.bfloat16)
    quantized, report = quantize_static(model, x)
    assert "bfloat16" in report.reason
    assert quantized(x).dtype == torch.bfloat16
    assert decibels(model(x), quantized(x)) > 25
    assert quantized(x[0]).shape == quantized(x)[0].shape


@pytest.mark.parametrize("observer", ["minmax", "movingaverage", "entropy", "percentile"])
def test_every_observer_can_be_chosen(observer: str) -> None:
    model, x = small(), torch.randn(64, 3, 8, 8)
    quantized, _ = quantize_static(model, x, StaticOptions(observer=observer))
    with torch.no_grad():
        assert decibels(model(x), quantized(x)) > 20


def test_correcting_biases_takes_out_the_mean_error_of_rounding_weights() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False))
    x = torch.rand(64, 4, 8, 8) + 3  # far from zero, where rounding weights shifts every output
    with torch.no_grad():
        exact = model(x).mean((0, 2, 3))
    errors = {}
    for corrected in (False, True):
        quantized, _ = quantize_static(model, x, StaticOptions(correct_bias=corrected, observer="minmax"))
        errors[corrected] = float((quantized(x).mean((0, 2, 3)) - exact).abs().mean())
    assert errors[True] < errors[False] / 2


def test_equalization_helps_where_channels_differ_by_orders_of_magnitude() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    spread = torch.logspace(-2, 2, 8)
    with torch.no_grad():
        model[0].weight.mul_(spread.reshape(-1, 1, 1, 1))
        model[0].bias.mul_(spread)
        model[2].weight.div_(spread.reshape(1, -1, 1, 1))
    x = torch.randn(32, 3, 8, 8)
    ratios = {}
    for equalized in (False, True):
        quantized, _ = quantize_static(model, x, StaticOptions(equalize=equalized))
        with torch.no_grad():
            ratios[equalized] = decibels(model(x), quantized(x))
    assert ratios[True] > ratios[False] + 10


def test_a_dead_layer_is_no_obstacle() -> None:
    model = small()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    quantized, report = quantize_static(model, torch.randn(8, 3, 8, 8), StaticOptions(equalize=True))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), model(x), rtol=1e-2, atol=1e-2)
    assert report.sqnr_db is not None


def test_progress_and_the_limit_count_samples() -> None:
    for capture in (True, False):
        calls: list[tuple[int, int | None]] = []

        def note(done: int, total: int | None, label: str, calls: list[tuple[int, int | None]] = calls) -> None:
            calls.append((done, total))

        options = StaticOptions(calibration_samples=40, progress=note, capture=capture)
        _, report = quantize_static(small(), torch.randn(64, 3, 8, 8), options)
        assert calls == [(32, 40), (40, 40)]
        assert report.samples == 40


def test_the_input_is_quantized_once_for_all_its_users() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.a(x + 0)  # type: ignore[no-any-return]

    model = Twice().eval()
    x = torch.randn(8, 3, 6, 6)
    quantized, _ = quantize_static(model, x)
    assert sum(isinstance(module, Quantize) for module in quantized.modules()) == 1
    with torch.no_grad():
        assert decibels(model(x), quantized(x)) > 30


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("captured", [True, False])
def test_gradients_that_end_at_static_layers_are_reported_once(
    captured: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "_reported", set())
    caplog.set_level("WARNING", logger="mono_quant")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = [torch.randn(4, 8)]
    static, _ = quantize_static(model, data, StaticOptions(capture=captured))
    x = torch.randn(2, 8)
    static(x)
    with torch.no_grad():
        static(x.clone().requires_grad_())
    assert caplog.messages == []
    for _ in range(2):
        static(x.clone().requires_grad_())
        torch.func.jvp(static, (x,), (x,))
    assert len(caplog.messages) == 1
    assert "pass no gradient" in caplog.messages[0]
