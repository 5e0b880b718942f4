"""``monoquant info``: what a file holds."""

from __future__ import annotations

import click

from mono_quant.cli.calibration import form_facts
from mono_quant.cli.models import existing_path
from mono_quant.cli.options import json_option
from mono_quant.cli.output import Output, decibels_text, layer_facts, names_text, size_text
from mono_quant.graph import described_ranges
from mono_quant.io import StaticRecord
from mono_quant.ops import system_config
from mono_quant.report import FileSummary, inspect_file


@click.command()
@click.argument("path", metavar="[PATH]", required=False)
@click.option("--system", is_flag=True, help="Show what quantized models run on here: processor, kernels, threads.")
@click.option(
    "--format", "-f", "output_format", type=click.Choice(["text", "json"]), help="Another way to ask for --json."
)
@click.option("--layers", is_flag=True, help="List every quantized and every skipped layer.")
@click.option("--allow-pickle", is_flag=True, help="Unpickle .pt files. This can run code: only for files you trust.")
@json_option
def info(
    output: Output, path: str | None, system: bool, output_format: str | None, layers: bool, allow_pickle: bool
) -> None:
    """Show what a checkpoint, a file of tensors or a transformers directory holds.

    Of a .safetensors file only the header is read.
    """
    output.as_json = output.as_json or output_format == "json"
    if system == (path is not None):
        raise click.UsageError("give either a PATH or --system")
    if path is None:
        _print_system(output)
        return
    summary = inspect_file(existing_path(path), allow_pickle)
    if output.as_json:
        output.document(summary.to_dict())
        return
    header = summary.header
    schemes = {} if header is None else {name: str(record.scheme) for name, record in header.layers.items()}
    skipped = {} if header is None else dict(header.skipped)
    _print_file(output, summary, [] if layers else layer_facts(schemes, skipped))
    if layers:
        _print_layers(output, schemes, skipped)
    if layers and header is not None and header.static is not None:
        _print_static(output, header.static)


def _print_system(output: Output) -> None:
    config = system_config()
    if output.as_json:
        output.document(config.to_dict())
    else:
        click.echo(str(config))


def _print_file(output: Output, summary: FileSummary, layers: list[tuple[str, str]]) -> None:
    header = summary.header
    facts = [("file", size_text(summary.file_bytes))]
    if header is None:
        facts.append(("written by", "another program (no header of mono_quant)"))
    else:
        facts.append(("written by", f"mono_quant {header.library_version}, format {header.format_version}"))
        if "sqnr_db" in header.measurements:
            facts.append(("SQNR of weights", decibels_text(header.measurements["sqnr_db"])))
        if "compression_ratio" in header.measurements:
            facts.append(("ratio", f"{1 / header.measurements['compression_ratio']:.3f} of the original"))
        if header.static is not None:
            facts += _static_facts(header.static)
        if header.tied:
            facts.append(("tied tensors", names_text([f"{a} = {b}" for a, b in header.tied.items()])))
    output.facts(str(summary.path), [*facts, *layers])
    rows = [(name, str(use.tensors), f"{use.elements:,}", size_text(use.bytes)) for name, use in summary.dtypes.items()]
    rows.append(("all", str(summary.tensors), "", size_text(summary.tensor_bytes)))
    output.table(("dtype", "tensors", "elements", "size"), rows, numbers=("tensors", "elements", "size"))


def _static_facts(static: StaticRecord) -> list[tuple[str, str]]:
    facts = form_facts(static.cuts, None if static.is_graph else static.not_captured or "the reason is not known")
    if static.samples:
        facts.append(("calibrated on", f"{static.samples} samples"))
    if static.output_sqnr_db is not None:
        facts.append(("SQNR of answers", f"{decibels_text(static.output_sqnr_db)} (on calibration samples)"))
    return facts


def _print_static(output: Output, static: StaticRecord) -> None:
    ranges = described_ranges(static.model)
    if ranges:
        rows = [(name, _range_text(found.input), _range_text(found.output)) for name, found in ranges.items()]
        output.table(("layer", "range of inputs", "range of outputs"), rows)
    if static.cuts:
        output.table(("in float", "operation", "why"), [(cut.name, cut.operation, cut.reason) for cut in static.cuts])


def _range_text(found: tuple[float, float] | None) -> str:
    return "floats" if found is None else f"{found[0]:.4g} to {found[1]:.4g}"


def _print_layers(output: Output, schemes: dict[str, str], skipped: dict[str, str]) -> None:
    kinds = (("quantized", schemes), ("skipped", skipped))
    rows = [(name or "(the model itself)", kind, how) for kind, items in kinds for name, how in items.items()]
    output.table(("layer", "", "how or why"), rows)


__all__ = ["info"]
