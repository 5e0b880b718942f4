"""``monoquant validate``: whether a quantized model is sound."""

from __future__ import annotations

from typing import Final

import click

from mono_quant.cli.models import choose_inputs, existing_path, is_factory, load_pair
from mono_quant.cli.options import input_options, json_option, loading_options
from mono_quant.cli.output import Output, decibels_text, size_text
from mono_quant.report import ValidationResult, validate_checkpoint, validate_quantization


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="[ORIGINAL] QUANTIZED")
@click.option(
    "--min-sqnr", type=float, default=10.0, show_default=True, help="Fail if the weights are further off, in decibels."
)
@click.option("--strict", is_flag=True, help="Warnings fail the validation too.")
@input_options
@loading_options
@json_option
@click.pass_context
def validate(
    ctx: click.Context,
    output: Output,
    models: tuple[str, ...],
    min_sqnr: float,
    strict: bool,
    inputs_argument: str | None,
    batch: int,
    length: int,
    architecture: str | None,
    allow_pickle: bool,
) -> None:
    """Check a quantized model, against its original if that is given. Ends with exit code 4 if a check fails.

    Alone: the file is whole, its header fits its tensors, scales are finite and codes in range, and it survives saving
    and loading. Against the original also: every layer has its counterpart, the weights' error, and, where there are
    inputs to run on, finite outputs.
    """
    if len(models) > 2:
        raise click.UsageError(f"expected QUANTIZED or ORIGINAL QUANTIZED, found {len(models)} arguments")
    output.message(f"Validating {models[-1]}")
    if len(models) == 1:
        _require_no_inputs(inputs_argument, architecture)
        if is_factory(models[0]):
            raise click.UsageError("a factory's model is validated against its original: give ORIGINAL QUANTIZED")
        result = validate_checkpoint(existing_path(models[0]), on_failure="ignore", allow_pickle=allow_pickle)
    else:
        first, second = load_pair(models[0], models[1], architecture, allow_pickle)
        inputs = choose_inputs(inputs_argument, [first, second], batch, length)
        result = validate_quantization(
            first.model, second.model, "ignore", inputs, min_sqnr_db=min_sqnr, records=second.records
        )
    failed = bool(result.errors) or (strict and bool(result.warnings))
    if output.as_json:
        output.document({"quantized": models[-1], "passed": not failed, **vars(result)})
    else:
        _print(output, models[-1], result, failed)
    for warning in result.warnings:
        output.warning(warning)
    for error in result.errors:
        output.message(f"Error: {error}")
    if failed:
        ctx.exit(4)


_ANSWERS: Final = {True: "yes", False: "no", None: "not checked"}


def _require_no_inputs(inputs_argument: str | None, architecture: str | None) -> None:
    if inputs_argument is not None or architecture is not None:
        raise click.UsageError("--inputs and --architecture need the original: give ORIGINAL QUANTIZED")


def _print(output: Output, title: str, result: ValidationResult, failed: bool) -> None:
    facts = [("result", "failed" if failed else "passed")]
    facts.append(("weights in range", _ANSWERS[result.weight_range_valid]))
    facts.append(("same after saving and loading", _ANSWERS[result.load_test_passed]))
    if result.original_size_mb is not None and result.quantized_size_mb is not None:
        before, after = (size_text(round(size * 2**20)) for size in (result.original_size_mb, result.quantized_size_mb))
        facts.append(("size", f"{before} -> {after} (ratio {1 / (result.compression_ratio or 1):.3f})"))
        facts.append(("SQNR of weights", decibels_text(result.sqnr_db)))
    if result.output_sqnr_db is not None:
        facts.append(("SQNR of outputs", f"{decibels_text(result.output_sqnr_db)} (the lowest)"))
        facts.append(("cosine of outputs", f"{result.output_cosine:.6f} (the lowest)"))
    output.facts(title, facts)


__all__ = ["validate"]
