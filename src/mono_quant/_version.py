"""The one place that holds the version: packaging, checkpoints and the command line read it here."""

__version__ = "2.0.0.dev0"
