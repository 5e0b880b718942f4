"""The exceptions of mono_quant: one base class and few subclasses.

Every message names the layer or file, what was found and what was expected; ``suggestion`` says what to do.
Subclasses also derive from the built-in exception that mono-quant 1.1 and PyTorch raise in the same place,
so that existing ``except ValueError`` clauses keep working.
"""

from __future__ import annotations

from typing import Any


class MonoQuantError(Exception):
    """Base of every error that the library raises on purpose.

    Attributes:
        message: What went wrong, without the suggestion.
        suggestion: What the caller can do about it, or ``None``.
    """

    def __init__(self, message: str, suggestion: str | None = None) -> None:
        self.message = message
        self.suggestion = suggestion
        super().__init__(message if suggestion is None else f"{message}\n\nSuggestion: {suggestion}")

    def __reduce__(self) -> tuple[type[MonoQuantError], tuple[str, str | None]]:
        # The default would hand the joined text back as the message and lose the suggestion.
        return (type(self), (self.message, self.suggestion))


class ConfigurationError(MonoQuantError, ValueError):
    """An option has a value, or a combination of values, that cannot be honoured."""


class InputError(MonoQuantError, ValueError):
    """A model, tensor or calibration batch cannot be used as given."""


class InputTypeError(InputError, TypeError):
    """An argument has a type that the function does not take."""


class QuantizationError(MonoQuantError, RuntimeError):
    """A layer could not be quantized, for example because its weight is not finite."""


class BudgetError(QuantizationError):
    """A search found no quantization that keeps to its budget.

    Attributes:
        search: What it measured (:class:`mono_quant.SearchReport`), or ``None`` if there was nothing to measure.
    """

    search: Any = None


class ValidationError(MonoQuantError, ValueError):
    """A quantized model failed a check that the caller asked to be enforced."""


class CheckpointError(MonoQuantError, ValueError):
    """A file is truncated, foreign, unsafe, from a newer version, or does not fit the model."""


class BackendError(MonoQuantError, RuntimeError):
    """A kernel backend or instruction set was asked for that this machine or build does not have."""


__all__ = [
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ConfigurationError",
    "InputError",
    "InputTypeError",
    "MonoQuantError",
    "QuantizationError",
    "ValidationError",
]
