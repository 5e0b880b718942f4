"""The order in which a search gives precision back: from the cheapest model to the most exact, in single steps.

Each unit has options with a cost and an error. What matters of them is their lower convex hull: an option above it is
never the best use of a cost. Going from one option of the hull to the next takes an error away for a cost; all these
steps of all units, sorted by error for cost, are the path. Errors of single layers add up well (first order), and for
sums every model on the path has the least error of all models that cost no more, up to one step (the greedy solution of
the multiple-choice knapsack: Sinha and Zoltners, "The multiple-choice knapsack problem", 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from mono_quant.api.formats import FLOAT

# What measured times cannot tell apart.
_SAME_SHARE: Final = 1.1
_SAME_SECONDS: Final = 20e-6
# Breaks ties of time: a megabyte counts as a microsecond.
_SECONDS_PER_BYTE: Final = 1e-12


@dataclass(frozen=True)
class UnitCosts:
    """What a unit costs and causes in each format, ``"float"`` included.

    Attributes:
        bytes: What it stores.
        seconds: Measured time of its calls; without an entry where no data reached it.
        noise: Energy of the error of the model's output, in parts of the output's; empty where no data reached it.
    """

    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    noise: Mapping[str, float]


@dataclass(frozen=True)
class Option:
    """A format of a unit."""

    name: str
    cost: float
    error: float


@dataclass(frozen=True)
class Step:
    """A unit's change to a more exact format."""

    unit: str
    name: str
    gain: float


@dataclass(frozen=True)
class Path:
    """Models from the cheapest to the most exact.

    Attributes:
        start: For each unit's name its format at the beginning.
        steps: Changes, the one that takes away most error for its cost first.
        costs: For each unit's name, the cost of each of its formats: bytes, or seconds.
    """

    start: Mapping[str, str]
    steps: tuple[Step, ...]
    costs: Mapping[str, Mapping[str, float]]

    def at(self, position: int) -> dict[str, str]:
        """Answer every unit's format after ``position`` steps."""
        return self.after(self.steps[:position])

    def after(self, steps: Sequence[Step]) -> dict[str, str]:
        """Answer every unit's format after some of the steps."""
        return {**self.start, **{step.unit: step.name for step in steps}}

    def filling(self, bytes_of: Mapping[str, Mapping[str, int]], limit: int) -> dict[str, str]:
        """Answer the formats after all steps, in their order, that leave no more than ``limit`` bytes in the units."""
        formats = dict(self.start)
        used = sum(bytes_of[unit][name] for unit, name in formats.items())
        full: set[str] = set()
        for step in self.steps:
            added = bytes_of[step.unit][step.name] - bytes_of[step.unit][formats[step.unit]]
            if step.unit in full or used + added > limit:
                full.add(step.unit)
                continue
            formats[step.unit] = step.name
            used += added
        return formats


def build_path(units: Mapping[str, UnitCosts], objective: str, fallback: Mapping[str, str]) -> Path:
    """Answer the path for an objective.

    Args:
        units: By name.
        objective: ``"bytes"`` or ``"latency"``.
        fallback: The format of units that no data reached, of which nothing is known.
    """
    start: dict[str, str] = {}
    steps: list[Step] = []
    all_costs = {unit: _costs(costs, objective) for unit, costs in units.items()}
    for unit, costs in units.items():
        if not costs.noise:
            start[unit] = fallback[unit]
            continue
        options = hull([Option(name, cost, _error(costs, name)) for name, cost in all_costs[unit].items()])
        start[unit] = options[0].name
        for before, after in pairwise(options):
            steps.append(Step(unit, after.name, (before.error - after.error) / (after.cost - before.cost)))
    # Sorting is stable: equal gains keep the model's order.
    return Path(start, tuple(sorted(steps, key=lambda step: -step.gain)), all_costs)


def hull(options: Sequence[Option]) -> list[Option]:
    """Answer the lower convex hull, the cheapest option first: each further one takes most error away for its cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if kept and option.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _slope(kept[-2], option) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _slope(before: Option, after: Option) -> float:
    return (after.error - before.error) / (after.cost - before.cost)


def _error(costs: UnitCosts, name: str) -> float:
    return 0.0 if name == FLOAT else costs.noise[name]


def _costs(costs: UnitCosts, objective: str) -> dict[str, float]:
    if objective == "bytes":
        return {name: float(count) for name, count in costs.bytes.items()}
    seconds = settled(costs.seconds)
    return {name: seconds.get(name, 0.0) + _SECONDS_PER_BYTE * count for name, count in costs.bytes.items()}


def settled(seconds: Mapping[str, float]) -> dict[str, float]:
    """Answer times in which those that cannot be told apart are equal, so that noise decides nothing."""
    result: dict[str, float] = {}
    head = 0.0
    for name in sorted(seconds, key=lambda name: seconds[name]):
        if not result or seconds[name] > max(head * _SAME_SHARE, head + _SAME_SECONDS):
            head = seconds[name]
        result[name] = head
    return result
