"""``monoquant sensitivity``: which layers suffer from which format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from torch import nn

from mono_quant.api import sensitivity as measure_sensitivity
from mono_quant.api.formats import FLOAT, INT8
from mono_quant.cli.calibration import load_calibration
from mono_quant.cli.models import load, load_architecture
from mono_quant.cli.options import json_option, loading_options
from mono_quant.cli.output import Output, decibels_text, plain, seconds_text, size_text
from mono_quant.cli.search import formats_option
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.io.atomic import atomic_write
from mono_quant.report import FormatEffect, LayerSensitivity, SensitivityReport

_SHOWN_LAYERS = 20


@click.command()
@click.argument("model")
@click.option(
    "--calibrate", metavar="FILE|LOADER", required=True,
    help="Inputs to measure on: .safetensors with a tensor for each argument, .npy, or package.module:loader, a "
    "function that answers batches.",
)  # fmt: skip
@click.option("--calibration-samples", type=click.IntRange(1), help="Use at most so many of them.  [default: 128]")
@formats_option
@click.option("--by", "by", metavar="FORMAT", help="Sort by what this format does.  [default: int8, else the first]")
@click.option(
    "--scheme", "-s", type=click.Choice(["symmetric", "asymmetric"]), default="symmetric", show_default=True,
    help="Whether weights have zero points.",
)  # fmt: skip
@click.option("--group-size", type=int, help="Inputs that share one scale in int4 and int8_weights.")
@click.option("--include", multiple=True, metavar="NAME", help="Measure only these layers. Repeatable.")
@click.option("--skip", multiple=True, metavar="NAME", help="Leave these layers alone: names or globs. Repeatable.")
@click.option("--logits", metavar="NAME", help='The output that holds logits; "output" if it is the only one.')
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Fixes every random choice.")
@click.option("--layers", is_flag=True, help=f"List every layer, not only the worst {_SHOWN_LAYERS}.")
@click.option("--output", "-o", "path", type=click.Path(path_type=Path), help="Save the whole report as JSON.")
@loading_options
@json_option
def sensitivity(
    output: Output,
    model: str,
    calibrate: str,
    calibration_samples: int | None,
    formats: list[str] | None,
    by: str | None,
    scheme: str,
    group_size: int | None,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    logits: str | None,
    seed: int,
    layers: bool,
    path: Path | None,
    architecture: str | None,
    allow_pickle: bool,
) -> None:
    """Show what quantizing each layer of MODEL does to it, what hurts most first.

    For each format: the signal-to-noise ratio of the model's output where that layer alone is quantized. For one of
    them also that of the layer's own output, alone and with all layers before it quantized too.

    \b
    monoquant sensitivity path/to/transformers_directory --calibrate tokens.safetensors
    monoquant sensitivity mypackage.models:build --calibrate mypackage.data:batches --formats int4,int8
    """
    output.message(f"Loading {model}")
    loaded = load(model, load_architecture(architecture), allow_pickle)
    if not isinstance(loaded.model, nn.Module):
        raise InputError(
            f"{model} holds tensors without an architecture and cannot run on calibration data",
            suggestion="Give --architecture package.module:factory.",
        )
    data = load_calibration(calibrate)
    with output.progress("Measuring") as report:
        found = measure_sensitivity(
            loaded.model, data, formats=formats, include=include or None, skip=skip or None, scheme=scheme,
            group_size=group_size, num_calibration_samples=calibration_samples, logits=logits, seed=seed,
            progress=report,
        )  # fmt: skip
    by = _sorting_format(found, by)
    document = {"model": model, "sorted_by": by, **_document(found, by)}
    if path is not None:
        with atomic_write(path) as stream:
            stream.write((json.dumps(plain(document), indent=2, allow_nan=False) + "\n").encode())
    for note in found.notes:
        output.warning(note)
    if output.as_json:
        output.document(document)
    else:
        _print(output, model, found, by, layers)


def _sorting_format(found: SensitivityReport, wanted: str | None) -> str:
    names = list(found.uniform)
    if wanted is not None and wanted not in names:
        raise ConfigurationError(f"--by {wanted} is not one of the measured formats: {', '.join(names)}")
    return wanted or (INT8 if INT8 in names else names[0])


def _ordered(found: SensitivityReport, by: str) -> list[LayerSensitivity]:
    worst = found.worst(by)
    return [*worst, *(layer for layer in found.layers if by not in layer.formats)]


def _document(found: SensitivityReport, by: str) -> dict[str, Any]:
    values = found.to_dict()
    by_name = {layer["name"]: layer for layer in values["layers"]}
    return {**values, "layers": [by_name[layer.name] for layer in _ordered(found, by)]}


def _print(output: Output, title: str, found: SensitivityReport, by: str, every: bool) -> None:
    output.facts(title, [("measured on", f"{found.samples} samples")])
    rows = []
    for name, effect in found.uniform.items():
        kl = [] if effect.kl is None else [f"{effect.kl:.3g}"]
        cosine = f"{effect.output.cosine:.6f}"
        rows.append([name, size_text(effect.bytes), decibels_text(effect.output.sqnr_db), cosine, *kl])
    columns = ["every layer in", "size", "SQNR of output", "cosine", *(["KL, nats"] if found.logits else [])]
    output.table(columns, rows, numbers=columns[1:])
    ordered = _ordered(found, by)
    shown = ordered if every else ordered[:_SHOWN_LAYERS]
    names = list(found.uniform)
    heading = (
        "layer alone in" if len(shown) == len(ordered) else f"layer alone in (worst {len(shown)} of {len(ordered)})"
    )
    columns = [heading, "size", *names, f"own, {by}", "in company", f"{by} takes", "float takes"]
    output.facts("Sensitivity of layers", [("sorted by", f"what {by} does to the model's output")])
    output.table(columns, [_row(layer, names, by) for layer in shown], numbers=columns[1:])


def _row(layer: LayerSensitivity, names: list[str], by: str) -> list[str]:
    float_layer, chosen = layer.formats[FLOAT], layer.formats.get(by)
    cells = [layer.name or "(the model itself)", size_text(float_layer.bytes)]
    for name in names:
        effect = layer.formats.get(name)
        cells.append("" if effect is None or effect.model is None else decibels_text(effect.model.sqnr_db))
    alone = None if chosen is None else chosen.alone
    company = None if chosen is None else chosen.company
    cells += ["" if error is None else decibels_text(error.sqnr_db) for error in (alone, company)]
    return [*cells, _seconds(chosen), _seconds(float_layer)]


def _seconds(effect: FormatEffect | None) -> str:
    return "" if effect is None or effect.seconds is None else seconds_text(effect.seconds)


__all__ = ["sensitivity"]
