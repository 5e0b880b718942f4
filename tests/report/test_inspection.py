"""Files are inspected without reading their tensors, and checkpoints are validated by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mono_quant.core import LayerInfo, QuantizationInfo
from mono_quant.errors import CheckpointError, ConfigurationError, ValidationError
from mono_quant.io import save_model
from mono_quant.report import inspect_file, model_bytes, validate_checkpoint
from mono_quant.report.inspection import DtypeUse
from tests.report.models import SCHEMES, network, quantized


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_summary_tells_dtypes_bytes_and_layers(tmp_path: Path, scheme: str, suffix: str) -> None:
    twin = quantized(network(), SCHEMES[scheme])
    path = tmp_path / f"model{suffix}"
    save_model(twin, path)
    summary = inspect_file(path)
    assert summary.path == path
    assert summary.file_bytes == path.stat().st_size
    assert summary.tensor_bytes == model_bytes(twin)
    assert summary.tensors == len(twin.state_dict())
    assert summary.header is not None
    assert {name: record.scheme for name, record in summary.header.layers.items()} == dict.fromkeys(
        ("0", "3.0", "4"), SCHEMES[scheme]
    )
    document = json.loads(json.dumps(summary.to_dict()))
    assert document["layers"]["3.0"]["scheme"] == SCHEMES[scheme].to_dict()
    assert document["tensor_bytes"] == model_bytes(twin)


def test_dtypes_are_listed_by_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(10, dtype=torch.int8), "c": torch.zeros(2, 2)}, path)
    summary = inspect_file(path)
    assert summary.dtypes == {"float32": DtypeUse(2, 7, 28), "int8": DtypeUse(1, 10, 10)}
    assert list(summary.dtypes) == ["float32", "int8"]
    assert summary.header is None
    assert summary.to_dict()["format_version"] is None


def test_what_was_skipped_and_measured_is_in_the_summary(tmp_path: Path) -> None:
    model = network()
    twin = quantized(model, SCHEMES["int8"])
    info = QuantizationInfo(
        ["0", "3.0", "4"], ["2"], 0, torch.qint8, True, sqnr_db=41.5, skip_reasons={"2": "no counterpart"}
    )
    save_model(twin, tmp_path / "model.safetensors", info)
    document = inspect_file(tmp_path / "model.safetensors").to_dict()
    assert document["skipped"] == {"2": "no counterpart"}
    assert document["measurements"] == {"sqnr_db": 41.5}


def test_a_damaged_file_cannot_be_inspected(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        inspect_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sound_checkpoint_passes(tmp_path: Path, scheme: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    twin = quantized(network(), SCHEMES[scheme])
    save_model(twin, path)
    result = validate_checkpoint(path)
    assert (result.errors, result.load_test_passed, result.weight_range_valid) == ([], True, True)
    assert result.quantized_size_mb == model_bytes(twin) / 2**20


def test_a_checkpoint_of_a_state_dict_passes(tmp_path: Path) -> None:
    twin = quantized(network(), SCHEMES["int4"])
    layers = {layer: LayerInfo(SCHEMES["int4"], 0, 0) for layer in ("0", "3.0", "4")}
    info = QuantizationInfo(list(layers), [], 0, torch.qint8, True, layers=layers)
    save_model(twin.state_dict(), tmp_path / "model.safetensors", info)
    assert validate_checkpoint(tmp_path / "model.safetensors").errors == []


def test_a_file_without_header_fails(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "plain.safetensors")
    result = validate_checkpoint(tmp_path / "plain.safetensors", on_failure="ignore")
    assert "has no header" in result.errors[0]
    assert not result.load_test_passed


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
def test_a_truncated_checkpoint_fails(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "model.safetensors"
    save_model(quantized(network(), SCHEMES["int8"]), path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValidationError, match=r"model\.safetensors"):
        validate_checkpoint(path)


def test_damaged_numbers_fail_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    twin = quantized(network(), SCHEMES["int8"])
    scale = twin.get_submodule("3.0").weight_scale
    assert isinstance(scale, Tensor)
    scale[0] = float("inf")
    save_model(twin, path)
    with pytest.raises(ValidationError, match=r"layer '3\.0' has 1 scales"):
        validate_checkpoint(path)
    with pytest.warns(UserWarning, match=r"layer '3\.0'"):
        assert not validate_checkpoint(path, on_failure="warn").weight_range_valid


def rewritten(path: Path, change: dict[str, Tensor | None]) -> None:
    """Replace or remove tensors of a checkpoint and leave its header as it was."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if change.get(name, tensor) is not None}
    save_file(tensors | {name: new for name, new in change.items() if new is not None}, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, "no tensor 0.weight"),
        ({"0.weight_scale": None}, "0.weight_scale"),
        ({"0.weight": torch.ones(64, 32)}, "0.weight"),
        ({"other.weight_scale": torch.ones(2, 1), "other.weight": torch.ones(2, 3)}, "header does not know"),
        ({"2.weight": torch.full((64,), float("nan"))}, "2.weight holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_the_header_fail(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_model(quantized(network(), SCHEMES["int8"]), path)
    rewritten(path, change)
    result = validate_checkpoint(path, on_failure="ignore")
    assert any(message in error for error in result.errors), result.errors
    assert not result.load_test_passed


def test_a_file_that_is_not_there_is_no_failed_validation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        validate_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(ConfigurationError):
        validate_checkpoint(tmp_path / "none.safetensors", on_failure="explode")
