"""The header survives its JSON, and refuses whatever it does not know."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant import CheckpointError, LayerScheme
from mono_quant.io.header import FORMAT_VERSION, MEASUREMENTS, CheckpointHeader, LayerRecord, parse_header

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
schemes = st.one_of(
    st.builds(LayerScheme, symmetric=st.booleans(), per_channel=st.booleans()),
    st.builds(
        LayerScheme, st.just("weight_only"), st.sampled_from([4, 8]), st.booleans(),
        st.one_of(st.none(), st.integers(1, 1024)),
    ),
    st.just(LayerScheme("float16", 16)),
)  # fmt: skip
records = st.builds(
    LayerRecord,
    schemes,
    st.one_of(st.none(), st.sampled_from(["Linear", "Conv2d", "package.Layer"])),
    st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
headers = st.builds(
    CheckpointHeader,
    layers=st.dictionaries(names, records, max_size=4),
    skipped=st.dictionaries(names, names, max_size=3),
    tied=st.dictionaries(names, names, max_size=3),
    fused=st.dictionaries(names, names, max_size=3),
    measurements=st.dictionaries(st.sampled_from(MEASUREMENTS), numbers),
    library_version=names,
)


@given(headers)
def test_a_header_comes_back_from_its_json_unchanged(header: CheckpointHeader) -> None:
    assert parse_header(header.to_json(), "file") == header


@given(headers)
def test_the_document_is_standard_json_that_names_its_version(header: CheckpointHeader) -> None:
    document = json.loads(header.to_json(), parse_constant=lambda constant: pytest.fail(constant))
    assert document["format_version"] == header.format_version == 1


def document(**changes: Any) -> dict[str, Any]:
    header = CheckpointHeader({"a": LayerRecord(LayerScheme(), "Linear", torch.float32)})
    values: dict[str, Any] = json.loads(header.to_json())
    return {**values, **changes}


def layer(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = document()["layers"]["a"]
    return {"a": {**values, **changes}}


def scheme(**changes: Any) -> dict[str, Any]:
    return layer(scheme={**layer()["a"]["scheme"], **changes})


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 999])
def test_a_newer_version_is_refused_by_name_with_the_way_out(version: int) -> None:
    with pytest.raises(
        CheckpointError, match=f"x.safetensors has format_version {version}; .* versions 1 to 2"
    ) as caught:
        parse_header(json.dumps(document(format_version=version, anything=[1])), "x.safetensors")
    assert "newer mono-quant" in (caught.value.suggestion or "")


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True, [1]])
def test_an_impossible_version_is_refused(version: object) -> None:
    with pytest.raises(CheckpointError, match="format_version"):
        parse_header(json.dumps(document(format_version=version)), "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "a list, expected an object"),
        ("null", "null, expected an object"),
        (json.dumps(document(extra=1)), r"unknown fields \['extra'\]"),
        (json.dumps(dict(list(document().items())[:-1])), r"lacks the fields \['measurements'\]"),
        (json.dumps(document(library_version=2)), "library_version"),
        (json.dumps(document(layers=[])), "layers of the header holds a list"),
        (json.dumps(document(tied={"a": 1})), "tied of the header holds a int at 'a'"),
        (json.dumps(document(skipped={"a": None})), "skipped of the header holds null at 'a'"),
        (json.dumps(document(layers={"a": 3})), "layers of the header holds a int at 'a'"),
        (json.dumps(document(measurements={"speed": 1.0})), r"unknown fields \['speed'\]"),
        (json.dumps(document(layers=layer(color="red"))), r"layer 'a' .* unknown fields \['color'\]"),
        (json.dumps(document(layers=layer(float_dtype="int8"))), "float_dtype 'int8', expected one of float32"),
        (json.dumps(document(layers=layer(float_type=7))), "float_type or float_dtype that is no name"),
        (json.dumps(document(layers=layer(scheme=None))), "scheme that is null"),
        (json.dumps(document(layers=scheme(kind="int3"))), "layer 'a' .*'int3'"),
        (json.dumps(document(layers=scheme(bits=3))), "layer 'a' .*3 bits"),
        (json.dumps(document(layers=scheme(rotation="hadamard"))), r"layer 'a' .*unknown fields \['rotation'\]"),
        (json.dumps(document(layers=scheme(bits=8.0))), "layer 'a' .*bits=8.0 is not an integer"),
        (json.dumps(document(layers=scheme(symmetric="yes"))), "layer 'a' .*symmetric='yes'"),
        (json.dumps(document(layers=scheme(kind="weight_only", group_size=-8))), "layer 'a' .*group_size=-8"),
    ],
)  # fmt: skip
def test_anything_unknown_or_of_the_wrong_type_is_an_error_that_names_the_file(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_header(text, "some/file.safetensors")
    assert "some/file.safetensors" in caught.value.message
