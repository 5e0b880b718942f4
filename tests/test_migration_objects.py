"""What mono-quant 1.1 answers and takes besides models: configurations, validations, layers and errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import mono_quant
from mono_quant import (
    QuantizationConfig,
    ValidationResult,
    check_accuracy_warnings,
    quantize,
    validate_quantization,
)
from mono_quant.api import ConfigurationError, InputError, MonoQuantError, QuantizationError, QuantizationResult
from mono_quant.api import ValidationError as ApiValidationError
from mono_quant.core import QuantizationInfo
from mono_quant.modules import QuantizedEmbedding, QuantizedLinear
from mono_quant.report import calculate_model_size, calculate_sqnr


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


class TestConfiguration:
    def test_fields_and_defaults(self) -> None:
        config = QuantizationConfig()
        assert (config.dtype, config.symmetric, config.per_channel, config.bits) == (torch.qint8, None, True, 8)

    def test_from_kwargs_takes_arguments_before_the_configuration_before_defaults(self) -> None:
        default = QuantizationConfig(symmetric=True)
        custom = QuantizationConfig.from_kwargs(default, dtype=torch.float16, per_channel=False)
        assert (custom.dtype, custom.symmetric, custom.per_channel) == (torch.float16, True, False)
        assert QuantizationConfig.from_kwargs() == QuantizationConfig()
        assert QuantizationConfig.from_kwargs(symmetric=False).symmetric is False

    @pytest.mark.parametrize(
        "values",
        [{"dtype": torch.int32}, {"bits": 3}, {"bits": 4, "dtype": torch.quint8}, {"bits": 16, "dtype": torch.qint8}],
    )
    def test_impossible_values_are_value_errors(self, values: dict[str, object]) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - that the type is ValueError is the contract
            QuantizationConfig(**values)  # type: ignore[arg-type]


class TestValidation:
    def test_the_fields_of_1_1(self) -> None:
        model = make_model()
        result = quantize(model, bits=8, dynamic=True)
        for validation in (
            result.validate(original=model),
            result.validate(model, "warn"),
            validate_quantization(model, result.model),
            validate_quantization(model, result.model, on_failure="ignore"),
        ):
            assert isinstance(validation, ValidationResult)
            assert validation.sqnr_db > 30
            assert validation.compression_ratio > 3
            assert validation.original_size_mb > validation.quantized_size_mb > 0
            assert validation.load_test_passed
            assert validation.weight_range_valid
            assert validation.errors == []

    def test_the_original_is_needed(self) -> None:
        with pytest.raises(InputError, match="original"):
            quantize(make_model(), dynamic=True).validate()

    def test_a_broken_model_fails_as_asked(self) -> None:
        model = make_model()
        broken = quantize(model, dynamic=True).model
        broken[0].weight_scale[3] = torch.nan
        with pytest.raises(ValueError, match="0"):
            validate_quantization(model, broken)
        with pytest.warns(UserWarning, match="0"):
            validate_quantization(model, broken, on_failure="warn")
        assert not validate_quantization(model, broken, on_failure="ignore").weight_range_valid

    def info(self, **values: object) -> QuantizationInfo:
        fields: dict[str, object] = {
            "selected_layers": ["0", "1"], "skipped_layers": [], "calibration_samples_used": 100,
            "dtype": torch.qint8, "symmetric": False, "sqnr_db": 8.0,
        }  # fmt: skip
        return QuantizationInfo(**fields | values)  # type: ignore[arg-type]

    def test_accuracy_warnings(self) -> None:
        info = check_accuracy_warnings(self.info(), on_failure="ignore")
        assert any("CRITICAL" in warning for warning in info.warnings)
        with pytest.raises(ValueError, match=r"8\.0"):
            check_accuracy_warnings(self.info(), on_failure="error")
        with pytest.warns(UserWarning, match=r"8\.0"):
            check_accuracy_warnings(self.info())
        fine = check_accuracy_warnings(self.info(sqnr_db=40.0, skipped_layers=["2"]))
        assert fine.warnings == []

    def test_metrics(self) -> None:
        size, parameters = calculate_model_size(nn.Linear(128, 256))
        assert parameters == 128 * 256 + 256
        assert size == pytest.approx(4 * parameters / 2**20)
        weight = torch.randn(64, 128)
        quantized = mono_quant.core.quantize_weight_int8(weight)
        assert calculate_sqnr(weight, quantized) > 30
        assert calculate_sqnr(weight, weight) == float("inf")

    def test_the_result_of_a_quantization_can_be_made_by_hand(self) -> None:
        result = QuantizationResult(model=nn.Linear(10, 20), info=self.info())
        assert result.success
        assert result
        assert result.errors == result.warnings == []


class TestModules:
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_factories_by_keyword(self, symmetric: bool) -> None:
        linear = QuantizedLinear.from_linear(nn.Linear(128, 64), symmetric=symmetric)
        assert linear(torch.randn(32, 128)).shape == (32, 64)
        table = QuantizedEmbedding.from_embedding(nn.Embedding(100, 16), symmetric=symmetric)
        assert table(torch.tensor([3, 4])).shape == (2, 16)
        conv = mono_quant.modules.quantize_conv2d_module(nn.Conv2d(3, 6, 3), symmetric=symmetric)
        assert conv._quantized_weight.dtype == torch.qint8

    def test_factories_by_position_and_what_the_layers_say_of_themselves(self) -> None:
        linear = QuantizedLinear.from_linear(nn.Linear(128, 64), True)
        conv = mono_quant.modules.QuantizedConv2d.from_conv2d(nn.Conv2d(3, 6, 3), True)
        table = QuantizedEmbedding.from_embedding(nn.Embedding(100, 16), False)
        assert [layer.symmetric for layer in (linear, conv, table)] == [True, True, False]
        assert {layer.dtype for layer in (linear, conv, table)} == {torch.qint8}

    def test_convert_to_pytorch_native(self) -> None:
        quantized = mono_quant.quantize(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), dynamic=True).model
        assert [type(layer) for layer in mono_quant.modules.convert_to_pytorch_native(quantized)] == [
            nn.Linear,
            nn.ReLU,
        ]

    def test_exceptions_under_their_older_path(self) -> None:
        assert importlib.import_module("mono_quant.api.exceptions").InputError is mono_quant.InputError

    def test_int4(self) -> None:
        layer = mono_quant.modules.quantize_linear_module_int4(nn.Linear(128, 256), group_size=128)
        assert layer(torch.randn(32, 128)).shape == (32, 256)


class TestExceptions:
    @pytest.mark.parametrize("error", [QuantizationError, ApiValidationError, ConfigurationError, InputError])
    def test_one_base_a_message_and_a_suggestion(self, error: type[MonoQuantError]) -> None:
        assert issubclass(error, MonoQuantError)
        caught = error("Layer is too small", suggestion="Use group_size=64")
        assert (caught.message, caught.suggestion) == ("Layer is too small", "Use group_size=64")
        assert str(caught) == "Layer is too small\n\nSuggestion: Use group_size=64"
        assert str(error("Layer is too small")) == "Layer is too small"
