"""Turns kept results into tables, and puts them into the README.

    python -m benchmarks.report [--check]

The README has a block for each benchmark, between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``; what
stands between is replaced. Nothing in such a block is written by hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results

README = Path(__file__).parent.parent / "README.md"
NOT_MEASURED = "No measurement has been kept yet; `make bench` makes one."


def models_table(document: results.Document) -> str:
    """Answer the results of :mod:`benchmarks.models` as Markdown."""
    engines = document["engines"]
    shapes = list(engines[0]["latency"])
    rows = []
    for engine in engines:
        accuracy = engine["accuracy"]
        size = "" if engine["disk_bytes"] is None else f"{engine['disk_bytes'] / 1e6:.1f}"
        latency = [_duration(engine["latency"][shape], 1e3, "ms") for shape in shapes]
        sets = accuracy["neighbours_of_sets"]
        neighbours = [f"{accuracy['neighbours']:.3f}", f"{min(sets):.3f} to {max(sets):.3f}"]
        rows.append([engine["name"], *latency, *neighbours, f"{accuracy['mean_cosine']:.4f}", size])
    header = ["all-MiniLM-L6-v2", *shapes, "neighbours", "over sets", "cosine", "file, MB"]
    parts = [_table(header, rows), _provenance(document)]
    parts += [f"Left out: {key} {reason}." for key, reason in document["skipped"].items()]
    parts.append(
        "Latency in ms, batch x length, median of calls in bursts that take turns; in brackets the ratio to float32. "
        f"Neighbours: agreement of the ten nearest neighbours of {document['sentences']} sentences with float32's; "
        "beside it the range over several disjoint sets of as many sentences, this one included."
    )
    parts.append(_quantization(document["quantization"]))
    return "\n\n".join(parts)


def _quantization(cost: dict[str, dict[str, float]]) -> str:
    lines = []
    for name, title in (("copy", "Quantizing a copy"), ("inplace", "Quantizing in place")):
        figures = cost[name]
        peak = (
            f", at most {figures['peak_ratio']:.2f} times the model's bytes resident" if "peak_ratio" in figures else ""
        )
        lines.append(f"{title} takes {figures['cpu_seconds']:.2f} s of CPU time{peak}.")
    return " ".join(lines)


def linear_table(document: results.Document) -> str:
    """Answer the results of :mod:`benchmarks.linear` as Markdown."""
    shapes = document["shapes"]
    names = list(shapes[0]["engines"])
    rows = []
    for shape in shapes:
        title = f"{shape['rows']}, {shape['inputs']}, {shape['outputs']}"
        rows.append([title, *(_duration(shape["engines"][name], 1e6, "us") for name in names)])
    return "\n\n".join(
        [
            _table(["rows, inputs, outputs", *names], rows),
            _provenance(document),
            "Microseconds, median of calls in bursts that take turns; in brackets the ratio to float32. The columns "
            "marked alone multiply operands that are already quantized; ours quantizes its input.",
        ]
    )


def _duration(timing: dict[str, Any], factor: float, unit: str) -> str:
    value = timing["median"] * factor
    text = f"{value:.0f}" if value >= 100 or unit == "us" else f"{value:.1f}"
    return f"{text} ({timing['ratio']:.2f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _provenance(document: results.Document) -> str:
    environment = document["environment"]
    sets = ", ".join(environment["features"]) or "none named"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    kernels = environment["backend"]
    if environment["backend"] == "native":
        kernels += f" ({environment['kernels']})"
    return (
        f"Measured on {environment['date']}: {environment['processor']}, {environment['cores']} cores ({sets}), "
        f"{environment['threads']} threads, mono_quant's backend {kernels}, {environment['system']}, "
        f"Python {environment['python']}; {versions}."
    )


TABLES: dict[str, Callable[[results.Document], str]] = {"models": models_table, "linear": linear_table}


def fill(text: str, directory: Path = results.DIRECTORY) -> str:
    """Answer ``text`` with every results block replaced by what ``directory`` holds.

    Raises:
        ValueError: A block is missing, or results are of another format.
    """
    for name, table in TABLES.items():
        document = results.read(directory / f"{name}.json")
        content = NOT_MEASURED if document is None else table(document)
        pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results:{name} -->)", re.DOTALL)
        block = pattern.search(text)
        if block is None:
            raise ValueError(f"there is no block <!-- results:{name} --> ... <!-- /results:{name} -->")
        text = text[: block.end(1)] + content + "\n" + text[block.start(2) :]
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fill the README's tables from the kept results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is out of date")
    options: Any = parser.parse_args(arguments)
    before = README.read_text(encoding="utf-8")
    after = fill(before)
    if options.check and before != after:
        raise SystemExit("README.md does not show the kept results: run python -m benchmarks.report")
    if not options.check:
        README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
