"""The progress bar that ``show_progress`` asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from mono_quant.api.replace import Progress


@contextmanager
def progress_bar(progress: Progress | None, show: bool) -> Iterator[Progress | None]:
    """Answer what a run reports its progress to: ``progress``, and with ``show`` a bar on standard error too."""
    if not show:
        yield progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Quantizing", total=None)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"Quantizing {name}")
            if progress is not None:
                progress(done, total, name)

        yield report
