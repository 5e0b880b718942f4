"""Static models as files: the same answers again, and one clear error for whatever is wrong with a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mono_quant
from mono_quant import CheckpointError, ConfigurationError, InputError, LayerScheme, MonoQuantError, load_model
from mono_quant.graph import StaticGraph
from mono_quant.graph.layers.functions import ATEN_FUNCTIONS
from mono_quant.io import read_header
from tests.graph.networks import Residuals
from tests.static_models import Gated, Made, made, network

SUFFIXES = (".safetensors", ".pt")


@pytest.fixture(params=["graph", "cut", "layers"])
def example(request: pytest.FixtureRequest) -> Made:
    return made(request.param)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_saved_model_answers_the_same_bits(example: Made, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    example.result.save(path)
    loaded = load_model(path, copy.deepcopy(example.model).to("meta"))
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(example.data), example.answers)
    assert not loaded.training
    mono_quant.save_model(loaded, tmp_path / f"again{suffix}", example.result.info)
    assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes() or suffix == ".pt"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_graph_needs_no_architecture(suffix: str, tmp_path: Path) -> None:
    for name in ("graph", "cut"):
        example = made(name)
        example.result.save(tmp_path / f"m{suffix}")
        loaded = load_model(tmp_path / f"m{suffix}")
        assert isinstance(loaded, StaticGraph)
        assert torch.equal(loaded(example.data), example.answers)


def test_static_layers_without_an_architecture_are_tensors(tmp_path: Path) -> None:
    example = made("layers")
    example.result.save(tmp_path / "m.safetensors")
    tensors = load_model(tmp_path / "m.safetensors")
    assert isinstance(tensors, dict)
    assert tensors["conv.layer.weight"].dtype == torch.int8
    again = load_model(tmp_path / "m.safetensors", example.result.model)
    assert isinstance(again, nn.Module)
    assert torch.equal(again(example.data), example.answers)


def test_the_header_says_what_was_done(example: Made, tmp_path: Path) -> None:
    example.result.save(tmp_path / "m.safetensors")
    header, info = read_header(tmp_path / "m.safetensors"), example.result.info
    assert header.format_version == 2
    assert header.static is not None
    assert {name: record.scheme for name, record in header.layers.items()} == {
        name: layer.scheme for name, layer in info.layers.items()
    }
    assert list(header.static.cuts) == info.cuts
    assert header.static.not_captured == info.not_captured
    assert header.static.samples == 16
    assert header.static.output_sqnr_db == info.output_sqnr_db
    assert dict(header.skipped) == info.skip_reasons


def test_files_of_other_models_keep_their_version(tmp_path: Path) -> None:
    mono_quant.quantize(nn.Linear(8, 8)).save(tmp_path / "m.safetensors")
    assert read_header(tmp_path / "m.safetensors").format_version == 1


@pytest.mark.parametrize(
    "architecture", [Residuals, lambda: nn.Linear(3, 3), lambda: _changed("head", nn.Linear(16, 6))]
)
def test_a_graph_refuses_an_architecture_that_is_not_its_own(
    architecture: Callable[[], nn.Module], tmp_path: Path
) -> None:
    made("graph").result.save(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load_model(tmp_path / "m.safetensors", architecture())


def _changed(name: str, layer: nn.Module, network_name: str = "graph") -> nn.Module:
    model, _ = network(network_name)
    setattr(model, name, layer)
    return model


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(9, 4), "the weight of 'head', found .4, 8., expected .4, 9."),
        (nn.ReLU(), "'head': the file holds a static Linear, the architecture has a ReLU"),
        (nn.Sequential(), "'head': .* a Sequential"),
    ],
)
def test_static_layers_refuse_what_does_not_fit(layer: nn.Module, message: str, tmp_path: Path) -> None:
    made("layers").result.save(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.safetensors", _changed("head", layer, "layers"))


def test_a_layer_whose_own_forward_was_replaced_cannot_become_a_static_one(tmp_path: Path) -> None:
    made("layers").result.save(tmp_path / "m.safetensors")
    model, _ = network("layers")
    model.head.forward = lambda x: x
    with pytest.raises(CheckpointError, match=r"'head': the file holds a static Linear, .* its forward was replaced"):
        load_model(tmp_path / "m.safetensors", model)


def test_places_that_cannot_hold_a_static_model_are_refused(tmp_path: Path) -> None:
    graph, info = made("graph").result.model, made("graph").result.info
    with pytest.raises(ConfigurationError, match="no place in the layout of transformers directories"):
        mono_quant.save_model(graph, tmp_path / "directory")
    with pytest.raises(InputError, match="cannot be turned back"):
        mono_quant.save_model(graph, tmp_path / "m.pt", convert_to_native=True)
    with pytest.raises(InputError, match=r"the static layer 'stem\.0'"):
        mono_quant.save_model(graph.state_dict(), tmp_path / "m.pt", info)
    with pytest.raises(InputError, match="holds a static graph as its part '0'"):
        mono_quant.save_model(nn.Sequential(graph), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


def test_static_layers_can_be_saved_as_standard_ones(tmp_path: Path) -> None:
    example = made("layers")
    mono_quant.save_model(example.result.model, tmp_path / "m.safetensors", convert_to_native=True)
    model, data = network("layers")
    model.load_state_dict(load_model(tmp_path / "m.safetensors"))  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(model(data), example.answers, atol=0.01, rtol=0)


def test_a_static_file_is_not_quantized_again(tmp_path: Path) -> None:
    made("graph").result.save(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="quantized already"):
        mono_quant.quantize(tmp_path / "m.safetensors")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Answer the tensors and the header of a file that holds a graph."""
    path = tmp_path_factory.mktemp("static") / "m.safetensors"
    made("cut").result.save(path)
    with safe_open(path, "pt") as opened:  # type: ignore[no-untyped-call]
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, json.loads(opened.metadata()["mono_quant"])


def write(path: Path, tensors: dict[str, Tensor], header: Any) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, {"mono_quant": text})
    return path


def steps_of(header: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = header["static"]["model"]["graph"]["steps"]
    return steps


def step_of(header: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(step["layer"] for step in steps_of(header) if step["layer"]["kind"] == kind)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Answer what sets a value in a header: the keys that lead to it, and the value."""
    *keys, last, value = path

    def change(header: dict[str, Any]) -> None:
        place: Any = header
        for key in keys:
            place = step_of(header, key[1:]) if isinstance(key, str) and key.startswith("@") else place[key]
        place[last] = value

    return change


def _more_dimensions(header: dict[str, Any]) -> None:
    for name in ("stride", "padding", "dilation"):
        step_of(header, "conv")["spec"][name] = [1, 1, 1]


GRAPH = ("static", "model", "graph")
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer file": (_set("format_version", 3), "format_version 3"),
    "newer graph": (_set(*GRAPH, "format_version", 99), "format 99"),
    "no record": (lambda header: header.pop("static"), "lacks the fields .'static'"),
    "old version with record": (_set("format_version", 1), "unknown fields .'static'"),
    "no kind": (_set("static", "model", {}), "neither a graph nor layers"),
    "unknown kind": (_set("static", "model", "kind", "spell"), "neither a graph nor layers"),
    "cuts": (_set("static", "cuts", [["norm"]]), "cuts"),
    "no steps": (_set(*GRAPH, "steps", None), "damaged"),
    "unknown layer": (_set("@conv", "kind", "spell"), "spell"),
    "later value": (_set(*GRAPH, "steps", 0, "inputs", [5]), "damaged"),
    "far number": (_set(*GRAPH, "steps", 3, "output", 10**12), "damaged"),
    "negative number": (_set(*GRAPH, "steps", 3, "output", -1), "damaged"),
    "lost answer": (_set(*GRAPH, "output", ["value", 999]), "never computed"),
    "unknown answer": (_set(*GRAPH, "output", ["call", "os.system"]), "damaged"),
    "scale": (_set("@conv", "spec", "input", [0.0, 3]), "scale"),
    "huge scale": (_set("@conv", "spec", "input", [1e300, 3]), "scale"),
    "zero point": (_set("@conv", "spec", "input", [1.0, 256]), "zero point"),
    "activation": (_set("@conv", "spec", "activation", ["eval", 0.0, 0.0]), "eval"),
    "stride": (_set("@conv", "spec", "stride", [0, 1]), "stride"),
    "dimensions": (_set("@conv", "spec", "stride", [1, 1, 1]), "entries"),
    "other dimensions": (_more_dimensions, "dimensions"),
    "inputs": (_set(*GRAPH, "steps", 3, "inputs", []), "expected 1"),
    "arguments": (_set("@call", "spec", "args", [{"input": 7}]), "arguments name more"),
    "flag": (_set("@global_average", "spec", "keepdim", "yes"), "keepdim"),
    "groups": (_set("@conv", "spec", "groups", 7), "groups"),
    "more spec": (_set("@conv", "spec", "command", "rm"), "cannot build"),
    "shape": (_set("@conv", "tensors", "weight_scale", ["float32", [1]]), "weight_scale"),
    "dtype": (_set("@conv", "tensors", "weight", ["int3", [16, 3, 3, 3]]), "int3"),
    "endless shape": (_set("@conv", "tensors", "weight", ["int8", [10**9, 10**9]]), "expected int8"),
    "endless linear": (_set("@dynamic_linear", "spec", "in_features", 10**9), "cannot build"),
    "function": (_set("@call", "spec", "function", "aten.from_file.default"), "'aten.from_file.default'"),
    "python": (_set("@call", "spec", "function", "python.eval"), "'python.eval'"),
    "module": (_set("@call", "spec", "function", "os.system"), "'os.system'"),
    "write": (_set("@call", "spec", "function", "aten.add_.Tensor"), "'aten.add_.Tensor'"),
    "unsafe index": (_set("@call", "spec", "function", "aten._unsafe_index.Tensor"), "_unsafe_index"),
    "argument": (_set("@call", "spec", "args", [{"module": "os"}]), "argument"),
    "buffer": (_set("@call", "spec", "args", [{"constant": "__class__"}]), "argument"),
    "device": (_set("@call", "spec", "args", [{"device": "moon"}]), "cannot build"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_one_clear_error(
    damage: str, file: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    tensors, header = file[0], copy.deepcopy(file[1])
    change, message = DAMAGES[damage]
    change(header)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(write(tmp_path / "m.safetensors", tensors, header))
    assert "m.safetensors" in str(caught.value)


def test_a_static_layer_needs_its_description(tmp_path: Path) -> None:
    mono_quant.quantize(nn.Sequential(nn.Linear(8, 8))).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as opened:  # type: ignore[no-untyped-call]
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["mono_quant"])
    header["layers"]["0"]["scheme"] = LayerScheme("int8_static").to_dict()
    with pytest.raises(CheckpointError, match="layer '0' of the header is static"):
        load_model(write(tmp_path / "n.safetensors", tensors, header))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format_version": Infinity}', "{", "null"])
def test_a_header_that_is_no_document_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_model(write(tmp_path / "m.safetensors", {"a": torch.zeros(1)}, text))


# The steps before it read the batch size, make zeros and quantize.
CONV = "layers.3.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(CONV), f"missing: '{CONV}'"),
        (lambda tensors: tensors.update({CONV: torch.zeros(1, dtype=torch.int8)}), "int8 .1., expected"),
        (lambda tensors: tensors.update({f"{CONV}_scale": torch.zeros(16).half()}), "float16 .16., expected"),
        (lambda tensors: tensors.update({"more": torch.zeros(1)}), "unexpected: 'more'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], Any], message: str, file: tuple[dict[str, Tensor], dict[str, Any]],
    tmp_path: Path,
) -> None:  # fmt: skip
    tensors = dict(file[0])
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(write(tmp_path / "m.safetensors", tensors, file[1]))


def test_left_over_tensors_can_be_tolerated(file: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {**file[0], "more": torch.zeros(1)}, file[1])
    with pytest.warns(UserWarning, match="tolerated 'more'"):
        loaded = load_model(path, strict=False)
    assert isinstance(loaded, StaticGraph)
    assert torch.equal(loaded(made("cut").data), made("cut").answers)


VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 2, 255, 256, 10**12, 0.5, -0.5, 1e300, "", "x", [], [0], [1, 1], {}, {"input": 0},
     {"input": 99}, {"constant": "weight"}, "aten.relu.default", "conv", "linear", "float32"]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_description_says_loading_and_running_end_in_an_answer_or_a_clear_error(
    data: st.DataObject, file: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    header = copy.deepcopy(file[1])
    place: Any = header["static"]["model"]["graph"]
    for _ in range(data.draw(st.integers(1, 7))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        parent, place = place, place[key]
        del parent
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    place[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    try:
        loaded = load_model(write(tmp_path / "m.safetensors", file[0], header))
        assert isinstance(loaded, nn.Module)
        loaded(made("cut").data[:2])
    except MonoQuantError:
        pass


def test_functions_on_the_list_exist_and_none_writes() -> None:
    for name in ATEN_FUNCTIONS:
        packet = getattr(torch.ops.aten, name)
        assert not name.endswith("_"), name
        assert packet.overloads(), name


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / f"m{suffix}"
        made("graph").result.save(path)
        whole = path.read_bytes()
        for share in (0.2, 0.5, 0.99):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(CheckpointError):
                load_model(path)


def test_the_example_has_all_kinds_of_steps(file: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    assert {"call", "conv", "dynamic_linear", "quantize"} <= {step["layer"]["kind"] for step in steps_of(file[1])}
    assert isinstance(made("cut").model, Gated)
