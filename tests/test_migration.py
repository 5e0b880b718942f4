"""Who comes from mono-quant 1.1 finds its calls again: the same names, arguments and fields, with right results."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mono_quant import (
    QuantizationConfig,
    check_accuracy_warnings,
    dequantize_model,
    dynamic_quantize,
    load_model,
    quantize,
    revert_to_standard_modules,
    save_model,
    static_quantize,
    validate_quantization,
)
from mono_quant.api import ConfigurationError, InputError, MonoQuantError, QuantizationError
from mono_quant.modules import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear, QuantizedModule


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


class Nested(nn.Module):
    """Layers at several depths, which 1.1 left in float without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2)])
        self.head = nn.ModuleDict({"out": nn.Linear(32, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x)
        return self.head["out"](x)


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]


PUBLIC_NAMES = {
    "mono_quant": [
        "__version__", "quantize", "QuantizationConfig", "dynamic_quantize", "revert_to_standard_modules",
        "dequantize_model", "save_model", "load_model", "ValidationResult", "validate_quantization",
        "check_accuracy_warnings", "static_quantize",
    ],
    "mono_quant.calibration": ["run_calibration"],
    "mono_quant.api": [
        "quantize", "QuantizationResult", "MonoQuantError", "QuantizationError", "ValidationError",
        "ConfigurationError", "InputError",
    ],
    "mono_quant.api.result": ["QuantizationResult"],
    "mono_quant.config": ["QuantizationConfig"],
    "mono_quant.core": [
        "QuantizationScheme", "SymmetricScheme", "AsymmetricScheme", "calculate_scale_zp_per_tensor",
        "calculate_scale_zp_per_channel", "calculate_scale_zp_groupwise", "get_dtype_range", "quantize_weight_int8",
        "quantize_weight_int4", "quantize_weight_fp16", "dequantize_weight", "QuantizationInfo",
    ],
    "mono_quant.io": [
        "save_model", "load_model", "save_pytorch", "load_pytorch", "save_safetensors", "load_safetensors",
        "QuantizationInfo",
    ],
    "mono_quant.modules": [
        "QuantizedLinear", "QuantizedConv2d", "QuantizedEmbedding", "quantize_linear_module",
        "quantize_linear_module_int4", "quantize_conv2d_module", "quantize_embedding_module",
    ],
    "mono_quant.report": ["calculate_model_size", "calculate_sqnr", "ValidationResult", "validate_quantization"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in PUBLIC_NAMES.items() for name in names]
)
def test_the_name_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("call", "parameters"),
    [
        (quantize, ["model", "bits", "dynamic", "scheme", "calibration_data", "show_progress"]),
        (dynamic_quantize, ["model", "dtype", "symmetric", "per_channel", "config"]),
        (
            static_quantize,
            ["model", "calibration_data", "dtype", "symmetric", "per_channel", "layer_types", "skip_types",
             "layer_names", "skip_names", "num_calibration_samples", "config", "on_failure", "run_validation",
             "modules_to_not_convert", "skip_layer_types", "skip_layer_names", "skip_param_threshold", "group_size",
             "accuracy_warning", "sqnr_warning_threshold", "sqnr_error_threshold"],
        ),
        (dequantize_model, ["model", "inplace"]),
        (revert_to_standard_modules, ["model", "inplace"]),
        (save_model, ["model", "path", "quantization_info"]),
        (validate_quantization, ["original", "quantized", "on_failure"]),
        (
            check_accuracy_warnings,
            ["info", "sqnr_warning_threshold", "sqnr_error_threshold", "all_layers_quantized_warning",
             "low_calibration_warning", "on_failure"],
        ),
        (QuantizationConfig, ["dtype", "symmetric", "per_channel", "bits"]),
    ],
)  # fmt: skip
def test_positional_arguments_stand_where_they_stood(call: object, parameters: list[str]) -> None:
    found = list(inspect.signature(call).parameters)  # type: ignore[arg-type]
    assert found[: len(parameters)] == parameters


class TestReadme:
    def test_dynamic_quantization(self, tmp_path: Path) -> None:
        model, x = make_model(), torch.randn(3, 128)
        result = quantize(model, bits=8, dynamic=True)
        assert result
        assert f"{result.info.compression_ratio:.2f}x" > "3"
        assert result.info.sqnr_db > 30
        result.save(tmp_path / "model_quantized.pt")
        result.save(str(tmp_path / "model_quantized.safetensors"))
        for name in ("model_quantized.pt", "model_quantized.safetensors"):
            assert torch.equal(load_model(tmp_path / name, make_model())(x), result.model(x))

    def test_int4_needs_no_calibration_data_any_more(self) -> None:
        result = quantize(make_model(), bits=4, group_size=128)
        assert result.info.selected_layers == ["0", "2"]
        assert result.info.compression_ratio > 5

    def test_fp16(self) -> None:
        model, x = make_model(), torch.randn(3, 128)
        result = quantize(model, bits=16, dynamic=True)
        assert result.info.dtype == torch.float16
        torch.testing.assert_close(result.model(x), model(x), atol=1e-2, rtol=1e-2)

    def test_positional_arguments(self) -> None:
        result = quantize(make_model(), 8, True, "asymmetric", None, False)
        assert result.info.symmetric is False
        assert quantize(make_model(), 8, True, "symmetric").info.symmetric is True

    def test_calibration_data_mean_static_quantization(self) -> None:
        model, data = make_model(), [torch.randn(4, 128) for _ in range(50)]
        result = quantize(model, bits=8, dynamic=False, calibration_data=data)
        assert result.info.calibration_samples_used == 150
        torch.testing.assert_close(result.model(data[0]), model(data[0]), atol=0.05, rtol=0.05)
        with pytest.raises(InputError, match="calibration_data"):
            quantize(make_model(), bits=8, dynamic=False)

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
    def test_from_a_file(self, tmp_path: Path, suffix: str) -> None:
        path, state = tmp_path / f"model{suffix}", make_model().state_dict()
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        for given in (path, str(path)):
            result = quantize(given, bits=8, dynamic=True)
            assert result.model["0.weight"].dtype == torch.int8
            assert result.info.selected_layers == ["0", "2"]

    def test_from_a_state_dict(self) -> None:
        result = quantize(make_model().state_dict(), bits=8, dynamic=True)
        assert result.model["2.weight"].dtype == torch.int8


class TestQuantizeOptions:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"modules_to_not_convert": ["head.out"]}, ["encoder.0.0", "encoder.1.0"]),
            ({"skip_layer_names": ["encoder.0.0"]}, ["encoder.1.0", "head.out"]),
            ({"skip_layer_types": (nn.Embedding,)}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"skip_layer_types": nn.Embedding}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"skip_param_threshold": 1000}, ["encoder.0.0", "encoder.1.0"]),
            ({"layer_types": [nn.Linear]}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"layer_names": ["head.out"]}, ["head.out"]),
            ({"skip_names": ["head.out"]}, ["encoder.0.0", "encoder.1.0"]),
            ({"skip_types": [nn.Conv2d]}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"symmetric": False, "per_channel": False}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"dtype": torch.float16}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"config": QuantizationConfig(symmetric=False)}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"run_validation": False, "on_failure": "warn"}, ["encoder.0.0", "encoder.1.0", "head.out"]),
            ({"accuracy_warning": "ignore"}, ["encoder.0.0", "encoder.1.0", "head.out"]),
        ],
    )
    def test_options_of_1_1_are_taken(self, options: dict[str, object], expected: list[str]) -> None:
        result = quantize(Nested(), bits=8, dynamic=True, **options)  # type: ignore[arg-type]
        assert result.info.selected_layers == expected == quantized_names(result.model)
        left = {"encoder.0.0", "encoder.1.0", "head.out"} - set(expected)
        assert left <= set(result.info.skipped_layers)
        assert all(result.info.skip_reasons[name] for name in left)

    def test_an_unknown_option_is_an_error_and_not_ignored(self) -> None:
        with pytest.raises(TypeError, match="modules_to_convert"):
            quantize(make_model(), bits=8, modules_to_convert=["0"])  # type: ignore[call-arg]

    @pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 3}, {"scheme": "diagonal"}])
    def test_impossible_values_say_what_is_possible(self, options: dict[str, object]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            quantize(make_model(), dynamic=True, **options)  # type: ignore[arg-type]
        assert isinstance(caught.value, ValueError)

    def test_failure_raises_and_is_never_a_result_that_did_not_succeed(self) -> None:
        model = make_model()
        with torch.no_grad():
            model[2].weight[0, 0] = torch.nan
        with pytest.raises(QuantizationError, match="2"):
            quantize(model, dynamic=True)

    def test_progress_and_silence(self, capsys: pytest.CaptureFixture[str]) -> None:
        quantize(make_model(), dynamic=True, show_progress=False)
        assert capsys.readouterr() == ("", "")
        quantize(make_model(), dynamic=True, show_progress=True)
        assert capsys.readouterr().out == ""


class TestDynamicQuantize:
    def make(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 10)).eval()

    def test_answers_a_model_and_what_was_skipped(self) -> None:
        quantized, skipped = dynamic_quantize(self.make(), dtype=torch.qint8)
        assert skipped == ["1"]
        assert isinstance(quantized[0], QuantizedLinear)

    def test_is_asymmetric_unless_told_otherwise(self) -> None:
        assert not dynamic_quantize(self.make())[0][0].scheme.symmetric
        assert dynamic_quantize(self.make(), torch.qint8, True)[0][0].scheme.symmetric

    def test_skips_by_type_by_size_and_by_name(self) -> None:
        assert "1" in dynamic_quantize(self.make(), skip_layer_types=(nn.LayerNorm,))[1]
        assert dynamic_quantize(self.make(), skip_param_threshold=3000)[1] == ["1", "2"]
        assert dynamic_quantize(self.make(), modules_to_not_convert=["0"])[1] == ["0", "1"]
        assert dynamic_quantize(self.make(), skip_layer_names=["2"])[1] == ["1", "2"]

    def test_fp16(self) -> None:
        quantized, _ = dynamic_quantize(self.make(), dtype=torch.float16)
        assert quantized[0].state_dict()["weight"].dtype == torch.float16

    def test_the_configuration_wins_over_the_single_options(self) -> None:
        config = QuantizationConfig(dtype=torch.qint8, symmetric=True)
        assert dynamic_quantize(self.make(), symmetric=False, config=config)[0][0].scheme.symmetric

    def test_nested_layers_are_quantized_too(self) -> None:
        model, x = Nested().eval(), torch.randn(5, 32)
        quantized, skipped = dynamic_quantize(model)
        assert skipped == []
        assert quantized_names(quantized) == ["encoder.0.0", "encoder.1.0", "head.out"]
        torch.testing.assert_close(quantized(x), model(x), atol=0.05, rtol=0.05)

    def test_a_bare_layer_is_a_model_too(self) -> None:
        quantized, skipped = dynamic_quantize(nn.Linear(8, 4))
        assert isinstance(quantized, QuantizedLinear)
        assert skipped == []

    def test_convolutions_and_embeddings_are_quantized_too(self) -> None:
        model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "table": nn.Embedding(20, 8)})
        quantized, _ = dynamic_quantize(model)
        assert isinstance(quantized["conv"], QuantizedConv2d)
        assert isinstance(quantized["table"], QuantizedEmbedding)

    def test_the_original_is_not_touched(self) -> None:
        model = Nested()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        dynamic_quantize(model)
        assert quantized_names(model) == []
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class TestTheWayBack:
    def test_standard_modules(self) -> None:
        quantized, x = quantize(make_model(), dynamic=True).model, torch.randn(3, 128)
        standard = revert_to_standard_modules(quantized)
        assert type(standard[0]) is nn.Linear
        assert standard[0].weight.dtype == torch.float32
        assert isinstance(quantized[0], QuantizedLinear)
        torch.testing.assert_close(standard(x), quantized(x), atol=0.05, rtol=0.05)

    def test_dequantized_models_hold_floats_only(self) -> None:
        quantized = quantize(Nested(), dynamic=True).model
        restored = dequantize_model(quantized)
        assert all(tensor.dtype == torch.float32 for tensor in restored.state_dict().values())
        assert restored.state_dict().keys() == Nested().state_dict().keys()
        assert quantized_names(quantized)

    def test_in_place(self) -> None:
        quantized = quantize(Nested(), dynamic=True).model
        assert dequantize_model(quantized, inplace=True) is quantized
        assert not quantized_names(quantized)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
    def test_saving_and_loading_plain_models(self, tmp_path: Path, suffix: str) -> None:
        linear, path = nn.Linear(10, 20), str(tmp_path / f"model{suffix}")
        save_model(linear, path)
        state = load_model(path)
        assert isinstance(state, dict)
        assert torch.equal(state["weight"], linear.weight.detach())
        assert torch.equal(load_model(path, device=torch.device("cpu"))["bias"], linear.bias.detach())

    def test_other_extensions_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"\.onnx"):
            save_model(nn.Linear(2, 2), str(tmp_path / "model.onnx"))
        assert list(tmp_path.iterdir()) == []

    def test_information_goes_into_the_file(self, tmp_path: Path) -> None:
        result = quantize(make_model(), dynamic=True)
        path = str(tmp_path / "quantized.safetensors")
        save_model(result.model, path, quantization_info=result.info)
        state = load_model(path)
        assert state["0.weight"].dtype == torch.int8

    def test_the_older_keywords_of_save_model_are_taken(self, tmp_path: Path) -> None:
        result = quantize(make_model(), dynamic=True)
        path = tmp_path / "quantized.safetensors"
        save_model(
            result.model, str(path), quantization_info=result.info, original_size_mb=1.0, quantized_size_mb=0.25,
            compression_ratio=4.0, sqnr_db=40.0,
        )  # fmt: skip
        assert path.exists()

    def test_a_pickled_module_is_refused_and_says_how_to_allow_it(self, tmp_path: Path) -> None:
        torch.save(make_model(), tmp_path / "module.pt")
        with pytest.raises(MonoQuantError, match="allow_pickle"):
            load_model(tmp_path / "module.pt")


class TestStaticQuantize:
    DATA = tuple(torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)) for seed in range(4))

    def test_answers_a_model_and_what_was_done(self) -> None:
        model = make_model()
        quantized, info = static_quantize(model, self.DATA, layer_types=[nn.Linear])
        assert info.selected_layers == ["0", "2"]
        assert info.calibration_samples_used == 32
        assert info.sqnr_db is not None
        assert info.sqnr_db > 30
        assert info.compression_ratio is not None
        assert info.compression_ratio > 3
        assert info.warnings == []
        torch.testing.assert_close(quantized(self.DATA[0]), model(self.DATA[0]), atol=0.05, rtol=0.05)

    def test_float16_needs_no_calibration(self) -> None:
        quantized, info = static_quantize(make_model(), self.DATA, dtype=torch.float16)
        assert info.dtype == torch.float16
        assert info.calibration_samples_used == 0
        assert quantized_names(quantized) == ["0", "2"]

    def test_four_bits_come_in_the_configuration(self) -> None:
        config = QuantizationConfig(bits=4, symmetric=False)
        quantized, info = static_quantize(make_model(), self.DATA, group_size=64, config=config)
        assert {layer.scheme.group_size for layer in info.layers.values()} == {64}
        assert not info.layers["0"].scheme.symmetric
        assert quantized_names(quantized) == ["0", "2"]

    def test_both_values_of_symmetric_mean_the_same_and_a_group_size_is_answered(self) -> None:
        answers = [static_quantize(make_model(), self.DATA, symmetric=value)[1] for value in (True, False)]
        assert [info.layers["0"].scheme.symmetric for info in answers] == [True, True]
        _, info = static_quantize(make_model(), self.DATA, group_size=64)
        assert info.warnings == ["group_size=64 has no effect: only 4-bit weights are grouped"]

    def test_skips_as_everywhere(self) -> None:
        for options in ({"skip_names": ["2"]}, {"modules_to_not_convert": ["2"]}, {"skip_param_threshold": 5000}):
            _, info = static_quantize(make_model(), self.DATA, **options)  # type: ignore[arg-type]
            assert info.selected_layers == ["0"]

    def test_what_cannot_be_honoured_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="per_channel=False"):
            static_quantize(make_model(), self.DATA, per_channel=False)
        with pytest.raises(InputError, match="needs calibration_data"):
            static_quantize(make_model(), None)
