"""A layer's scheme survives a checkpoint's header and refuses what no layer can be."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mono_quant.core import LayerScheme
from mono_quant.errors import ConfigurationError

SCHEMES = st.one_of(
    st.builds(LayerScheme, symmetric=st.booleans(), per_channel=st.booleans()),
    st.builds(
        LayerScheme,
        kind=st.just("weight_only"),
        bits=st.sampled_from([4, 8]),
        symmetric=st.booleans(),
        group_size=st.none() | st.integers(1, 1024),
    ),
    st.sampled_from([LayerScheme("float16", bits=16), LayerScheme("bfloat16", bits=16)]),
)


@given(scheme=SCHEMES)
def test_round_trip_through_json(scheme: LayerScheme) -> None:
    restored = LayerScheme.from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert restored == scheme
    assert hash(restored) == hash(scheme)


@given(first=SCHEMES, second=SCHEMES)
def test_different_schemes_have_different_dictionaries(first: LayerScheme, second: LayerScheme) -> None:
    assert (first == second) == (first.to_dict() == second.to_dict())


def test_the_default_is_dynamic_int8() -> None:
    assert LayerScheme().to_dict() == {
        "kind": "int8_dynamic", "bits": 8, "symmetric": True, "group_size": None, "per_channel": True,
    }  # fmt: skip


def test_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerScheme().bits = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "int3_magic"},
        {"kind": "int8_static", "symmetric": False},
        {"kind": "int8_static", "per_channel": False},
        {"kind": "int8_static", "group_size": 32},
        {"kind": None},
        {"kind": ["weight_only"]},
        {"bits": 3},
        {"bits": 4},
        {"bits": "8"},
        {"bits": 16},
        {"kind": "weight_only", "bits": 16},
        {"kind": "float16", "bits": 8},
        {"group_size": 64},
        {"kind": "float16", "bits": 16, "group_size": 64},
        {"kind": "weight_only", "bits": 4, "group_size": 0},
        {"kind": "weight_only", "bits": 4, "group_size": -64},
        {"kind": "weight_only", "bits": 4, "group_size": 6.5},
        {"kind": "weight_only", "bits": 4, "group_size": "64"},
        {"symmetric": "yes"},
        {"per_channel": 1},
        {"kind": "int8_dynamic", "colour": "green"},
    ],
)
def test_impossible_schemes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        LayerScheme.from_dict(values)


@given(scheme=SCHEMES)
def test_reads_as_a_phrase(scheme: LayerScheme) -> None:
    text = str(scheme)
    assert (text == scheme.kind) == scheme.stores_floats
    assert ("groups of" in text) == (scheme.group_size is not None)
