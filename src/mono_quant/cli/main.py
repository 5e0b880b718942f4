"""The command ``monoquant``: its subcommands, and what becomes of errors."""

from __future__ import annotations

import errno
import re
import sys
import traceback
import warnings
from typing import Any, Final, NoReturn

import click

from mono_quant import __version__
from mono_quant.cli.compare import compare
from mono_quant.cli.info import info
from mono_quant.cli.output import Output
from mono_quant.cli.quantize import quantize
from mono_quant.cli.sensitivity import sensitivity
from mono_quant.cli.validate import validate
from mono_quant.errors import MonoQuantError, ValidationError
from mono_quant.ops import get_backend

UNEXPECTED, INPUT_ERROR, VALIDATION_FAILED, INTERRUPTED = 1, 3, 4, 130

# Options of the library that the command line has too.
_OPTIONS: Final = (
    "algorithm", "allow_pickle", "bits", "calibration_data", "compute_dtype", "correct_bias", "dynamic", "equalize",
    "eval_fn", "formats", "group_size", "include", "max_bytes", "max_drop", "min_parameters", "min_sqnr_db",
    "num_calibration_samples", "objective", "observer", "resume", "seed", "skip",
)  # fmt: skip
_RENAMED: Final = {"calibration_data": "calibrate", "eval_fn": "eval", "num_calibration_samples": "calibration-samples"}
# Those that are no words of the language are meant even without a sign of equality.
_UNMISTAKABLE: Final = (
    "calibration_data",
    "eval_fn",
    "max_bytes",
    "max_drop",
    "min_sqnr_db",
    "num_calibration_samples",
)
_VALUE: Final = r"['\"]?[\w+-]+(?:\.\w+)*['\"]?"

EPILOG = """\b
A model is one of
  a transformers directory (config.json beside its weights),
  a file of plain tensors (.safetensors, .pt, .pth),
  a checkpoint of this library (.safetensors),
  package.module:factory, a function without arguments that answers a module
  or a module and example inputs; the current directory can be imported from.

\b
Exit codes
  0    done
  1    unexpected error
  2    wrong usage of the command line
  3    an input or an option cannot be used
  4    validation failed
  130  interrupted

Results go to standard output, everything else to standard error.
"""


class Commands(click.Group):
    """A group whose commands end with an exit code and a message instead of a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Environment variables are part of what was typed. Where they are wrong, no command should work for minutes
        # before it says so; and options such as --help end the command while they are parsed.
        try:
            get_backend()
        except MonoQuantError as error:
            if "--debug" in args:
                traceback.print_exc()
            ctx.exit(_report(error, Output(as_json="--json" in args)))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of a pipe has seen enough: click ends quietly
            if ctx.params.get("debug"):
                traceback.print_exc()
            ctx.exit(_report(error, ctx.obj if isinstance(ctx.obj, Output) else None))


def _show_warning(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
    # Which line of which library warned says nothing to someone who typed a command.
    click.echo(f"Warning: {message}", err=True)


def _in_options(text: str) -> str:
    """Spell the library's options as the command line does."""
    text = re.sub(rf"\b({'|'.join(_OPTIONS)})=(?:({_VALUE})|(?=[\s.,;:)]|$))", _option, text)
    return re.sub(rf"\b({'|'.join(_UNMISTAKABLE)})\b", _option, text)


def _option(match: re.Match[str]) -> str:
    name, value = match[1], match[2] if match.re.groups > 1 else None
    if name == "dynamic":
        return "--dynamic" if value == "True" else "--static"
    option = _RENAMED.get(name, name.replace("_", "-"))
    if value == "False":
        return f"--no-{option}"
    return f"--{option}" if value in (None, "True") else f"--{option} {value}"


def _report(error: Exception, output: Output | None) -> int:
    """Print an error and answer the exit code for it."""
    suggestion = None
    if isinstance(error, MonoQuantError):
        message, suggestion = error.message, error.suggestion
        code = VALIDATION_FAILED if isinstance(error, ValidationError) else INPUT_ERROR
    elif isinstance(error, OSError):
        message, code = str(error), INPUT_ERROR
    elif isinstance(error, MemoryError):
        message, code = "there is not enough memory", UNEXPECTED
    else:
        message, code = f"unexpected {type(error).__name__}: {error}", UNEXPECTED
        suggestion = "Run again as 'monoquant --debug ...' for the traceback, and report it with the command."
    message, suggestion = _in_options(message), suggestion and _in_options(suggestion)
    click.echo(f"Error: {message}", err=True)
    if suggestion:
        click.echo(f"Suggestion: {suggestion}", err=True)
    if output is not None and output.as_json:
        output.document({"error": {"type": type(error).__name__, "message": message, "suggestion": suggestion}})
    return code


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="monoquant")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Make PyTorch models smaller and faster, and prove that they still work."""
    del debug  # Commands.invoke reads it


for command in (quantize, sensitivity, info, compare, validate):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line with the process's arguments and leave with its exit code."""
    cli(prog_name="monoquant")
    sys.exit(0)


__all__ = ["cli", "main"]
