"""``monoquant quantize``: from a model to a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from mono_quant.algorithms import ALGORITHMS
from mono_quant.api import QuantizationResult
from mono_quant.api import quantize as quantize_model
from mono_quant.cli.calibration import calibration_options, load_calibration, static_facts
from mono_quant.cli.models import LoadedModel, is_factory, load, load_architecture
from mono_quant.cli.options import json_option, loading_options, parse_bits
from mono_quant.cli.output import (
    Output,
    decibels_text,
    grouped,
    layer_facts,
    names_text,
    seconds_text,
    size_text,
)
from mono_quant.cli.search import SearchChoices, search_facts, search_options, search_table, telling
from mono_quant.core import QuantizationInfo
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.integrations.transformers import is_transformers_model
from mono_quant.io.checkpoint import DIRECTORY_FILE

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@click.command()
@click.argument("model", required=False)
@click.option("--model", "-m", "model_option", metavar="MODEL", help="The model; another way to give the argument.")
@click.option(
    "--bits",
    "-b",
    multiple=True,
    default=("8",),
    show_default="8",
    callback=parse_bits,
    metavar="BITS|NAME=BITS",
    help="8: int8, computed as integers; 4: int4 weights in groups; 16: float16 weights. For single layers "
    "'NAME=BITS' or 'GLOB=BITS', repeatable, with 32 for float.",
)
@click.option(
    "--scheme", "-s", type=click.Choice(["symmetric", "asymmetric"]), default="symmetric", show_default=True,
    help="Whether weights have zero points.",
)  # fmt: skip
@click.option(
    "--dynamic/--static", default=None, help="Dynamic is the default; static quantization needs calibration data."
)
@click.option("--group-size", type=int, help="Inputs that share one scale; with --bits 8: weight-only int8.")
@click.option(
    "--algorithm", metavar="NAME[+NAME...]",
    help=f"Choose better codes: {', '.join(ALGORITHMS)}. All but hqq need --calibrate.",
)  # fmt: skip
@click.option(
    "--include", multiple=True, metavar="NAME", help="Quantize only these layers: names or globs. Repeatable."
)
@click.option("--skip", multiple=True, metavar="NAME", help="Leave these layers in float: names or globs. Repeatable.")
@click.option("--min-parameters", type=int, default=0, help="Leave layers with fewer weights in float.")
@click.option("--compute-dtype", type=click.Choice(list(_DTYPES)), help="Cast what stays in float.")
@calibration_options
@search_options
@click.option("--strict", is_flag=True, help="A low signal-to-noise ratio is an error instead of a warning.")
@click.option(
    "--output", "-o", "output_path", type=click.Path(path_type=Path), metavar="PATH",
    help="The checkpoint, .safetensors or .pt; for transformers models also a directory, a name without suffix.  "
    "[default: MODEL_quantized.safetensors beside the model]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing file.")
@loading_options
@json_option
def quantize(
    output: Output,
    model: str | None,
    model_option: str | None,
    bits: int | dict[str, int],
    scheme: str,
    dynamic: bool | None,
    group_size: int | None,
    algorithm: str | None,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    min_parameters: int,
    compute_dtype: str | None,
    calibrate: str | None,
    calibration_samples: int | None,
    observer: str | None,
    equalize: bool | None,
    correct_bias: bool | None,
    search: SearchChoices,
    strict: bool,
    output_path: Path | None,
    force: bool,
    architecture: str | None,
    allow_pickle: bool,
) -> None:
    """Quantize MODEL and save it as a checkpoint.

    \b
    monoquant quantize model.safetensors
    monoquant quantize path/to/transformers_directory --skip lm_head --bits 4
    monoquant quantize mypackage.models:build --output small.safetensors
    monoquant quantize path/to/transformers_directory --bits 4 --algorithm awq+gptq --calibrate tokens.safetensors
    monoquant quantize path/to/transformers_directory --bits '*.mlp.*=4' --bits lm_head=16
    monoquant quantize mypackage.models:build --calibrate images.npy
    monoquant quantize mypackage.models:build --calibrate images.npy --eval mypackage.data:accuracy --max-drop 0.01
    """
    argument = _one_model(model, model_option)
    path = _choose_output(argument, output_path, force)
    output.message(f"Loading {argument}")
    loaded = load(argument, load_architecture(architecture), allow_pickle)
    _require_possible(loaded, path, calibrate)
    data = load_calibration(calibrate)
    with output.progress("Quantizing") as report:
        # The float model is this process's own: nothing is lost by freeing its weights on the way.
        result = quantize_model(
            loaded.model,
            bits=bits,
            dynamic=dynamic,
            scheme=scheme,
            include=include or None,
            skip=skip or None,
            min_parameters=min_parameters,
            group_size=group_size,
            algorithm=algorithm,
            compute_dtype=None if compute_dtype is None else _DTYPES[compute_dtype],
            calibration_data=data,
            num_calibration_samples=calibration_samples,
            observer=observer,
            equalize=equalize,
            correct_bias=correct_bias,
            **search.options(),
            inplace=data is None and not search.wanted,
            progress=telling(output, report) if search.wanted else report,
            accuracy_warning="error" if strict else "warn",
        )
    output.message(f"Saving {path}")
    result.save(path)
    for warning in result.warnings:
        output.warning(warning)
    if output.as_json:
        output.document(_document(argument, path, result))
    else:
        _print(output, argument, path, result)


def _one_model(argument: str | None, option: str | None) -> str:
    if (argument is None) == (option is None):
        found = "none" if argument is None else "both the argument and --model"
        raise click.UsageError(f"give one model, found {found}")
    return argument or option or ""


def _choose_output(argument: str, chosen: Path | None, force: bool) -> Path:
    """Answer where to save, before any work is done.

    Raises:
        ConfigurationError: The place is taken or cannot be a checkpoint.
    """
    source = None if is_factory(argument) else Path(argument)
    if chosen is None:
        stem = argument.rpartition(":")[2].rpartition(".")[2] if source is None else source.resolve().stem
        chosen = (Path() if source is None else source.resolve().parent) / f"{stem}_quantized.safetensors"
    if chosen.suffix not in ("", ".safetensors", ".pt", ".pth"):
        raise ConfigurationError(
            f"--output {chosen} has the suffix {chosen.suffix!r}; expected .safetensors, .pt or .pth, or none for a "
            "directory"
        )
    if source is not None and chosen.exists() and source.exists() and chosen.samefile(source):
        raise ConfigurationError(f"--output {chosen} is the model itself", suggestion="Choose another file.")
    if chosen.exists() and not force:
        raise ConfigurationError(f"{chosen} exists already", suggestion="Choose another --output, or give --force.")
    if not chosen.parent.is_dir():
        raise ConfigurationError(f"there is no directory {chosen.parent} to save {chosen.name} in")
    return chosen


def _require_possible(loaded: LoadedModel, path: Path, calibrate: str | None) -> None:
    """Refuse what would only fail after the work.

    Raises:
        InputError: The model is quantized already, or has no architecture to be calibrated.
        ConfigurationError: ``path`` is a directory, which only transformers models are saved to.
    """
    if loaded.records:
        raise InputError(
            f"{loaded.argument} is quantized already ({len(loaded.records)} layers)",
            suggestion="Quantize the float model that it was made from.",
        )
    if calibrate is not None and not isinstance(loaded.model, nn.Module):
        raise InputError(
            f"{loaded.argument} holds tensors without an architecture and cannot run on calibration data",
            suggestion="Give --architecture package.module:factory.",
        )
    is_transformers = isinstance(loaded.model, nn.Module) and is_transformers_model(loaded.model)
    if not path.suffix and not is_transformers:
        raise ConfigurationError(f"--output {path} has no suffix: only transformers models are saved as directories")


def _print(output: Output, argument: str, path: Path, result: QuantizationResult) -> None:
    info = result.info
    facts = [
        ("saved as", f"{path} ({size_text(_file_bytes(path))})"),
        ("size", f"{size_text(info.bytes_before)} -> {size_text(info.bytes_after)} (ratio {_ratio(info):.3f})"),
        ("SQNR of weights", decibels_text(info.sqnr_db)),
        *static_facts(result),
        *search_facts(result.search),
        *_one_call_facts(info),
        ("time", seconds_text(info.seconds)),
    ]
    layers = layer_facts({name: str(layer.scheme) for name, layer in info.layers.items()}, info.skip_reasons)
    output.facts(argument, [*facts, *layers])
    if result.search is not None:
        columns, rows = search_table(result.search)
        output.table(columns, rows, numbers=("size", "layers take", "measure", "SQNR"))


def _one_call_facts(info: QuantizationInfo) -> list[tuple[str, str]]:
    """Answer how many layers of transformers run as one native call each, and why others do not."""
    if not info.fused_layers and not info.unfused_layers:
        return []
    total = len(info.fused_layers) + len(info.unfused_layers)
    facts = [("in one call", f"{len(info.fused_layers)} of {total} layers of the transformer")]
    for reason, names in grouped(info.unfused_layers).items():
        facts.append(("", f"({names_text(names)}: {reason})"))
    return facts


def _ratio(info: QuantizationInfo) -> float:
    return info.bytes_after / max(1, info.bytes_before)


def _file_bytes(path: Path) -> int:
    return (path / DIRECTORY_FILE if path.is_dir() else path).stat().st_size


def _document(argument: str, path: Path, result: QuantizationResult) -> dict[str, Any]:
    info = result.info
    return {
        "model": argument,
        "output": str(path),
        "output_bytes": _file_bytes(path),
        "bytes_before": info.bytes_before,
        "bytes_after": info.bytes_after,
        "ratio": _ratio(info),
        "sqnr_db": info.sqnr_db,
        "output_sqnr_db": info.output_sqnr_db,
        "calibration_samples": info.calibration_samples_used,
        "not_captured": info.not_captured,
        "cuts": [asdict(cut) for cut in info.cuts],
        "fused_layers": info.fused_layers,
        "unfused_layers": [{"layer": name, "reason": reason} for name, reason in info.unfused_layers.items()],
        "seconds": info.seconds,
        "quantized": [
            {
                "layer": name,
                "scheme": layer.scheme.to_dict(),
                "bytes_before": layer.bytes_before,
                "bytes_after": layer.bytes_after,
                "sqnr_db": layer.sqnr_db,
            }
            for name, layer in info.layers.items()
        ],
        "skipped": [{"layer": name, "reason": reason} for name, reason in info.skip_reasons.items()],
        "search": None if result.search is None else result.search.to_dict(),
        "warnings": result.warnings,
    }


__all__ = ["quantize"]
