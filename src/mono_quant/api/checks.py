"""What every way to quantize a module checks: that it can be changed, and that it is still accurate."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from mono_quant.api.options import Options
from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.errors import InputTypeError, QuantizationError, ValidationError
from mono_quant.graph import is_static

_FOR_WEIGHTS: Final = "Use more bits or smaller groups, or leave the worst layers of info.layers out."
_FOR_ANSWERS: Final = "Use more calibration data of the task's kind, another observer=, or leave layers out with skip=."


def require_replaceable(model: nn.Module) -> None:
    """Refuse a model whose layers cannot be replaced.

    Raises:
        InputTypeError: It is compiled.
        QuantizationError: It is statically quantized already.
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise InputTypeError(
            f"cannot replace layers inside a compiled model ({type(model).__name__})",
            suggestion="Quantize the module first and compile the result.",
        )
    if is_static(model):
        raise QuantizationError(
            f"the model ({type(model).__name__}) is quantized already, with static layers inside",
            suggestion="Quantize the float model that it was made from.",
        )


def check_accuracy(info: QuantizationInfo, options: Options) -> None:
    """Compare the weights' error with both thresholds, and that of a static model's answers with the lower one.

    Weights below ``sqnr_error_threshold`` fail as ``on_failure`` says. Answers depend on the data and on what the
    caller does with them, so ``accuracy_warning`` decides about those.

    Raises:
        ValidationError: It is beyond a threshold whose action is ``"error"``.
    """
    limits = (
        (options.sqnr_error_threshold, options.on_failure),
        (options.sqnr_warning_threshold, options.accuracy_warning),
    )
    _check(info, info.sqnr_db, "the weights' signal-to-quantization-noise ratio", limits, _FOR_WEIGHTS)
    answers = ((options.sqnr_error_threshold, options.accuracy_warning),)
    _check(info, info.output_sqnr_db, "the signal-to-noise ratio of the model's answers", answers, _FOR_ANSWERS)


def _check(
    info: QuantizationInfo, found: float | None, what: str, limits: tuple[tuple[float, str], ...], remedy: str
) -> None:
    if found is None:
        return
    for threshold, action in limits:
        if found >= threshold or action == "ignore":
            continue
        message = f"{what} is {found:.1f} dB, below {threshold:g} dB"
        if action == "error":
            raise ValidationError(message, suggestion=remedy)
        info.warnings.append(message)
        return
