"""What a checkpoint says about itself: one JSON document beside the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

import torch

from mono_quant._version import __version__
from mono_quant.core.layer_scheme import INT8_STATIC, LayerScheme
from mono_quant.errors import CheckpointError, ConfigurationError
from mono_quant.io.static_record import StaticRecord

#: The key of the document in the metadata of a safetensors file, and its name on the dict in a ``.pt`` file.
HEADER_KEY: Final = "mono_quant"
#: The newest version, which static models have; all other files have version 1, which older libraries read too.
FORMAT_VERSION: Final = 2
_WITHOUT_STATIC: Final = 1
MEASUREMENTS: Final = ("original_size_mb", "quantized_size_mb", "compression_ratio", "sqnr_db")

_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16,
                                                                          torch.float64)}  # fmt: skip


@dataclass(frozen=True)
class LayerRecord:
    """How one layer is stored.

    Attributes:
        scheme: How it is quantized.
        float_type: The float layer that it stands for: ``"Linear"`` and other names of ``torch.nn``, or a qualified
            name; ``None`` if the file was written from a state dict, which does not know.
        float_dtype: The dtype in which its weight reads; ``None`` if it is not known.
    """

    scheme: LayerScheme
    float_type: str | None = None
    float_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class CheckpointHeader:
    """The header of a checkpoint.

    Attributes:
        layers: The quantized layers by name.
        skipped: Layers that stayed in float, and why, as far as the writer was told.
        tied: Names of tensors that are stored once, under another name: alias to stored name.
        fused: Activations that the linear layer before them computes: the activation's name to the layer's.
        measurements: Sizes in MiB, their ratio and the weights' error in decibels, as far as they were measured:
            ``original_size_mb``, ``quantized_size_mb``, ``compression_ratio``, ``sqnr_db``.
        static: A statically quantized model without its numbers; ``None`` for all others.
        library_version: Version of mono_quant that wrote the file.
    """

    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    measurements: Mapping[str, float] = field(default_factory=dict)
    static: StaticRecord | None = None
    library_version: str = __version__

    @property
    def format_version(self) -> int:
        """Version of the header's format."""
        return _WITHOUT_STATIC if self.static is None else FORMAT_VERSION

    def to_json(self) -> str:
        """Answer the header as the document that :func:`parse_header` reads."""
        layers = {name: _record_to_dict(record) for name, record in self.layers.items()}
        document = {
            "format_version": self.format_version,
            "library_version": self.library_version,
            "layers": layers,
            "skipped": dict(self.skipped),
            "tied": dict(self.tied),
            "fused": dict(self.fused),
            "measurements": dict(self.measurements),
        }
        if self.static is not None:
            document["static"] = self.static.to_dict()
        return json.dumps(document, separators=(",", ":"), allow_nan=False)


def parse_header(text: str, path: object) -> CheckpointHeader:
    """Undo :meth:`CheckpointHeader.to_json`.

    Args:
        text: The JSON document.
        path: The file that holds it, for messages.

    Raises:
        CheckpointError: It is no such document, its ``format_version`` is not one that this library reads, or it has
            unknown fields or values of the wrong type.
    """
    try:
        document = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {HEADER_KEY} header is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: the {HEADER_KEY} header holds {_kind(document)}, expected an object")
    _require_version(document.get("format_version"), path)
    reader = _Reader(path)
    is_static = document["format_version"] != _WITHOUT_STATIC
    known = {field.name for field in fields(CheckpointHeader)} | {"format_version"}
    reader.require_fields("the header", document, known if is_static else known - {"static"})
    layers = reader.mapping(document, "layers", dict)
    header = CheckpointHeader(
        layers={name: _record_from_dict(reader, name, values) for name, values in layers.items()},
        skipped=reader.mapping(document, "skipped", str),
        tied=reader.mapping(document, "tied", str),
        fused=reader.mapping(document, "fused", str),
        measurements=_measurements(reader, document),
        static=_static(reader, document) if is_static else None,
        library_version=reader.value(document, "library_version", str),
    )
    static_layers = [name for name, record in header.layers.items() if record.scheme.kind == INT8_STATIC]
    if static_layers and header.static is None:
        raise reader.fail(f"layer {static_layers[0]!r} of the header is static, and the header does not describe how")
    return header


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _require_version(found: object, path: object) -> None:
    if type(found) is int and _WITHOUT_STATIC <= found <= FORMAT_VERSION:
        return
    newer = type(found) is int and found > FORMAT_VERSION
    raise CheckpointError(
        f"{path} has format_version {found!r}; mono_quant {__version__} reads versions {_WITHOUT_STATIC} to "
        f"{FORMAT_VERSION}",
        suggestion="Install a newer mono-quant." if newer else "Save the model again with this version.",
    )


@dataclass(frozen=True)
class _Reader:
    """Reads values of one header and names the file in every complaint."""

    path: object

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def require_fields(self, where: str, values: Mapping[str, Any], known: set[str]) -> None:
        unknown, missing = sorted(values.keys() - known), sorted(known - values.keys())
        if unknown:
            raise self.fail(f"{where} has unknown fields {unknown}, expected {sorted(known)}")
        if missing:
            raise self.fail(f"{where} lacks the fields {missing}")

    def value(self, values: Mapping[str, Any], name: str, kind: type) -> Any:
        if not isinstance(values[name], kind):
            raise self.fail(f"{name} of the header holds {_kind(values[name])}, expected {kind.__name__}")
        return values[name]

    def mapping(self, values: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
        found: dict[str, Any] = self.value(values, name, dict)
        for key, item in found.items():
            if not isinstance(item, kind):
                raise self.fail(f"{name} of the header holds {_kind(item)} at {key!r}, expected {kind.__name__}")
        return found


def _record_to_dict(record: LayerRecord) -> dict[str, Any]:
    dtype = None if record.float_dtype is None else str(record.float_dtype).removeprefix("torch.")
    return {"float_type": record.float_type, "scheme": record.scheme.to_dict(), "float_dtype": dtype}


def _record_from_dict(reader: _Reader, name: str, values: dict[str, Any]) -> LayerRecord:
    where = f"layer {name!r} of the header"
    reader.require_fields(where, values, {"float_type", "scheme", "float_dtype"})
    float_type, dtype = values["float_type"], values["float_dtype"]
    if not isinstance(float_type, str | None) or not isinstance(dtype, str | None):
        raise reader.fail(f"{where} has a float_type or float_dtype that is no name")
    if dtype is not None and dtype not in _DTYPES:
        raise reader.fail(f"{where} has float_dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    scheme = _scheme(reader, where, values["scheme"])
    return LayerRecord(scheme, float_type, None if dtype is None else _DTYPES[dtype])


def _scheme(reader: _Reader, where: str, values: object) -> LayerScheme:
    if not isinstance(values, dict):
        raise reader.fail(f"{where} has a scheme that is {_kind(values)}, expected an object")
    try:
        scheme = LayerScheme.from_dict(values)
    except (ConfigurationError, TypeError, ValueError) as error:
        reason = error.message if isinstance(error, ConfigurationError) else str(error)
        raise reader.fail(f"{where}: {reason}") from error
    if type(scheme.bits) is not int:
        raise reader.fail(f"{where}: bits={scheme.bits!r} is not an integer")
    return scheme


def _static(reader: _Reader, document: Mapping[str, Any]) -> StaticRecord:
    try:
        return StaticRecord.from_dict(reader.value(document, "static", dict))
    except ConfigurationError as error:
        raise reader.fail(f"static of the header is damaged: {error.message}") from error


def _measurements(reader: _Reader, document: Mapping[str, Any]) -> dict[str, float]:
    found = reader.mapping(document, "measurements", int | float)  # type: ignore[arg-type]
    unknown = sorted(found.keys() - set(MEASUREMENTS))
    if unknown:
        raise reader.fail(f"measurements of the header has unknown fields {unknown}")
    return {name: float(value) for name, value in found.items()}


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
