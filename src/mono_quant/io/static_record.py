"""What a checkpoint's header says of a statically quantized model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from mono_quant.core.quantization_info import Cut, QuantizationInfo
from mono_quant.errors import ConfigurationError

GRAPH: Final = "graph"
LAYERS: Final = "layers"


@dataclass(frozen=True)
class StaticRecord:
    """A statically quantized model without its numbers.

    Attributes:
        model: As :func:`mono_quant.graph.describe_static` answers it: of kind ``graph``, which is the whole model, or
            of kind ``layers``, static layers inside an architecture.
        cuts: Operations of the graph that run in float, and why.
        not_captured: Why the model is not a graph.
        samples: Calibration samples that were used; 0 if that is not known.
        output_sqnr_db: Ratio of the model's answers to their error on calibration samples, if it was measured.
    """

    model: Mapping[str, Any]
    cuts: tuple[Cut, ...] = ()
    not_captured: str | None = None
    samples: int = 0
    output_sqnr_db: float | None = None

    @property
    def is_graph(self) -> bool:
        """Whether the file is a whole model and needs no architecture."""
        return bool(self.model["kind"] == GRAPH)

    @classmethod
    def of(cls, model: Mapping[str, Any], info: QuantizationInfo | None) -> StaticRecord:
        """Answer the record of a described model and of what its quantization did, as far as that is known."""
        if info is None:
            return cls(model)
        ratio = info.output_sqnr_db
        finite = ratio if ratio is not None and math.isfinite(ratio) else None
        return cls(model, tuple(info.cuts), info.not_captured, info.calibration_samples_used, finite)

    def to_dict(self) -> dict[str, Any]:
        """Answer the record as plain values."""
        return {
            "model": dict(self.model),
            "cuts": [asdict(cut) for cut in self.cuts],
            "not_captured": self.not_captured,
            "samples": self.samples,
            "output_sqnr_db": self.output_sqnr_db,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StaticRecord:
        """Undo :meth:`to_dict`; the description of the model is looked into when the model is built.

        Raises:
            ConfigurationError: A value is missing, unknown, or of the wrong type.
        """
        known = {"model", "cuts", "not_captured", "samples", "output_sqnr_db"}
        if values.keys() != known:
            raise ConfigurationError(f"it has the fields {sorted(values)}, expected {sorted(known)}")
        model, cuts, ratio = values["model"], values["cuts"], values["output_sqnr_db"]
        if not isinstance(model, dict) or model.get("kind") not in (GRAPH, LAYERS):
            raise ConfigurationError("its model is neither a graph nor layers")
        if not isinstance(cuts, list) or not all(_is_cut(cut) for cut in cuts):
            raise ConfigurationError("its cuts are not a list of names, operations and reasons")
        fits = (
            isinstance(values["not_captured"], str | None)
            and type(values["samples"]) is int
            and (ratio is None or type(ratio) in (int, float))
        )
        if not fits:
            raise ConfigurationError("not_captured, samples or output_sqnr_db has a value of the wrong type")
        return cls(model, tuple(Cut(**cut) for cut in cuts), values["not_captured"], values["samples"], ratio)


def _is_cut(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "operation", "reason"}
        and all(isinstance(text, str) for text in value.values())
    )
