"""The results of :mod:`benchmarks.accuracy` as Markdown."""

from __future__ import annotations

from typing import Any

_MODELS = {
    "smollm2": ("SmolLM2-135M", "perplexity", "{:.2f}"),
    "minilm": ("all-MiniLM-L6-v2", "neighbours", "{:.3f}"),
}


def accuracy_table(document: dict[str, Any]) -> str:
    """Answer one table for each model that was measured, and how it was measured."""
    parts = []
    for key, (name, measure, form) in _MODELS.items():
        rows = [row for row in document["rows"] if row["key"].startswith(f"{key}/")]
        if rows:
            header = [name, "calibrated on", measure, "MB", "CPU s", "memory"]
            parts.append(_markdown(header, [_cells(row, form) for row in rows]))
    dates = sorted({row["date"] for row in document["rows"]})
    environment = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    parts.append(
        f"Measured on {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {environment['processor']}, "
        f"{environment['cores']} cores, kernels {environment['kernels'] or environment['backend']}; {versions}."
    )
    parts.append(
        "Perplexity on the first 8,192 tokens of CPython's help in windows of 512; text for calibration lies behind "
        "them: 64 windows. Its own text: 32 texts of 256 tokens that the model wrote. Neighbours: agreement of the ten "
        "nearest neighbours of 512 sentences with float32's, calibrated on 128 others. CPU s: of quantizing, all "
        "threads together. Memory: the most that the model and its quantization need together, in units of the float32 "
        "model. Packed weights are asymmetric unless stated otherwise; embeddings, and the output layer that shares "
        "their weight, are int8 unless stated otherwise."
    )
    return "\n\n".join(parts)


def _cells(row: dict[str, Any], form: str) -> list[str]:
    seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
    memory = f"{row['peak_ratio']:.2f}" if "peak_ratio" in row else ""
    data = "" if row["data"] == "none" else row["data"]
    return [row["title"], data, form.format(row["figure"]), f"{row['bytes'] / 1e6:.0f}", seconds, memory]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
