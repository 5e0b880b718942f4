"""Where results and messages go: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

#: Called with the number done, the number in all, and what was done last.
Report = Callable[[int, int, str], None]

# Wide enough for any table, so that a file or another program gets whole lines.
_PIPED_WIDTH = 1000
# Without a terminal progress is a line now and then.
_SECONDS_BETWEEN_LINES = 2.0
_SECONDS_BETWEEN_FRAMES = 0.1


class Output:
    """Prints results as tables or as one JSON document, and messages beside them.

    Args:
        as_json: Results are one JSON document on standard output.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.results = _console(sys.stdout)
        self.messages = _console(sys.stderr)

    def message(self, text: str) -> None:
        """Print a line for people on standard error."""
        click.echo(text, err=True)

    def warning(self, text: str) -> None:
        click.echo(f"Warning: {text}", err=True)

    def document(self, values: dict[str, Any]) -> None:
        """Print the result of a command as JSON. Numbers that JSON does not have (infinity, NaN) become null."""
        click.echo(json.dumps(plain(values), indent=2, allow_nan=False))

    def facts(self, title: str, pairs: Sequence[tuple[str, str]]) -> None:
        """Print a title and aligned pairs of a name and a value."""
        self._print(Text(title, style="bold"))
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            self._print(Text.assemble((f"  {name:<{width}}  ", "dim"), value))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
        """Print a table; columns named in ``numbers`` are aligned to the right."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
        for column in columns:
            right = column in numbers
            table.add_column(
                column, justify="right" if right else "left", overflow="fold", no_wrap=column == columns[0]
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if self.results.is_terminal:
            self.results.print(table)
            return
        with self.results.capture() as captured:
            self.results.print(table)
        for line in captured.get().splitlines():
            click.echo(line.rstrip())

    def _print(self, text: Text) -> None:
        # A path that is broken over two lines cannot be copied.
        self.results.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, description: str) -> Iterator[Report]:
        """Show a bar on a terminal, and elsewhere a line now and then; both on standard error."""
        if not self.messages.is_terminal:
            yield _Lines(self, description)
            return
        with _Bar(self.messages, description) as bar:
            yield bar


class _Bar:
    """A bar that is drawn by the calls themselves: a thread that draws would disturb what is being timed."""

    def __init__(self, console: Console, description: str) -> None:
        what = TextColumn("{task.fields[what]}", markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), what)
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._description = description
        self._task: TaskID | None = None
        self._drawn = 0.0

    def __enter__(self) -> _Bar:
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(self._description, total=total, what="")
        draw = done == total or time.monotonic() - self._drawn > _SECONDS_BETWEEN_FRAMES
        self._progress.update(self._task, completed=done, total=total, what=what, refresh=draw)
        if draw:
            self._drawn = time.monotonic()

    def __exit__(self, *_error: object) -> None:
        if self._task is not None:
            self._progress.stop()


class _Lines:
    """Progress for files and pipes: a line at the end, and before it one every few seconds."""

    def __init__(self, output: Output, description: str) -> None:
        self._output = output
        self._description = description
        self._last = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        del what
        if done == total or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._output.message(f"{self._description}: {done}/{total}")


def _console(stream: Any) -> Console:
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def plain(value: Any) -> Any:
    """Answer a value that JSON can hold: what is not finite becomes ``None``, what is no plain value its text."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size_text(count: int) -> str:
    """Answer a number of bytes for people: ``86.7 MiB``."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def decibels_text(value: float | None) -> str:
    """Answer a ratio in decibels for people."""
    if value is None:
        return "not measured"
    return "exact" if value == math.inf else f"{value:.1f} dB"


def seconds_text(value: float) -> str:
    """Answer a duration for people, to three digits: ``1.42 s``, ``7.31 ms``, ``12 us``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.0f} {unit}" if value * factor >= 100 else f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def names_text(names: Sequence[str], shown: int = 3) -> str:
    """Answer the first few of many names."""
    listed = ", ".join(name or "(the model itself)" for name in names[:shown])
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")


def layer_facts(schemes: Mapping[str, str], skipped: Mapping[str, str]) -> list[tuple[str, str]]:
    """Answer pairs for :meth:`Output.facts`: how many layers are quantized and how, how many are not and why.

    Args:
        schemes: For each quantized layer how.
        skipped: For each other layer why not.
    """
    facts = []
    for name, groups in (("quantized", grouped(schemes)), ("skipped", grouped(skipped))):
        for how, layers in groups.items():
            facts.append((name, f"{len(layers)} layer{'s' if len(layers) > 1 else ''}: {how}"))
            if name == "skipped" or len(groups) > 1:
                facts.append(("", f"({names_text(layers)})"))
    return facts


def grouped(items: Mapping[str, str]) -> dict[str, list[str]]:
    """Answer for each value the keys that have it, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for key, value in items.items():
        groups.setdefault(value, []).append(key)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


__all__ = [
    "Output",
    "Report",
    "decibels_text",
    "grouped",
    "layer_facts",
    "names_text",
    "plain",
    "seconds_text",
    "size_text",
]
