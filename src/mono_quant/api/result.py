"""What ``quantize`` answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import InputError
from mono_quant.io import save_model
from mono_quant.report import ValidationResult, validate_quantization
from mono_quant.report.search import SearchReport


@dataclass
class QuantizationResult:
    """A quantized model and what is known of it.

    Attributes:
        model: The quantized module; a dict of tensors where a state dict was quantized.
        info: Which layers were quantized and skipped, and why; sizes, error and time.
        warnings: What the caller should know, one sentence each.
        search: What a search under a budget saw and chose; ``None`` without one.
    """

    model: Any
    info: QuantizationInfo
    warnings: list[str] = field(default_factory=list)
    search: SearchReport | None = None

    @property
    def success(self) -> bool:
        """Always true: a quantization that fails raises. Kept for users of mono-quant 1.1."""
        return True

    @property
    def errors(self) -> list[str]:
        """Always empty, see :attr:`success`."""
        return []

    def __bool__(self) -> bool:
        return self.success

    def save(self, path: str | Path) -> None:
        """Save the model with its header; see :func:`mono_quant.save_model`.

        Raises:
            CheckpointError: The file cannot be written; an older file of that name is still whole.
        """
        save_model(self.model, path, quantization_info=self.info)

    def validate(
        self,
        original: nn.Module | Mapping[str, Tensor] | None = None,
        on_failure: str = "error",
        inputs: Any = None,
    ) -> ValidationResult:
        """Compare the model with the one that it was made from; see :func:`mono_quant.validate_quantization`.

        Raises:
            InputError: ``original`` is missing.
            ValidationError: A check failed and ``on_failure`` is ``"error"``.
        """
        if original is None:
            raise InputError(
                "validate() compares with the model before quantization, which the result does not keep",
                suggestion="Pass it: result.validate(original=model).",
            )
        return validate_quantization(original, self.model, on_failure=on_failure, inputs=inputs)
