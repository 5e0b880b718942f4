"""Validation: a sound model passes, each kind of damage is found and named, and failures do what was asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant.core import LayerInfo, LayerScheme, QuantizationInfo
from mono_quant.errors import ConfigurationError, InputTypeError, ValidationError
from mono_quant.report import ValidationResult, check_accuracy_warnings, model_bytes, validate_quantization
from tests.report.models import SCHEMES, network, quantized


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sound_model_passes_every_check(scheme: str) -> None:
    model = network()
    twin = quantized(model, SCHEMES[scheme])
    result = validate_quantization(model, twin, inputs=torch.randn(4, 32))
    assert (result.errors, result.warnings) == ([], [])
    assert result.load_test_passed
    assert result.weight_range_valid
    assert result.original_size_mb == model_bytes(model) / 2**20
    assert result.quantized_size_mb == model_bytes(twin) / 2**20
    assert result.compression_ratio == model_bytes(model) / model_bytes(twin)
    assert list(result.layer_sqnr_db) == ["0", "3.0", "4"]
    assert result.sqnr_db is not None
    assert min(result.layer_sqnr_db.values()) <= result.sqnr_db <= max(result.layer_sqnr_db.values())
    assert result.output_sqnr_db is not None
    assert result.output_sqnr_db > 10
    assert result.output_cosine is not None
    assert result.output_cosine > 0.95


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dicts_are_validated_like_their_models(scheme: str) -> None:
    model = network()
    twin = quantized(model, SCHEMES[scheme])
    expected = validate_quantization(model, twin)
    result = validate_quantization(model.state_dict(), twin.state_dict())
    assert result.errors == []
    assert result.load_test_passed
    assert result.layer_sqnr_db == expected.layer_sqnr_db
    assert (result.output_sqnr_db, result.output_cosine) == (None, None)


def test_a_model_that_has_run_and_a_bare_layer_pass_too() -> None:
    model = network()
    twin = quantized(model, SCHEMES["int8"])
    twin(torch.ones(2, 32))
    assert validate_quantization(model, twin).errors == []
    linear = nn.Linear(32, 8)
    assert validate_quantization(linear, quantized(linear, SCHEMES["int8"]), inputs=torch.ones(2, 32)).errors == []


def test_neither_model_is_changed() -> None:
    model = network().train()
    twin = quantized(model, SCHEMES["int8"])
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in (model, twin)]
    validate_quantization(model, twin, inputs=torch.randn(4, 32))
    for module, state in zip((model, twin), before, strict=True):
        assert module.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def scale(model: nn.Module, layer: str) -> Tensor:
    found = model.get_submodule(layer).weight_scale
    assert isinstance(found, Tensor)
    return found


def norm_weight(model: nn.Module) -> Tensor:
    found = model.get_submodule("2").weight
    assert isinstance(found, Tensor)
    return found.data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda twin: scale(twin, "0")[0].fill_(math.nan), "layer '0' has 1 scales"),
        (lambda twin: norm_weight(twin)[0].fill_(math.nan), "2.weight holds NaN or infinite values"),
        (lambda twin: scale(twin, "3.0").mul_(2), "signal-to-quantization-noise ratio is"),
    ],
)
def test_damage_is_found_and_named(damage: Callable[[nn.Module], object], message: str) -> None:
    model = network()
    twin = quantized(model, SCHEMES["int8"])
    damage(twin)
    with pytest.raises(ValidationError, match=message):
        validate_quantization(model, twin)
    result = validate_quantization(model, twin, on_failure="ignore")
    assert any(message in error for error in result.errors)


def test_all_failures_are_collected_before_any_is_raised() -> None:
    model = network()
    twin = quantized(model, SCHEMES["int8"])
    scale(twin, "0")[0] = math.nan
    scale(twin, "4")[0] = -1.0
    with pytest.raises(ValidationError) as caught:
        validate_quantization(model, twin)
    assert "layer '0'" in str(caught.value)
    assert "layer '4'" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_infinities_in_buffers_that_are_not_weights_are_allowed() -> None:
    model = network()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert validate_quantization(model, quantized(model, SCHEMES["int8"])).errors == []


def test_a_layer_that_the_original_lacks_is_an_error() -> None:
    model = network()
    result = validate_quantization(nn.Sequential(*list(model)[:4]), quantized(model, SCHEMES["int8"]), "ignore")
    assert any("the original has no layer '4'" in error for error in result.errors)
    assert not result.load_test_passed


def test_a_model_without_quantized_layers_fails() -> None:
    result = validate_quantization(network(), network(), "ignore")
    assert result.errors == ["no layer of the model is quantized"]
    assert result.sqnr_db is None


def test_a_tensor_that_saving_loses_is_an_error() -> None:
    model = network()
    twin = quantized(model, SCHEMES["int8"])
    twin.register_buffer("extra", torch.ones(2))
    result = validate_quantization(model, twin, "ignore")
    assert not result.load_test_passed
    assert any("extra" in error for error in result.errors)


def test_an_output_that_is_not_finite_is_an_error() -> None:
    class Overflow(nn.Module):
        def __init__(self, linear: nn.Module, factor: float) -> None:
            super().__init__()
            self.linear, self.factor = linear, factor

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x) * self.factor
            return out

    model = Overflow(nn.Linear(8, 4), 1.0)
    twin = quantized(model, SCHEMES["int8"])
    assert isinstance(twin, Overflow)
    twin.factor = math.inf
    result = validate_quantization(model, twin, "ignore", torch.ones(1, 8))
    assert "output 'output' of the quantized model holds NaN or infinite values" in result.errors


def test_the_threshold_is_the_callers_and_single_layers_only_warn() -> None:
    model = network()
    with torch.no_grad():
        # A tensor of one large value leaves little of the others; the layer is small beside the rest.
        model[4].weight.copy_(torch.full_like(model[4].weight, 1e-3))
        model[4].weight[:, 0] = 0.9
    twin = quantized(model, SCHEMES["int4 asymmetric"])
    result = validate_quantization(model, twin, min_sqnr_db=15.0)
    assert result.errors == []
    ratio = result.sqnr_db
    assert ratio is not None
    strict = validate_quantization(model, twin, "ignore", min_sqnr_db=ratio + 1)
    assert any(f"expected at least {ratio + 1:g} dB" in error for error in strict.errors)
    worst = min(result.layer_sqnr_db, key=lambda layer: result.layer_sqnr_db[layer])
    lowest = result.layer_sqnr_db[worst]
    between = validate_quantization(model, twin, min_sqnr_db=(lowest + ratio) / 2)
    assert between.errors == []
    assert repr(worst) in between.warnings[0]


def test_warn_warns_once_and_ignore_is_silent() -> None:
    model = network()
    with pytest.warns(UserWarning, match="validation failed: no layer") as caught:
        validate_quantization(model, model, on_failure="warn")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_quantization(model, model, on_failure="ignore")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"on_failure": "explode"}, ConfigurationError),
        ({"quantized": network().state_dict(), "inputs": torch.ones(1, 32)}, InputTypeError),
        ({"original": 3}, InputTypeError),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    defaults: dict[str, Any] = {"original": network(), "quantized": network()}
    with pytest.raises(error):
        validate_quantization(**(defaults | arguments))


def test_the_result_has_the_fields_of_version_1_1_in_their_order() -> None:
    result = ValidationResult(32.5, 10.2, 2.6, 3.92, True, True, [], [])
    assert (result.sqnr_db, result.original_size_mb, result.quantized_size_mb) == (32.5, 10.2, 2.6)
    assert (result.compression_ratio, result.load_test_passed, result.weight_range_valid) == (3.92, True, True)
    assert ValidationResult() == ValidationResult(None, None, None, None, False, False, [], [])


def info(**values: Any) -> QuantizationInfo:
    base: dict[str, Any] = {
        "selected_layers": ["0"],
        "skipped_layers": ["1"],
        "calibration_samples_used": 0,
        "dtype": torch.qint8,
        "symmetric": True,
    }
    return QuantizationInfo(**(base | values))


def test_nothing_is_warned_of_a_good_dynamic_quantization() -> None:
    assert check_accuracy_warnings(info(sqnr_db=40.0)).warnings == []
    assert check_accuracy_warnings(info()).warnings == []


@pytest.mark.parametrize(("ratio", "start"), [(8.0, "CRITICAL:"), (15.0, "Warning:"), (math.nan, "CRITICAL:")])
def test_a_low_ratio_is_recorded_by_its_severity(ratio: float, start: str) -> None:
    (warning,) = check_accuracy_warnings(info(sqnr_db=ratio), on_failure="ignore").warnings
    assert warning.startswith(start)


def test_a_critical_ratio_raises_or_warns_as_asked() -> None:
    with pytest.raises(ValidationError, match=r"8\.00 dB"):
        check_accuracy_warnings(info(sqnr_db=8.0), on_failure="error")
    with pytest.warns(UserWarning, match=r"8\.00 dB"):
        check_accuracy_warnings(info(sqnr_db=8.0))
    with pytest.raises(ConfigurationError):
        check_accuracy_warnings(info(), on_failure="explode")


def test_thresholds_can_be_moved_and_warnings_come_once() -> None:
    found = info(sqnr_db=30.0)
    check_accuracy_warnings(found, sqnr_warning_threshold=35.0)
    check_accuracy_warnings(found, sqnr_warning_threshold=35.0)
    assert len(found.warnings) == 1


def test_all_layers_in_four_bits_is_worth_a_word_and_eight_bits_are_not() -> None:
    four = {"0": LayerInfo(LayerScheme("weight_only", 4, group_size=32), 8, 1)}
    eight = {"0": LayerInfo(LayerScheme(), 8, 2)}
    assert len(check_accuracy_warnings(info(skipped_layers=[], layers=four)).warnings) == 1
    assert check_accuracy_warnings(info(skipped_layers=[], layers=eight)).warnings == []
    assert check_accuracy_warnings(info(layers=four)).warnings == []
    silent = check_accuracy_warnings(info(skipped_layers=[], layers=four), all_layers_quantized_warning=False)
    assert silent.warnings == []


@pytest.mark.parametrize(("samples", "warned"), [(0, False), (1, True), (49, True), (50, False)])
def test_few_calibration_samples_are_worth_a_word(samples: int, warned: bool) -> None:
    assert bool(check_accuracy_warnings(info(calibration_samples_used=samples)).warnings) == warned
    silent = check_accuracy_warnings(info(calibration_samples_used=samples), low_calibration_warning=False)
    assert silent.warnings == []
