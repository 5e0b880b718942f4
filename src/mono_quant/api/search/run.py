"""The search: a walk along the path, by bisection."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from torch import nn

from mono_quant._version import __version__
from mono_quant.api.algorithm import read_batches
from mono_quant.api.error_sums import Outputs
from mono_quant.api.formats import FLOAT, INT8, Unit, find_units, parse_formats, schemes_of, uniform_assignment
from mono_quant.api.layer_effects import Effects, measure_effects
from mono_quant.api.layers import quantize_by_schemes
from mono_quant.api.method import BYTES, Budget, Request
from mono_quant.api.names import shortened
from mono_quant.api.options import Options
from mono_quant.api.replace import Progress
from mono_quant.api.result import QuantizationResult
from mono_quant.api.search.journal import Journal, hash_batches, hash_model
from mono_quant.api.search.measure import Measure
from mono_quant.api.search.path import Path, UnitCosts, build_path
from mono_quant.api.search.walk import Walk, require_room
from mono_quant.api.working_copy import WorkingCopy
from mono_quant.calibration import Batch
from mono_quant.errors import ConfigurationError, InputError

DEFAULT_SEED: Final = 0
_WHY_FLOAT: Final = "the search left it in float to keep to the budget"


def search_precision(
    model: nn.Module, options: Options, request: Request, progress: Progress | None
) -> QuantizationResult:
    """Quantize a module under a budget; see :func:`mono_quant.quantize`.

    Raises:
        BudgetError: No choice of formats keeps to the budget; says what the best one was.
        CheckpointError: The resume file is unfit or cannot be written.
        ConfigurationError, InputError, QuantizationError: As :func:`mono_quant.quantize`.
    """
    started = time.perf_counter()
    budget = request.budget
    _require_searchable(options, request)
    options = replace(options, bits=8)
    formats = parse_formats(budget.formats)
    batches = read_batches(request.calibration, model)
    units, _ = find_units(model, options, formats)
    plain = replace(options, group_size=None)
    if not units:
        return quantize_by_schemes(model, {}, plain)  # says why there is nothing to quantize
    seed = DEFAULT_SEED if budget.seed is None else budget.seed
    journal = Journal.open(budget.resume, _fingerprint(model, batches, units, budget, seed))
    copy = WorkingCopy(model, units)
    if budget.max_bytes is not None:
        require_room(copy, budget.max_bytes)
    costs = _costs(copy, batches, formats, journal, seed, progress)
    path, objective = _path(costs, budget, uniform_assignment(units, INT8))
    notes = [*journal.notes]
    if objective != budget.chosen_objective:
        notes.append("no format is faster than float here: the search made the bytes small")
    needs_outputs = budget.eval_fn is None or budget.min_sqnr_db is not None
    measure = Measure(copy, journal, budget.eval_fn, batches if needs_outputs else (), seed, options.fuse_activations)
    passes = len(batches) * (1 + len(formats))
    walk = Walk(copy, path, objective, costs, budget, measure, INT8 in formats, _offset(progress, passes))
    outcome = walk.run()
    report = walk.report(outcome, started, sum(batch.samples for batch in batches), seed, tuple(notes))
    walk.require_met(report)
    schemes = schemes_of(units, outcome.formats)
    left = {layer: _WHY_FLOAT for layer, scheme in schemes.items() if scheme is None}
    result = quantize_by_schemes(model, schemes, plain, why_float=left)
    result.search = report
    result.info.calibration_samples_used = report.samples
    result.info.seconds = time.perf_counter() - started
    result.info.warnings += notes
    result.warnings += notes
    return result


def _require_searchable(options: Options, request: Request) -> None:
    """Refuse options that a search would have to ignore.

    Raises:
        ConfigurationError, InputError: As named.
    """
    if request.calibration.data is None:
        raise InputError(
            "a search measures how sensitive each layer is, which needs calibration_data",
            suggestion="Pass some typical inputs: a tensor, or a list of batches.",
        )
    if not isinstance(request.bits, int) or options.bits != 8:
        raise ConfigurationError(
            "bits contradicts max_drop, min_sqnr_db and max_bytes: the search chooses the bits of each layer",
            suggestion="Leave it out; formats= says what the search may choose from, skip= what it leaves alone.",
        )
    for name, given in (
        ("inplace=True", options.inplace),
        (f"compute_dtype={options.compute_dtype}", options.compute_dtype is not None),
        ("dynamic=False", request.dynamic is False),
        (f"algorithm={request.algorithm!r}", request.algorithm is not None),
    ):
        if given:
            raise ConfigurationError(
                f"{name} and a search under a budget exclude each other", suggestion="Leave one of them out."
            )


def _fingerprint(
    model: nn.Module, batches: Sequence[Batch], units: Sequence[Unit], budget: Budget, seed: int
) -> dict[str, str]:
    """Answer what measurements depend on. The targets are not part of it: other targets can use the same ones."""
    eval_fn = budget.eval_fn
    named = getattr(eval_fn, "__qualname__", type(eval_fn).__qualname__)
    return {
        "the model": hash_model(model),
        "the calibration data": hash_batches(batches),
        "the layers or their formats": repr(
            {
                unit.layers: {name: [str(c.scheme) for c in members] for name, members in unit.formats.items()}
                for unit in units
            }
        ),
        "whether outputs are compared": str(eval_fn is None or budget.min_sqnr_db is not None),
        "eval_fn": "none" if eval_fn is None else f"{getattr(eval_fn, '__module__', '')}.{named}",
        "the seed": str(seed),
        "the library's version": __version__,
    }


def _costs(
    copy: WorkingCopy, batches: Sequence[Batch], formats: Sequence[str], journal: Journal, seed: int,
    progress: Progress | None,
) -> dict[str, UnitCosts]:  # fmt: skip
    """Answer what every unit costs and causes, from the journal if it is there."""
    if journal.costs is None:

        def report(done: int, total: int, what: str) -> None:
            if progress is not None:
                progress(done, total + 1, what)

        effects = measure_effects(copy, batches, formats, Outputs(), seed, report)
        journal.costs = {unit.name: _unit_costs(copy, unit, effects) for unit in copy.units}
        journal.notes = _notes(effects, copy)
        journal.write()
    return journal.costs


def _unit_costs(copy: WorkingCopy, unit: Unit, effects: Effects) -> UnitCosts:
    names = (*unit.formats, FLOAT)
    called = [layer for layer in unit.layers if (layer, FLOAT) in effects.seconds]
    noise = {name: effects.noise[unit.name, name] for name in unit.formats if (unit.name, name) in effects.noise}
    signal = effects.signal or 1.0
    return UnitCosts(
        bytes={name: copy.unit_bytes(unit, name) for name in names},
        seconds={name: sum(effects.seconds[layer, name] for layer in called) for name in names} if called else {},
        noise={name: energy / signal for name, energy in noise.items()},
    )


def _path(costs: dict[str, UnitCosts], budget: Budget, fallback: dict[str, str]) -> tuple[Path, str]:
    """Answer the path and its objective: bytes where nothing is faster than the float model."""
    for objective in (budget.chosen_objective, BYTES):
        path = build_path(costs, objective, fallback)
        if set(path.start.values()) != {FLOAT}:
            break
    return path, objective


def _notes(effects: Effects, copy: WorkingCopy) -> list[str]:
    reached = {layer for layer, _ in effects.alone}
    unknown = [layer for layer in copy.layer_names if layer not in reached]
    if not unknown:
        return []
    return [f"no calibration data reached these layers, which are int8 unmeasured: {shortened(unknown)}"]


def _offset(progress: Progress | None, passes: int) -> Progress:
    def report(done: int, total: int, what: str) -> None:
        if progress is not None:
            progress(passes + done, passes + total, what)

    return report


__all__ = ["search_precision"]
