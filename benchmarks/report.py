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
from benchmarks.accuracy_table import accuracy_table

README = Path(__file__).parent.parent / "README.md"
#: The keys of float32 in the results of :mod:`benchmarks.vision`.
VISION_BASELINES = ("torch_float32", "torch_channels_last")
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


def decoding_table(document: results.Document) -> str:
    """Answer the results of :mod:`benchmarks.decoding` as Markdown."""
    rows = []
    for engine in document["engines"]:
        step, prefill = engine["step"], engine["prefill"]
        tokens = f"{1 / step['median']:.0f} ({1 / step['ratio']:.2f})"
        read = "" if prefill is None else f"{prefill['median'] * 1e3:.0f} ({1 / prefill['ratio']:.2f})"
        rows.append([engine["name"], tokens, read, f"{engine['weight_bytes'] / 1e6:.0f}"])
    window = document["window"]
    parts = [
        _table(["SmolLM2-135M", "tokens per second", f"reading {window} tokens, ms", "weights, MB"], rows),
        _provenance(document),
    ]
    parts += [f"Left out: {key} {reason}." for key, reason in document["skipped"].items()]
    parts.append(
        f"Greedy decoding of one sequence behind a prompt of {document['prompt']} tokens, eager where not said "
        "otherwise; medians of calls in bursts that take turns. In brackets how many times as fast as float32."
    )
    return "\n\n".join(parts)


def vision_table(document: results.Document) -> str:
    """Answer the results of :mod:`benchmarks.vision` as Markdown: a table of latencies, one of all else."""
    networks, engines = document["networks"], document["engines"]
    cells = [(network, batch) for network, found in networks.items() for batch in _batches(found)]
    latencies, others = [], []
    for key, engine in engines.items():
        # An engine may have failed on one network.
        found = {network: networks[network]["engines"].get(key) for network in networks}
        row = [_duration(found[n]["latency"][b], 1e3, "ms") if found[n] else "" for n, b in cells]
        latencies.append([engine["name"], *row])
        accuracy = next((f["accuracy"] for f in found.values() if f and f["accuracy"]), None)
        judged = ["", ""] if accuracy is None else [f"{accuracy['agreement']:.3f}", _decibels(accuracy["snr_db"])]
        peaks = [_peak(networks[n], found[n], b) for n, b in cells]
        others.append([engine["name"], *judged, *peaks])
    titles = [f"{network}, {batch}" for network, batch in cells]
    parts = [
        _table(["latency, ms", *titles], latencies),
        _table(["accuracy; memory, MB", "agreement", "SNR, dB", *titles], others),
        _provenance(document),
    ]
    parts += [f"Left out: {key} {reason}." for key, reason in document["skipped"].items()]
    parts.append(
        "Images of 224x224; network, batch. Latency: median of calls in bursts that take turns, in brackets the ratio "
        "to the faster float32. Accuracy of EfficientNet-Lite0 on "
        f"{document['images']} crops of photographs against float32: how often the first class is the same, and the "
        f"signal-to-noise ratio of the logits; calibrated on {document['calibration_images']} crops of other "
        "photographs. Memory: highest resident size while running less that of the process before the model was "
        "loaded, in brackets the ratio to the smaller float32. ResNet-50 has random weights."
    )
    parts.append(_calibration(document))
    return "\n\n".join(parts)


def _batches(network: dict[str, Any]) -> list[str]:
    return list(next(iter(network["engines"].values()))["latency"])


def _decibels(value: float) -> str:
    return "exact" if value > 200 else f"{value:.1f}"


def _peak(network: dict[str, Any], engine: dict[str, Any] | None, batch: str) -> str:
    if engine is None or engine["peak_bytes"][batch] is None:
        return ""
    floats = [found["peak_bytes"][batch] for key, found in network["engines"].items() if key in VISION_BASELINES]
    peak = engine["peak_bytes"][batch]
    return f"{peak / 1e6:.0f} ({peak / min(floats):.2f})"


def _calibration(document: results.Document) -> str:
    lines = []
    for network, found in document["networks"].items():
        ours = found["engines"].get("mono_quant_static")
        if ours is not None:
            ratio = ours["prepare_seconds"] / found["float32_seconds"]
            lines.append(
                f"Quantizing {network} with {document['calibration_images']} images takes "
                f"{ours['prepare_seconds']:.1f} s, {ratio:.2f} times as long as running them in float32."
            )
            alone = found.get("calibration_seconds")
            if alone is not None:
                share = alone / found["float32_seconds"]
                lines.append(f"Of that, running and watching the images takes {alone:.1f} s ({share:.2f} times).")
    return " ".join(lines)


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


def search_table(document: results.Document) -> str:
    """Answer the results of :mod:`benchmarks.search` as Markdown."""
    models = document["models"]
    shapes = list(models[0]["latency"])
    rows = []
    for model in models:
        agreement = [f"{value:.3f}" for value in model["neighbours_of_sets"]]
        latency = [_duration(model["latency"][shape], 1e3, "ms") for shape in shapes]
        rows.append([model["name"], *latency, agreement[0], ", ".join(agreement[1:]), f"{model['bytes'] / 1e6:.1f}"])
    header = ["all-MiniLM-L6-v2", *shapes, "neighbours", "other sets", "model, MB"]
    parts = [_table(header, rows), _provenance(document)]
    parts.append(
        f"The searches measure the neighbours of {document['sentences']} sentences, and the sensitivity of layers on "
        f"{document['calibration_sentences']} others; the other sets are sentences that neither saw. Latency as above."
    )
    parts.append(" ".join(_course(model) for model in models if model["search"] is not None))
    return "\n\n".join(parts)


def _course(model: dict[str, Any]) -> str:
    search = model["search"]
    formats = list(search["points"][search["chosen"]]["formats"].values())
    counts = sorted(((formats.count(name), name) for name in set(formats)), reverse=True)
    chosen = ", ".join(f"{count} {name}" for count, name in counts)
    return (
        f"With {search['target']} the search takes {search['seconds']:.0f} s and {search['evaluations']} evaluations; "
        f"its layers: {chosen}."
    )


TABLES: dict[str, Callable[[results.Document], str]] = {
    "models": models_table,
    "accuracy": accuracy_table,
    "linear": linear_table,
    "decoding": decoding_table,
    "vision": vision_table,
    "search": search_table,
}


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
