"""``monoquant compare``: the original against the quantized model."""

from __future__ import annotations

import click

from mono_quant.cli.models import choose_inputs, load_pair
from mono_quant.cli.options import input_options, json_option, loading_options
from mono_quant.cli.output import Output, decibels_text, seconds_text, size_text
from mono_quant.report import Comparison, compare_models

_METRICS = ("size", "sqnr", "output", "latency")
_WORST_LAYERS = 10


@click.command()
@click.argument("original")
@click.argument("quantized")
@click.option(
    "--metrics", "-m", type=click.Choice([*_METRICS, "all"]), multiple=True, default=("all",), show_default=True,
    help="What to compare; sqnr is that of the weights. Repeatable.",
)  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Timings of each model.")
@click.option("--layers", is_flag=True, help="List every layer, not only the worst ten.")
@input_options
@loading_options
@json_option
def compare(
    output: Output,
    original: str,
    quantized: str,
    metrics: tuple[str, ...],
    repeats: int,
    layers: bool,
    inputs_argument: str | None,
    batch: int,
    length: int,
    architecture: str | None,
    allow_pickle: bool,
) -> None:
    """Compare ORIGINAL with QUANTIZED: size, error of the weights and outputs, latency.

    A checkpoint is loaded into the original's architecture if that has one. Of two files of tensors without
    --architecture, only sizes and weights are compared.

    \b
    monoquant compare path/to/transformers_directory quantized.safetensors --batch 8 --length 64
    monoquant compare mypackage.models:build quantized.safetensors --inputs batch.safetensors
    """
    wanted = set(_METRICS) if "all" in metrics else set(metrics)
    output.message(f"Loading {original} and {quantized}")
    first, second = load_pair(original, quantized, architecture, allow_pickle)
    inputs = None
    if wanted & {"output", "latency"}:
        inputs = choose_inputs(inputs_argument, [first, second], batch, length)
        if inputs is None:
            output.warning(
                "no inputs to run on, or no architecture: outputs and latency are not compared "
                "(see --inputs and --architecture)"
            )
    with output.progress("Timing") as report:
        found = compare_models(
            first.model,
            second.model,
            inputs,
            repeats if "latency" in wanted else 0,
            records=second.records,
            progress=lambda done, total: report(done, total, ""),
        )
    for warning in found.warnings:
        output.warning(warning)
    if output.as_json:
        output.document({"original": original, "quantized": quantized, **_chosen(found, wanted)})
    else:
        _print(output, f"{original} against {quantized}", found, wanted, layers)


def _chosen(found: Comparison, wanted: set[str]) -> dict[str, object]:
    parts = {
        "size": ("original_bytes", "quantized_bytes", "size_ratio"),
        "sqnr": ("weight_sqnr_db", "layers"),
        "output": ("outputs",),
        "latency": ("latency",),
    }
    values = found.to_dict()
    names = [name for metric, part in parts.items() if metric in wanted for name in part]
    return {name: values[name] for name in [*names, "warnings"]}


def _print(output: Output, title: str, found: Comparison, wanted: set[str], every: bool) -> None:
    facts = []
    if "size" in wanted:
        sizes = f"{size_text(found.original_bytes)} -> {size_text(found.quantized_bytes)}"
        facts.append(("size", f"{sizes} (ratio {found.size_ratio:.3f})"))
    if "sqnr" in wanted:
        facts.append(("SQNR of weights", decibels_text(found.weight_sqnr_db)))
    if found.latency is not None:
        times = f"{seconds_text(found.latency.original)} -> {seconds_text(found.latency.quantized)}"
        how = f"median of {found.latency.repeats}, {found.latency.threads} threads"
        facts.append(("latency", f"{times} (ratio {found.latency.ratio:.3f}; {how})"))
    output.facts(title, facts)
    if "output" in wanted and found.outputs:
        rows = [
            (error.name, str(list(error.shape)), decibels_text(error.sqnr_db), f"{error.cosine:.6f}",
             f"{error.max_abs_error:.3g}")
            for error in found.outputs
        ]  # fmt: skip
        columns = ("output", "shape", "SQNR", "cosine", "largest error")
        output.table(columns, rows, numbers=("SQNR", "cosine", "largest error"))
    if "sqnr" in wanted and found.layers:
        ordered = sorted(found.layers, key=lambda layer: layer.sqnr_db)
        shown = ordered if every else ordered[:_WORST_LAYERS]
        layers = [(layer.layer or "(the model itself)", decibels_text(layer.sqnr_db), layer.scheme) for layer in shown]
        heading = "layer" if len(shown) == len(ordered) else f"layer (worst {len(shown)} of {len(ordered)})"
        output.table((heading, "SQNR", "scheme"), layers, numbers=("SQNR",))


__all__ = ["compare"]
