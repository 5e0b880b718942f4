"""The options of a search under a budget, and what is printed of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click

from mono_quant.api.formats import FORMATS
from mono_quant.api.method import BYTES, LATENCY
from mono_quant.cli.models import find_object
from mono_quant.cli.output import Output, Report, decibels_text, seconds_text, size_text
from mono_quant.errors import InputError
from mono_quant.report import SearchPoint, SearchReport

Command = Callable[..., Any]

_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_size(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """Answer a number of bytes: ``1500000``, ``1.5M`` or ``300K``, in steps of 1,024."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", value, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size; expected for example 1500000, 300K, 22.5M or 1G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def formats_option(command: Command) -> Command:
    """Add the formats that layers may have."""
    return click.option(
        "--formats", metavar="NAME,...", callback=_split,
        help=f"Formats that layers may have, of {', '.join(FORMATS)}.  [default: all]",
    )(command)  # fmt: skip


def _split(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",")]


@dataclass(frozen=True)
class SearchChoices:
    """What the command line says about a search; see :func:`mono_quant.quantize` for the fields."""

    max_drop: float | None
    evaluate: str | None
    min_sqnr_db: float | None
    max_bytes: int | None
    objective: str | None
    formats: list[str] | None
    seed: int | None
    resume: Path | None

    @property
    def wanted(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def options(self) -> dict[str, Any]:
        """Answer the options of the library's call.

        Raises:
            InputError: The measure cannot be imported.
        """
        given = {name: value for name, value in vars(self).items() if name != "evaluate"}
        return {**given, "eval_fn": load_measure(self.evaluate)}


def search_options(command: Command) -> Command:
    """Add the budget of a search, which arrives as ``search``: :class:`SearchChoices`."""
    names = [field.name for field in fields(SearchChoices)]

    @wraps(command)
    def collect(*arguments: Any, **options: Any) -> Any:
        choices = SearchChoices(**{name: options.pop(name) for name in names})
        return command(*arguments, search=choices, **options)

    return _add_options(collect)


def _add_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option(
                "--max-drop", type=float,
                help="Search: how far the measure of --eval may fall below that of the float model. Needs --calibrate.",
            ),
            click.option(
                "--eval", "evaluate", metavar="FUNCTION",
                help="Search: package.module:function that takes the model and answers a number, higher for better.",
            ),
            click.option(
                "--min-sqnr-db", type=float,
                help="Search: the least signal-to-noise ratio of the outputs on the calibration data, in decibels.",
            ),
            click.option(
                "--max-bytes", callback=parse_size, metavar="N[K|M|G]", help="Search: the most bytes of the model."
            ),
            click.option(
                "--objective", type=click.Choice([LATENCY, BYTES]),
                help=f"Search: what to make small.  [default: {BYTES} with --max-bytes, else {LATENCY}]",
            ),
            formats_option,
            click.option("--seed", type=click.IntRange(0), help="Search: fixes every random choice.  [default: 0]"),
            click.option(
                "--resume", type=click.Path(path_type=Path), metavar="FILE",
                help="Search: keep what is measured in FILE, and go on from it.",
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def load_measure(argument: str | None) -> Any:
    """Answer the function that ``--eval`` names; ``None`` without it.

    Raises:
        InputError: It cannot be imported or cannot be called.
    """
    if argument is None:
        return None
    found = find_object(argument, "the measure")
    if not callable(found):
        raise InputError(
            f"the measure {argument!r} is of type {type(found).__name__}; expected a function that takes the model and "
            "answers a number"
        )
    return found


def telling(output: Output, report: Report) -> Report:
    """Answer a report that also prints what a search found, once each, where there is no terminal to show it."""
    if output.messages.is_terminal:
        return report
    told: set[str] = set()

    def tell(done: int, total: int, what: str) -> None:
        report(done, total, what)
        if what not in told:
            told.add(what)
            output.message(f"  {what}")

    return tell


def search_facts(report: SearchReport | None) -> list[tuple[str, str]]:
    """Answer what is worth saying of a search; nothing where there was none."""
    if report is None:
        return []
    best = report.best
    facts = [("kept", f"{report.target}, smallest {'time' if report.objective == LATENCY else 'size'}")]
    if best.value is not None and report.float_value is not None:
        facts.append(("measure", f"{report.float_value:.6g} -> {best.value:.6g} (drop {best.drop:.6g})"))
    if best.sqnr_db is not None:
        facts.append(("SQNR of outputs", decibels_text(best.sqnr_db)))
    facts.append(("formats", _counts(best)))
    found = f"{len(report.points)} choices of formats; {report.evaluations} evaluations in this run"
    facts.append(("search", f"{found}, {seconds_text(report.seconds)}"))
    return facts


def _counts(point: SearchPoint) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(point.counts().items(), key=lambda item: -item[1]))


def search_table(report: SearchReport) -> tuple[list[str], list[list[str]]]:
    """Answer columns and rows for all models that the search measured."""
    best = report.best
    rows = []
    for point in sorted(report.points, key=lambda point: point.bytes):
        measures = ["" if point.value is None else f"{point.value:.6g}"]
        measures.append("" if point.sqnr_db is None else decibels_text(point.sqnr_db))
        kept = "chosen" if point is best else ("yes" if point.within_budget else "no")
        seconds = seconds_text(point.seconds_of_layers)
        rows.append([point.label, size_text(point.bytes), seconds, *measures, kept, _counts(point)])
    return ["measured", "size", "layers take", "measure", "SQNR", "in budget", "formats"], rows


__all__ = [
    "SearchChoices",
    "formats_option",
    "load_measure",
    "parse_size",
    "search_facts",
    "search_options",
    "search_table",
    "telling",
]
