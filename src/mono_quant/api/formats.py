"""The formats that a layer can have, and which layers must have the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

from mono_quant.api.options import Options
from mono_quant.api.selection import Candidate, Selection, select_layers
from mono_quant.core.layer_scheme import WEIGHT_ONLY, LayerScheme
from mono_quant.errors import ConfigurationError
from mono_quant.modules import counterpart_for_scheme

INT4: Final = "int4"
INT8: Final = "int8"
INT8_WEIGHTS: Final = "int8_weights"
BFLOAT16: Final = "bfloat16"
FLOAT16: Final = "float16"
#: The layer as it is.
FLOAT: Final = "float"
#: What a layer can be quantized to, smallest first; :data:`FLOAT` is always possible besides.
FORMATS: Final = (INT4, INT8, INT8_WEIGHTS, BFLOAT16, FLOAT16)

#: For each layer's name its format.
Assignment = Mapping[str, str]


@dataclass(frozen=True)
class Unit:
    """Layers that hold one weight, and therefore have one format; mostly a single layer.

    Attributes:
        layers: Their names in the model's order.
        formats: For a format's name, each layer as it would be quantized.
    """

    layers: tuple[str, ...]
    formats: Mapping[str, tuple[Candidate, ...]]

    @property
    def name(self) -> str:
        return self.layers[0]


def parse_formats(formats: Sequence[str] | str | None) -> tuple[str, ...]:
    """Answer the formats to choose from in the order of :data:`FORMATS`; all of them by default.

    Raises:
        ConfigurationError: One is unknown, or there is none.
    """
    if formats is None:
        return FORMATS
    names = [formats] if isinstance(formats, str) else list(formats)
    unknown = [name for name in names if name not in (*FORMATS, FLOAT)]
    if unknown:
        raise ConfigurationError(f"format {unknown[0]!r} is not one of {', '.join(FORMATS)}")
    chosen = tuple(name for name in FORMATS if name in names)
    if not chosen:
        raise ConfigurationError(f"formats={formats!r} names no format to quantize to; expected {', '.join(FORMATS)}")
    return chosen


def find_units(model: nn.Module, options: Options, formats: Sequence[str]) -> tuple[list[Unit], Selection]:
    """Answer the layers that ``options`` choose, in the formats that each of them has.

    A linear layer that shares no weight with another kind of layer has all formats; the others have only ``int8``
    and ``float16``. A layer that has none of ``formats`` has ``int8``.

    Args:
        model: Not modified.
        options: Which layers, symmetric or not, and the group size of packed weights.
        formats: Of :data:`FORMATS`.

    Returns:
        The units, and the selection for ``int8`` with the reasons for layers that stay in float.

    Raises:
        ConfigurationError, QuantizationError: As :func:`~mono_quant.api.selection.select_layers`.
    """
    selection = select_layers(model, replace(options, bits=8, group_size=None))
    packed = {}
    if INT4 in formats or INT8_WEIGHTS in formats:
        chosen = select_layers(model, replace(options, bits=4)).chosen
        packed = {candidate.name: candidate for candidate in chosen if candidate.scheme.kind == WEIGHT_ONLY}
    groups: dict[int, list[Candidate]] = {}
    for candidate in selection.chosen:
        weight = candidate.module._parameters.get("weight")
        groups.setdefault(id(candidate.module if weight is None else weight), []).append(candidate)
    units = []
    for members in groups.values():
        possible = {name: _in_format(members, name, packed) for name in formats}
        found = {name: layers for name, layers in possible.items() if layers}
        units.append(Unit(tuple(member.name for member in members), found or {INT8: tuple(members)}))
    return units, selection


def _in_format(members: list[Candidate], name: str, packed: Mapping[str, Candidate]) -> tuple[Candidate, ...]:
    """Answer the layers of a unit in a format; none if one of them does not have it."""
    if name == INT8:
        return tuple(members)
    if name in (BFLOAT16, FLOAT16):
        scheme = LayerScheme(name, bits=16)
        possible = all(counterpart_for_scheme(member.module, scheme) is not None for member in members)
        return tuple(_stored_as(member, scheme) for member in members) if possible else ()
    if any(member.name not in packed for member in members):
        return ()
    schemes = [packed[member.name].scheme for member in members]
    if name == INT8_WEIGHTS:
        schemes = [replace(scheme, bits=8) for scheme in schemes]
    return tuple(_stored_as(member, scheme) for member, scheme in zip(members, schemes, strict=True))


def _stored_as(candidate: Candidate, scheme: LayerScheme) -> Candidate:
    quantized_type = counterpart_for_scheme(candidate.module, scheme) or candidate.quantized_type
    return replace(candidate, scheme=scheme, quantized_type=quantized_type)


def uniform_assignment(units: Sequence[Unit], name: str) -> dict[str, str]:
    """Answer every unit in one format; units that do not have it are in ``int8``, else in what is nearest to it."""
    order = (name, INT8, *reversed(FORMATS))
    return {
        unit.name: FLOAT if name == FLOAT else next(option for option in order if option in unit.formats)
        for unit in units
    }


def schemes_of(units: Sequence[Unit], assignment: Assignment) -> dict[str, LayerScheme | None]:
    """Answer for each layer's name its scheme, ``None`` where it stays in float."""
    return {
        layer: None if assignment[unit.name] == FLOAT else unit.formats[assignment[unit.name]][index].scheme
        for unit in units
        for index, layer in enumerate(unit.layers)
    }
