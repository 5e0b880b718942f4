"""Finds the first model on the path that keeps to the budget, and says so when there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mono_quant.api.formats import FLOAT, FLOAT16, INT8, uniform_assignment
from mono_quant.api.method import Budget
from mono_quant.api.replace import Progress
from mono_quant.api.search.journal import Measured
from mono_quant.api.search.measure import Measure
from mono_quant.api.search.path import Path, UnitCosts
from mono_quant.api.working_copy import WorkingCopy
from mono_quant.errors import BudgetError
from mono_quant.report import model_bytes
from mono_quant.report.search import SearchPoint, SearchReport, accuracy

# Steps that the search tries to take back in the end.
_TRIALS: Final = 6


@dataclass(frozen=True)
class Visited:
    """A model that was measured: each unit's format, and what is reported of it."""

    formats: Mapping[str, str]
    point: SearchPoint
    cost: float


class Walk:
    """One search along a path.

    Args:
        copy: The model in all formats.
        path: From the cheapest model to the most exact.
        objective: What is cheap on it.
        costs: Of every unit.
        budget: What to keep to.
        measure: Measures a model.
        uniform: Whether the model with int8 everywhere may be chosen, and is measured too.
        progress: Called after each measurement.
    """

    def __init__(
        self, copy: WorkingCopy, path: Path, objective: str, costs: Mapping[str, UnitCosts], budget: Budget,
        measure: Measure, uniform: bool, progress: Progress,
    ) -> None:  # fmt: skip
        self._copy, self._path, self._costs, self._budget = copy, path, costs, budget
        self._objective = objective
        self._measure, self._uniform, self._progress = measure, uniform, progress
        self._rest = bytes_of_the_rest(copy)
        self.visited: list[Visited] = []
        self._float: Measured | None = None
        # The last model of the path may be the float model, which is no quantization.
        self._last = len(path.steps)
        if set(path.at(self._last).values()) == {FLOAT}:
            self._last -= 1
        self._expected = 3 + max(1, self._last).bit_length() + _TRIALS

    def run(self) -> Visited:
        """Measure what has to be measured; answer the best model, which need not keep to the budget."""
        budget, limit = self._budget, self._last
        if budget.eval_fn is not None:
            self._float = self._measure(dict.fromkeys(self._path.start, FLOAT), "the float model")
        if self._uniform:
            self._visit(uniform_assignment(self._copy.units, INT8), "uniform int8")
        if budget.max_drop is None and budget.min_sqnr_db is None:
            assert budget.max_bytes is not None
            inside = budget.max_bytes - self._rest
            bytes_of = {name: costs.bytes for name, costs in self._costs.items()}
            formats = self._path.filling(bytes_of, inside)
            if set(formats.values()) == {FLOAT}:
                formats = self._path.at(self._last)
            self._visit(formats, "fills max_bytes")
        else:
            if budget.max_bytes is not None:
                limit = self._last_within(budget.max_bytes)
            self._bisect(limit)
        self._progress(self._expected, self._expected, "done")
        return self._choose()

    def _bisect(self, limit: int) -> None:
        """Find a step that keeps to the budget and follows one that does not."""
        if limit < 0 or self._at(0).point.within_budget:
            return
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            if self._at(middle).point.within_budget:
                high = middle
            else:
                low = middle
        if self._at(high).point.within_budget:
            self._trim(high)
        elif limit == self._last:
            # The path ends where float is fastest, which may leave a layer in a coarse format: half precision is the
            # most accurate of what is not float.
            self._visit(uniform_assignment(self._copy.units, FLOAT16), "uniform float16")

    def _trim(self, position: int) -> None:
        """Take back single steps before ``position`` whose precision turns out not to be needed, the last ones first.

        The order of steps rests on estimates: what the caller measures may need one step much more than others.
        """
        kept = list(self._path.steps[:position])
        for number, step in list(enumerate(kept, start=1))[-2 : -2 - _TRIALS : -1]:
            without = [other for other in kept if other is not step]
            dropped = position - len(without)
            label = f"step {position} of {len(self._path.steps)}, {dropped} less: {number}"
            if self._visit(self._path.after(without), label).point.within_budget:
                kept = without

    def _at(self, position: int) -> Visited:
        label = "cheapest" if position == 0 else f"step {position} of {len(self._path.steps)}"
        return self._visit(self._path.at(position), label)

    def _visit(self, formats: Mapping[str, str], label: str) -> Visited:
        for visited in self.visited:
            if visited.formats == formats:
                return visited
        measured = self._measure(formats, f"a quantized model ({label})")
        point = self._point(measured, label)
        cost = self._cost(formats)
        self.visited.append(Visited(dict(formats), point, cost))
        done = len(self.visited)
        left = max(0, self._expected - done)
        mean = sum(visited.point.evaluation_seconds for visited in self.visited) / done
        self._progress(done, max(self._expected, done + 1), f"{self._told(point)}; about {mean * left:.0f} s left")
        return self.visited[-1]

    def _told(self, point: SearchPoint) -> str:
        measures = [] if point.value is None else [f"{point.value:.4g}"]
        measures += [] if point.sqnr_db is None else [f"{point.sqnr_db:.1f} dB"]
        return f"{point.label}: {', '.join(measures)}, {point.bytes / 2**20:.4g} MiB"

    def _point(self, measured: Measured, label: str) -> SearchPoint:
        budget, size = self._budget, self._bytes(measured.formats)
        drop = None
        if measured.value is not None and self._float is not None and self._float.value is not None:
            drop = self._float.value - measured.value
        kept = (
            (budget.max_drop is None or (drop is not None and drop <= budget.max_drop))
            and (
                budget.min_sqnr_db is None or (measured.sqnr_db is not None and measured.sqnr_db >= budget.min_sqnr_db)
            )
            and (budget.max_bytes is None or size <= budget.max_bytes)
        )
        names = {layer: measured.formats[unit.name] for unit in self._copy.units for layer in unit.layers}
        formats = {layer: names[layer] for layer in self._copy.layer_names}
        seconds = sum(self._costs[unit].seconds.get(name, 0.0) for unit, name in measured.formats.items())
        return SearchPoint(
            label, formats, size, seconds, measured.value, drop, measured.sqnr_db, kept, measured.seconds
        )

    def _bytes(self, formats: Mapping[str, str]) -> int:
        return self._rest + sum(self._costs[unit].bytes[name] for unit, name in formats.items())

    def _cost(self, formats: Mapping[str, str]) -> float:
        return sum(self._path.costs[unit][name] for unit, name in formats.items())

    def _last_within(self, limit: int) -> int:
        fitting = [position for position in range(self._last + 1) if self._bytes(self._path.at(position)) <= limit]
        return max(fitting, default=-1)

    def _choose(self) -> Visited:
        """Answer the cheapest model within the budget, else the one that is most accurate."""
        within = [visited for visited in self.visited if visited.point.within_budget]
        if not within:
            fitting = [
                v for v in self.visited if self._budget.max_bytes is None or v.point.bytes <= self._budget.max_bytes
            ]
            return max(fitting or self.visited, key=lambda visited: accuracy(visited.point))
        if self._budget.max_drop is None and self._budget.min_sqnr_db is None:
            return max(within, key=lambda visited: (accuracy(visited.point), -visited.cost))
        uniform = next((v.point for v in within if v.point.label == "uniform int8"), None)
        if uniform is not None:
            # A model that is larger and less accurate than plain int8 helps nobody.
            within = [
                v for v in within if v.point.bytes < uniform.bytes or accuracy(v.point) >= accuracy(uniform)
            ]  # fmt: skip
        return min(within, key=lambda visited: (visited.cost, -accuracy(visited.point)))

    def report(self, chosen: Visited, started: float, samples: int, seed: int, notes: tuple[str, ...]) -> SearchReport:
        return SearchReport(
            points=tuple(visited.point for visited in self.visited),
            chosen=self.visited.index(chosen),
            met=chosen.point.within_budget,
            target=describe(self._budget),
            objective=self._objective,
            float_value=None if self._float is None else self._float.value,
            float_bytes=model_bytes(self._copy.model),
            evaluations=self._measure.count,
            seconds=time.perf_counter() - started,
            samples=samples,
            seed=seed,
            steps=len(self._path.steps),
            notes=notes,
        )

    def require_met(self, report: SearchReport) -> None:
        """Refuse an outcome that does not keep to the budget.

        Raises:
            BudgetError: It does not; carries the report.
        """
        if report.met:
            return
        best = report.best
        found = []
        if best.drop is not None:
            found.append(f"a drop of {best.drop:.6g} (from {report.float_value:.6g} to {best.value:.6g})")
        if best.sqnr_db is not None:
            found.append(f"{best.sqnr_db:.2f} dB")
        found.append(f"{best.bytes} bytes")
        error = BudgetError(
            f"no choice of formats keeps to {report.target}: the best of {len(report.points)} measured models has "
            f"{', '.join(found)}",
            suggestion=_relax(self._budget, best),
        )
        error.search = report
        raise error


def bytes_of_the_rest(copy: WorkingCopy) -> int:
    """Answer the bytes of all tensors that do not change with the formats."""
    return model_bytes(copy.model) - sum(copy.unit_bytes(unit, FLOAT) for unit in copy.units)


def require_room(copy: WorkingCopy, limit: int) -> None:
    """Refuse a number of bytes that no choice of formats gets by with.

    Raises:
        BudgetError: The smallest formats need more.
    """
    rest = bytes_of_the_rest(copy)
    smallest = rest + sum(min(copy.unit_bytes(unit, name) for name in (*unit.formats, FLOAT)) for unit in copy.units)
    if smallest > limit:
        raise BudgetError(
            f"max_bytes={limit} cannot be reached: with every layer in its smallest format the model has {smallest} "
            f"bytes, {rest} of them in tensors that are not quantized",
            suggestion="Allow more bytes, or let the search quantize more layers (include=, skip=, formats=).",
        )


def _relax(budget: Budget, best: SearchPoint) -> str:
    ways = []
    if budget.max_drop is not None and best.drop is not None and best.drop > budget.max_drop:
        ways.append(f"max_drop={_rounded_up(best.drop)}")
    if budget.min_sqnr_db is not None and best.sqnr_db is not None and best.sqnr_db < budget.min_sqnr_db:
        ways.append(f"min_sqnr_db={best.sqnr_db:.1f}")
    text = f"Relax the target: {' and '.join(ways)} can be kept" if ways else "Relax the target"
    if budget.max_bytes is not None:
        text += ", or allow more than max_bytes"
    text += ", or leave the most sensitive layers in float with skip=."
    if budget.resume is not None:
        text += f" {budget.resume} keeps all measurements: with another target the search goes on from it."
    return text


def _rounded_up(value: float) -> str:
    text = f"{value:.4g}"
    return text if float(text) >= value else f"{value * 1.001:.4g}"


def describe(budget: Budget) -> str:
    """Answer the budget in words."""
    parts = []
    if budget.max_drop is not None:
        parts.append(f"max_drop={budget.max_drop:g}")
    if budget.min_sqnr_db is not None:
        parts.append(f"min_sqnr_db={budget.min_sqnr_db:g}")
    if budget.max_bytes is not None:
        parts.append(f"max_bytes={budget.max_bytes}")
    return " and ".join(parts)
