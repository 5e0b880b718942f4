"""Calibration data on the command line, and the options of static quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click
from torch import Tensor

from mono_quant.api import QuantizationResult
from mono_quant.calibration import OBSERVERS
from mono_quant.cli.models import call_loader, is_factory
from mono_quant.cli.output import decibels_text, grouped, names_text
from mono_quant.core import Cut
from mono_quant.errors import InputError
from mono_quant.report import load_inputs

Command = Callable[..., Any]


def calibration_options(command: Command) -> Command:
    """Add what static quantization learns from, and how."""
    for option in reversed(
        (
            click.option(
                "--calibrate", "calibrate", metavar="FILE|LOADER",
                help="Inputs to learn the ranges of activations from: .safetensors with a tensor for each argument, "
                ".npy, or package.module:loader, a function that answers batches. Asks for static quantization; with "
                "--bits 4 for better codes.",
            ),
            click.option(
                "--calibration-samples", type=click.IntRange(1), help="Use at most so many of them.  [default: 150]"
            ),
            click.option(
                "--observer", type=click.Choice(OBSERVERS), help="Static: how a range follows from the values seen."
            ),
            click.option(
                "--equalize/--no-equalize", default=None, help="Static: balance the weights of successive layers first."
            ),
            click.option(
                "--correct-bias/--no-correct-bias", default=None,
                help="Static: take the mean error of rounded weights out of the biases.",
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def load_calibration(argument: str | None) -> Any:
    """Answer the data that ``--calibrate`` names; ``None`` without it.

    Raises:
        InputError: The file or loader fails, or answers nothing that holds batches.
        FileNotFoundError: There is no such file.
    """
    if argument is None:
        return None
    if not is_factory(argument):
        return load_inputs(argument)
    answer = call_loader(argument)
    if isinstance(answer, str) or not isinstance(answer, Tensor | Iterable):
        raise InputError(
            f"the loader {argument!r} answered something of type {type(answer).__name__}; expected a tensor, a mapping "
            "of tensors, or an iterable of batches, for example a DataLoader"
        )
    return answer


def static_facts(result: QuantizationResult) -> list[tuple[str, str]]:
    """Answer what is worth saying of a static quantization; nothing of any other."""
    info = result.info
    if info.output_sqnr_db is None and not info.cuts and info.not_captured is None:
        return []
    return [
        ("SQNR of answers", f"{decibels_text(info.output_sqnr_db)} (on calibration samples)"),
        ("calibrated on", f"{info.calibration_samples_used} samples"),
        *form_facts(info.cuts, info.not_captured),
    ]


def form_facts(cuts: Iterable[Cut], not_captured: str | None) -> list[tuple[str, str]]:
    """Answer whether a static model is one graph, and where it leaves 8 bits."""
    if not_captured is not None:
        return [("form", f"layer by layer: {not_captured}")]
    reasons = {f"{cut.name} ({cut.operation})": cut.reason for cut in cuts}
    facts = [("form", "one graph")]
    for reason, places in grouped(reasons).items():
        facts.append(("in float", f"{len(places)} operation{'s' if len(places) > 1 else ''}: {reason}"))
        facts.append(("", f"({names_text(places)})"))
    return facts


__all__ = ["calibration_options", "form_facts", "load_calibration", "static_facts"]
