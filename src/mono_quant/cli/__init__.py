"""The command line: parsing, progress bars, tables; everything measured or decided comes from the library."""

from mono_quant.cli.main import cli, main

__all__ = ["cli", "main"]
