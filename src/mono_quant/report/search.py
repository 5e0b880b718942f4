"""What a search saw and what it chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SearchPoint:
    """One way to quantize the model that was measured.

    Attributes:
        label: ``"cheapest"``, ``"uniform int8"``, ``"step 12 of 40"``, ``"step 12 of 40, 1 less: 9"`` (the ninth
            was taken back) or ``"fills max_bytes"``.
        formats: For each layer's name its format; ``"float"`` for a layer that stays as it is.
        bytes: All parameters and buffers of the model.
        seconds_of_layers: The measured times of all layers together, one pass of the first calibration batch; without
            what the model computes between them.
        value: What ``eval_fn`` answered, or ``None`` without one.
        drop: How far that is below the float model's value.
        sqnr_db: Signal-to-quantization-noise ratio of the model's outputs on the calibration data, or ``None`` if it
            was not needed.
        within_budget: Whether the point keeps to all of the budget.
        evaluation_seconds: What measuring it took.
    """

    label: str
    formats: Mapping[str, str]
    bytes: int
    seconds_of_layers: float
    value: float | None
    drop: float | None
    sqnr_db: float | None
    within_budget: bool
    evaluation_seconds: float

    def counts(self) -> dict[str, int]:
        """Answer how many layers have each format."""
        found: dict[str, int] = {}
        for name in self.formats.values():
            found[name] = found.get(name, 0) + 1
        return found


@dataclass(frozen=True)
class SearchReport:
    """The course and the outcome of a search.

    Attributes:
        points: What was measured, in the order in which it was.
        chosen: Position of the best point in :attr:`points`; that of the model if :attr:`met`.
        met: Whether it keeps to the budget.
        target: The budget in words.
        objective: ``"latency"`` or ``"bytes"``: what was made small.
        float_value: What ``eval_fn`` answered for the float model.
        float_bytes: All parameters and buffers of the float model.
        evaluations: How often a model was measured in this run; what a resume file held is not counted.
        seconds: Wall time of this run.
        samples: Calibration samples.
        seed: Of every random choice.
        steps: Single steps of precision from the cheapest model to the float one.
        notes: What the reader should know, one sentence each.
    """

    points: tuple[SearchPoint, ...]
    chosen: int
    met: bool
    target: str
    objective: str
    float_value: float | None
    float_bytes: int
    evaluations: int
    seconds: float
    samples: int
    seed: int
    steps: int
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> SearchPoint:
        return self.points[self.chosen]

    @property
    def frontier(self) -> tuple[SearchPoint, ...]:
        """The points that no other beats in both bytes and accuracy, the smallest first."""
        kept: list[SearchPoint] = []
        for point in sorted(self.points, key=lambda point: (point.bytes, -accuracy(point))):
            if not kept or accuracy(point) > accuracy(kept[-1]):
                kept.append(point)
        return tuple(kept)

    def to_dict(self) -> dict[str, Any]:
        """Answer the report as plain values."""
        return {**asdict(self), "frontier": [self.points.index(point) for point in self.frontier]}


def accuracy(point: SearchPoint) -> float:
    """Answer the number by which points are compared: the caller's measure, else that of the outputs."""
    value = point.sqnr_db if point.value is None else point.value
    assert value is not None
    return value
