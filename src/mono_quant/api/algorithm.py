"""Runs algorithms before layers are replaced: reads the data, and brings what they found to where it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from torch import nn

from mono_quant.algorithms import AlgorithmOptions, AlgorithmOutcome, apply_algorithm, needs_data
from mono_quant.api.method import Calibration, Request, choose_algorithm
from mono_quant.api.names import shortened
from mono_quant.api.replace import Progress
from mono_quant.api.selection import Candidate, Selection
from mono_quant.calibration import Batch, iterate_batches
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.errors import ConfigurationError

#: Calibration samples that algorithms read where the call does not say how many.
DEFAULT_SAMPLES: Final = 128


@dataclass(frozen=True)
class AlgorithmPlan:
    """Which algorithms to run, and on what.

    Attributes:
        steps: Their names in the order in which they run; empty for plain rounding to nearest.
        options: Their details.
        batches: Calibration data; may be read more than once.
    """

    steps: tuple[str, ...] = ()
    options: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    batches: tuple[Batch, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A float model whose layers are ready to be replaced.

    Attributes:
        model: Holds the layers; its parameters may be those of the original.
        selection: The layers of :attr:`model` to replace.
        weights: For each layer with integer codes, its quantized weight.
        samples: Calibration samples used.
    """

    model: nn.Module
    selection: Selection
    weights: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    samples: int = 0


def plan_algorithm(request: Request, model: nn.Module | None) -> AlgorithmPlan:
    """Answer what a call asks for; its data is read now, since it may be an iterator that can be read only once.

    Args:
        request: The call.
        model: Whose ``forward`` the data is for; ``None`` for a state dict.

    Raises:
        ConfigurationError: An algorithm is unknown, or needs to run a model where there is only a state dict.
        InputError, InputTypeError: The data is unusable; the batch is named.
    """
    steps = choose_algorithm(request)
    options = request.algorithm_options or AlgorithmOptions()
    if not steps or not needs_data(steps):
        return AlgorithmPlan(steps, options)
    if model is None:
        raise ConfigurationError(
            f"algorithm={'+'.join(steps)!r} runs the model on data, and a state dict cannot be run",
            suggestion='Pass the torch.nn.Module or a transformers directory, or use algorithm="hqq".',
        )
    return AlgorithmPlan(steps, options, read_batches(request.calibration, model))


def read_batches(calibration: Calibration, model: nn.Module) -> tuple[Batch, ...]:
    """Answer the calibration data as the model's calls, at most :data:`DEFAULT_SAMPLES` samples unless told."""
    samples = DEFAULT_SAMPLES if calibration.samples is None else calibration.samples
    return tuple(iterate_batches(calibration.data, samples, model))


def prepare(
    model: nn.Module, selection: Selection, plan: AlgorithmPlan, inplace: bool, progress: Progress | None
) -> Prepared:
    """Run a plan's algorithms for the layers of a selection.

    Until they have ended nothing of ``model`` changes, whatever happens. With ``inplace`` it is then given the scaled
    weights and corrected biases; otherwise they are in a copy, which shares the remaining parameters with it.

    Raises:
        ConfigurationError: No layer has integer codes, or an algorithm lacks its data.
        InputError: The model cannot be copied, or fails on a batch.
        QuantizationError: A weight is not finite; its layer is named.
    """
    if not plan.steps or not selection.chosen:
        return Prepared(model, selection)
    name = "+".join(plan.steps)
    schemes = {candidate.name: candidate.scheme for candidate in selection.chosen}
    if all(scheme.stores_floats for scheme in schemes.values()):
        raise ConfigurationError(
            f"algorithm={name!r} chooses integer codes, and every layer is stored as float16",
            suggestion="Leave algorithm out, or use bits=8 or bits=4.",
        )
    outcome = apply_algorithm(model, schemes, plan.steps, plan.batches, plan.options, progress)
    selection.warnings += _warnings(name, outcome)
    if inplace:
        _carry_over(outcome.model, model)
    else:
        model = outcome.model
        selection = replace(selection, chosen=[_moved(candidate, model) for candidate in selection.chosen])
    return Prepared(model, selection, outcome.quantized, outcome.samples)


def _moved(candidate: Candidate, model: nn.Module) -> Candidate:
    return replace(candidate, module=model.get_submodule(candidate.name))


def _carry_over(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the parameters of its copy ``source`` wherever they are others."""
    for module, changed in zip(target.modules(), source.modules(), strict=True):
        for name, parameter in changed._parameters.items():
            if module._parameters.get(name) is not parameter:
                module.register_parameter(name, parameter)


def _warnings(algorithm: str, outcome: AlgorithmOutcome) -> list[str]:
    """Say which layers fell back to working without data, once for each reason, and pass on the notes."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in outcome.fallbacks.items():
        by_reason.setdefault(reason, []).append(name)
    fallbacks = [
        f"{algorithm} quantized {_layers(names)} by the weights alone ({reason}): {shortened(names)}"
        for reason, names in by_reason.items()
    ]
    return [*fallbacks, *outcome.notes]


def _layers(names: list[str]) -> str:
    return "1 layer" if len(names) == 1 else f"{len(names)} layers"
