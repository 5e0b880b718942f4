"""What is saved is what is loaded, to the bit, also in a fresh process."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import mono_quant
from mono_quant import ConfigurationError, LayerScheme
from mono_quant.io import load_model, read_header, save_model
from mono_quant.modules import QuantizedConv2d, QuantizedLinear, QuantizedModule, WeightOnlyLinear
from tests.io.models import BUILDERS, Deep, answer, build, python, quantized, same_bits

SUFFIXES = [".safetensors", ".pt"]
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 asymmetric": {"scheme": "asymmetric"},
    "int8 per tensor": {"per_channel": False},
    "int8 in groups": {"group_size": 8, "scheme": "asymmetric"},
    "int4": {"bits": 4, "group_size": 8},
    "int4 asymmetric": {"bits": 4, "group_size": 8, "scheme": "asymmetric"},
    "float16": {"bits": 16},
    "bfloat16 compute": {"compute_dtype": torch.bfloat16},
}


def load(path: Path, architecture: nn.Module, **options: Any) -> nn.Module:
    model = load_model(path, architecture, **options)
    assert isinstance(model, nn.Module)
    return model


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_scheme_comes_back_with_the_same_bits(tmp_path: Path, options: dict[str, Any], suffix: str) -> None:
    for name in ("deep", "tied", "convolutions"):
        if name == "convolutions" and "group_size" in options:
            continue
        model, path = quantized(name, **options), tmp_path / f"{name}{suffix}"
        save_model(model, path)
        loaded = load(path, build(name))
        assert same_state(model, loaded)
        assert same_bits(answer(name, model), answer(name, loaded))


def test_a_fresh_process_answers_the_same_bits(tmp_path: Path) -> None:
    expected = {}
    for name in BUILDERS:
        model = quantized(name)
        save_model(model, tmp_path / f"{name}.safetensors")
        expected[name] = answer(name, model)
    assert python(f"from tests.io.models import answer_of_files; answer_of_files({str(tmp_path)!r})").wait() == 0
    for name, tensor in expected.items():
        assert same_bits(torch.load(tmp_path / f"{name}.answer"), tensor)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["deep", "tied", "convolutions"])
def test_a_float_model_comes_back_too(tmp_path: Path, name: str, suffix: str) -> None:
    model, path = build(name), tmp_path / f"model{suffix}"
    save_model(model, path)
    assert read_header(path).layers == {}
    assert same_state(model, load(path, build(name)))


def test_the_architecture_and_the_saved_model_stay_as_they_are(tmp_path: Path) -> None:
    model, architecture = quantized("tied"), build("tied")
    before = copy.deepcopy(architecture.state_dict()), copy.deepcopy(model.state_dict())
    save_model(model, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", architecture)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.fill_(1)
    for state, now in zip(before, (architecture.state_dict(), model.state_dict()), strict=True):
        assert all(same_bits(state[name], now[name]) for name in state)
    assert type(architecture.head) is nn.Linear


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    for model in (build("tied"), quantized("tied")):
        path = tmp_path / "a.safetensors"
        save_model(model, path)
        assert "head.weight" not in load_file(path)
        assert read_header(path).tied["head.weight"] == "words.weight"
        state = load(path, build("tied")).state_dict(keep_vars=True)
        assert state["head.weight"] is state["words.weight"]
        tensors = load_model(path)
        assert isinstance(tensors, dict)
        assert tensors["head.weight"] is tensors["words.weight"]


def test_tied_weights_are_tied_again_in_an_architecture_that_does_not_tie(tmp_path: Path) -> None:
    save_model(quantized("tied"), tmp_path / "a.safetensors")
    architecture = build("tied")
    architecture.head.weight = nn.Parameter(torch.zeros(24, 16))  # type: ignore[union-attr]
    state = load(tmp_path / "a.safetensors", architecture).state_dict(keep_vars=True)
    assert state["head.weight"] is state["words.weight"]


def test_modules_reached_under_two_names_stay_one(tmp_path: Path) -> None:
    save_model(quantized("deep"), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", build("deep"))
    assert isinstance(loaded, Deep)
    assert loaded.first is loaded.again
    assert isinstance(loaded.first.up, QuantizedLinear)


def test_buffers_that_are_not_persistent_come_from_the_architecture(tmp_path: Path) -> None:
    save_model(quantized("deep"), tmp_path / "a.safetensors")
    assert "scratch" not in load_file(tmp_path / "a.safetensors")
    architecture = build("deep")
    architecture.scratch.fill_(5)  # type: ignore[operator, union-attr]
    loaded = load(tmp_path / "a.safetensors", architecture)
    assert torch.equal(loaded.scratch, torch.full((32,), 5.0))  # type: ignore[arg-type]


def test_overlapping_views_are_stored_by_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"all": base, "front": base[:6], "back": base[4:], "matrix": base.view(3, 4), "again": base}
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        save_model(state, path)
        loaded = load_model(path)
        assert read_header(path).tied == {"again": "all"}
        assert isinstance(loaded, dict)
        assert all(same_bits(loaded[name], tensor) for name, tensor in state.items())
        loaded["front"].fill_(0)
        assert torch.equal(loaded["all"], base)


def test_the_mode_and_the_memory_layout_are_the_architectures(tmp_path: Path) -> None:
    save_model(build("convolutions"), tmp_path / "a.safetensors")
    architecture = build("convolutions").to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    loaded = load(tmp_path / "a.safetensors", architecture)
    assert loaded.training
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index, union-attr]
    save_model(quantized("deep"), tmp_path / "b.safetensors")
    assert all(module.training for module in load(tmp_path / "b.safetensors", build("deep").train()).modules())


def test_hooks_on_a_layer_move_to_its_replacement(tmp_path: Path) -> None:
    save_model(quantized("bare"), tmp_path / "a.safetensors")
    architecture, calls = build("bare"), []
    architecture.register_forward_hook(lambda *_: calls.append("ran"))
    answer("bare", load(tmp_path / "a.safetensors", architecture))
    assert calls == ["ran"]


def test_an_architecture_on_the_meta_device_will_do_if_the_file_holds_everything(tmp_path: Path) -> None:
    model = quantized("convolutions")
    save_model(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        architecture = build("convolutions")
    loaded = load(tmp_path / "a.safetensors", architecture)
    assert same_bits(answer("convolutions", model), answer("convolutions", loaded))


def test_a_quantized_model_tells_its_architecture_too(tmp_path: Path) -> None:
    model = quantized("deep")
    save_model(model, tmp_path / "a.safetensors")
    for other in (model, quantized("deep", scheme="asymmetric")):
        loaded = load(tmp_path / "a.safetensors", other)
        assert same_state(model, loaded)
        assert same_bits(answer("deep", model), answer("deep", loaded))


def test_a_compiled_module_stands_for_what_it_wraps(tmp_path: Path) -> None:
    model = quantized("deep")
    save_model(torch.compile(model, backend="eager"), tmp_path / "a.safetensors")
    for architecture in (build("deep"), torch.compile(build("deep"), backend="eager")):
        assert same_state(model, load(tmp_path / "a.safetensors", architecture))


@pytest.mark.parametrize("fuse", [True, False])
def test_fused_activations_are_fused_again_and_others_are_not(tmp_path: Path, fuse: bool) -> None:
    model = quantized("deep", fuse_activations=fuse)
    save_model(model, tmp_path / "a.safetensors")
    assert bool(read_header(tmp_path / "a.safetensors").fused) is fuse
    for architecture in (build("deep"), quantized("deep", fuse_activations=True)):
        loaded = load(tmp_path / "a.safetensors", architecture)
        assert (loaded.first.up.activation == "gelu") is fuse  # type: ignore[union-attr]
        assert same_bits(answer("deep", model), answer("deep", loaded))


def test_layers_have_the_types_schemes_and_dtypes_of_the_saved_ones(tmp_path: Path) -> None:
    model = quantized("deep", bits=4, group_size=8, compute_dtype=torch.bfloat16)
    save_model(model, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", build("deep"))
    pairs = [(a, b) for a, b in zip(model.modules(), loaded.modules(), strict=True) if isinstance(a, QuantizedModule)]
    assert pairs
    for saved, again in pairs:
        assert isinstance(again, WeightOnlyLinear)
        assert (type(saved), saved.scheme, saved.float_dtype) == (type(again), again.scheme, again.float_dtype)
    record = read_header(tmp_path / "a.safetensors").layers["first.up"]
    assert record.scheme == LayerScheme("weight_only", 4, True, 8)
    assert (record.float_type, record.float_dtype) == ("Linear", torch.bfloat16)


@given(st.integers(0, 3), st.integers(1, 5), st.booleans(), st.booleans())
def test_any_linear_layer_comes_back(tmp_path_factory: Any, out: int, wide: int, bias: bool, symmetric: bool) -> None:
    path = tmp_path_factory.mktemp("linear") / "a.safetensors"
    layer = QuantizedLinear.from_float(nn.Linear(wide, 1 + out, bias=bias), LayerScheme(symmetric=symmetric))
    save_model(layer, path)
    assert same_state(layer, load(path, nn.Linear(wide, 1 + out, bias=bias)))


def test_eight_threads_load_one_file(tmp_path: Path) -> None:
    model, path = quantized("deep"), tmp_path / "a.safetensors"
    save_model(model, path)
    architecture, expected = build("deep"), answer("deep", model)
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda _: load(path, architecture), range(24)))
    assert all(same_bits(answer("deep", loaded), expected) for loaded in models)
    assert type(architecture.first.up) is nn.Linear  # type: ignore[union-attr]


def test_a_loaded_model_does_not_need_the_file_any_more(tmp_path: Path) -> None:
    model, path = quantized("deep"), tmp_path / "a.safetensors"
    save_model(model, path)
    loaded, tensors = load(path, build("deep")), load_model(path)
    with path.open("r+b") as stream:
        stream.truncate(0)
    assert same_state(model, loaded)
    assert isinstance(tensors, dict)
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values())


def test_a_model_can_replace_the_file_that_it_was_loaded_from(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(build("deep"), path)
    source = mono_quant.io.load_source(path)
    assert isinstance(source, dict)
    expected = {name: tensor.clone() for name, tensor in source.items()}
    save_model(source, path)
    loaded = load_model(path)
    assert isinstance(loaded, dict)
    assert all(same_bits(loaded[name], tensor) for name, tensor in expected.items())


def test_the_header_carries_what_the_quantization_measured_and_skipped(tmp_path: Path) -> None:
    result = mono_quant.quantize(build("deep"), skip=["first"])
    result.save(tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert header.skipped == result.info.skip_reasons
    assert header.skipped["first.up"] == "skip names 'first'"
    assert header.measurements["sqnr_db"] == result.info.sqnr_db
    assert header.measurements["compression_ratio"] == result.info.compression_ratio
    save_model(result.model, tmp_path / "a.safetensors", result.info, original_size_mb=7.5, sqnr_db=float("inf"))
    changed = read_header(tmp_path / "a.safetensors").measurements
    assert changed["original_size_mb"] == 7.5
    assert "sqnr_db" not in changed


def test_without_mono_quant_a_converted_file_loads_as_floats(tmp_path: Path) -> None:
    for name in ("deep", "tied", "convolutions"):
        model, path = quantized(name), tmp_path / "a.pt"
        save_model(model, path, convert_to_native=True)
        fresh = build(name)
        fresh.load_state_dict(torch.load(path, weights_only=True))
        reverted = mono_quant.revert_to_standard_modules(model)
        assert same_state(fresh, reverted)
        assert isinstance(next(m for m in model.modules() if isinstance(m, QuantizedModule)), QuantizedModule)
    with pytest.raises(ConfigurationError, match="convert_to_native"):
        save_model(model.state_dict(), path, convert_to_native=True)


def test_convolutions_are_the_same_type_after_loading(tmp_path: Path) -> None:
    save_model(quantized("convolutions"), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", build("convolutions"))
    assert isinstance(loaded[0], QuantizedConv2d)  # type: ignore[index]
    assert isinstance(loaded[0], nn.Conv2d)  # type: ignore[index]
