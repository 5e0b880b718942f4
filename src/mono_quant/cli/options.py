"""Options that several commands share, so that they are spelled and explained alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mono_quant.cli.output import Output

Command = Callable[..., Any]


def json_option(command: Command) -> Command:
    """Add ``--json``, which arrives as ``output``: where the command prints."""

    def prepare(ctx: click.Context, _parameter: click.Parameter, value: bool) -> Output:
        # The group prints errors as JSON too, and finds this there.
        output = Output(as_json=value)
        ctx.find_root().obj = output
        return output

    return click.option(
        "--json",
        "output",
        is_flag=True,
        is_eager=True,
        callback=prepare,
        help="Print one JSON document on standard output; what is not finite becomes null.",
    )(command)


def loading_options(command: Command) -> Command:
    """Add how files of tensors are loaded."""
    command = click.option(
        "--allow-pickle", is_flag=True, help="Unpickle .pt files. This can run code: only for files you trust."
    )(command)
    return click.option(
        "--architecture",
        metavar="FACTORY",
        help="What to load files of tensors into: package.module:factory or a transformers directory.",
    )(command)


def input_options(command: Command) -> Command:
    """Add the inputs that models run on."""
    command = click.option(
        "--length", type=click.IntRange(1), default=32, show_default=True, help="Tokens in a row of made inputs."
    )(command)
    command = click.option(
        "--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows of made inputs."
    )(command)
    return click.option(
        "--inputs",
        "inputs_argument",
        metavar="FILE|LOADER",
        help="Inputs to run on: .safetensors with a tensor for each argument, .npy, or package.module:loader. "
        "Without it: what the factory answers beside the model, or random tokens for transformers models.",
    )(command)


__all__ = ["input_options", "json_option", "loading_options"]


def parse_bits(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> int | dict[str, int]:
    """Answer ``--bits``: one number for all layers, or a number for each name or glob."""
    if len(values) == 1 and "=" not in values[0]:
        return _bits_number(values[0], ("4", "8", "16"))
    rules: dict[str, int] = {}
    for value in values:
        pattern, equals, number = value.rpartition("=")
        if not equals:
            raise click.BadParameter(f"{value!r} stands for all layers; beside others write '*={value}'")
        if pattern in rules:
            raise click.BadParameter(f"{pattern!r} is given twice")
        rules[pattern] = _bits_number(number, ("4", "8", "16", "32"))
    return rules


def _bits_number(text: str, allowed: tuple[str, ...]) -> int:
    if text not in allowed:
        raise click.BadParameter(f"{text!r} is not one of {', '.join(allowed)}")
    return int(text)
