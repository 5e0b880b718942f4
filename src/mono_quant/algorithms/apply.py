"""Runs algorithms on a model: scaling first, then codes layer by layer, then biases; everything in a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from mono_quant.algorithms.folding import Fold, apply_fold, find_folds
from mono_quant.algorithms.gptq import GPTQOptions
from mono_quant.algorithms.samples import InputMean, InputSamples
from mono_quant.algorithms.scaling import choose_scale
from mono_quant.algorithms.sequential import quantize_in_order
from mono_quant.algorithms.targets import Target, find_targets
from mono_quant.calibration.batches import Batch
from mono_quant.calibration.runner import call_model, evaluating, watching
from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.errors import ConfigurationError, InputError

#: Called after each layer with the number done, the number in all and the layer's name.
Progress = Callable[[int, int, str], None]

SCALINGS: Final = ("smoothquant", "awq")
ROUNDINGS: Final = ("hqq", "gptq")
BIAS_CORRECTION: Final = "bias_correction"
#: In the order in which they run.
ALGORITHMS: Final = (*SCALINGS, *ROUNDINGS, BIAS_CORRECTION)
_DATA_FREE: Final = ("hqq",)


@dataclass(frozen=True)
class AlgorithmOptions:
    """Details of the algorithms.

    Attributes:
        gptq: How GPTQ is run.
        hqq_norm: The exponent of the error that HQQ minimises, in (0, 2].
        sampled_rows: Input rows of each layer on which scalings are tried.
    """

    gptq: GPTQOptions = field(default_factory=GPTQOptions)
    hqq_norm: float = 2.0
    sampled_rows: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.hqq_norm <= 2:
            raise ConfigurationError(f"hqq_norm={self.hqq_norm} is not in (0, 2]")
        if self.sampled_rows < 1:
            raise ConfigurationError(f"sampled_rows={self.sampled_rows} is not positive")


@dataclass
class AlgorithmOutcome:
    """What algorithms made of a model.

    Attributes:
        model: A copy of the float model with the scaled weights and corrected biases in it; all other parameters are
            those of the original, not copies.
        quantized: For each layer with integer codes, its weight, fit for ``QuantizedModule.from_float`` of the layer
            of that name in :attr:`model`.
        fallbacks: For each layer that was quantized without data although the algorithm uses data, the reason.
        scaled: Names of the layers whose inputs were scaled.
        notes: What else the caller should know, one sentence each.
        samples: Calibration samples used.
    """

    model: nn.Module
    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    scaled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: int = 0


def parse_algorithm(algorithm: str | Sequence[str]) -> tuple[str, ...]:
    """Answer the algorithms that ``algorithm`` names, in the order in which they run.

    Args:
        algorithm: One name, several joined with ``+`` (``"smoothquant+gptq"``), or a sequence of names.

    Raises:
        ConfigurationError: A name is unknown or given twice, or two algorithms exclude each other.
    """
    names = algorithm.split("+") if isinstance(algorithm, str) else list(algorithm)
    names = [name.strip().lower().replace("-", "_") for name in names]
    for name in names:
        if name not in ALGORITHMS:
            raise ConfigurationError(
                f"algorithm {name!r} is not one of {', '.join(ALGORITHMS)}",
                suggestion='Join several with "+", for example algorithm="smoothquant+gptq".',
            )
    if len(set(names)) < len(names):
        raise ConfigurationError(f"algorithm names the same one twice: {'+'.join(names)}")
    for group in (SCALINGS, ROUNDINGS):
        if len(both := [name for name in names if name in group]) > 1:
            raise ConfigurationError(f"{' and '.join(both)} do the same work in two ways; choose one")
    return tuple(name for name in ALGORITHMS if name in names)


def needs_data(algorithm: str | Sequence[str]) -> bool:
    """Say whether ``algorithm`` cannot do without calibration data.

    Raises:
        ConfigurationError: As :func:`parse_algorithm`.
    """
    return any(name not in _DATA_FREE for name in parse_algorithm(algorithm))


def apply_algorithm(
    model: nn.Module,
    schemes: Mapping[str, LayerScheme],
    algorithm: str | Sequence[str],
    batches: Sequence[Batch] = (),
    options: AlgorithmOptions | None = None,
    progress: Progress | None = None,
) -> AlgorithmOutcome:
    """Quantize the weights of a model's layers by ``algorithm``.

    Args:
        model: Any module; not modified.
        schemes: For each layer's name, how it is to be quantized. Layers of float16 are left to the caller.
        algorithm: See :func:`parse_algorithm`.
        batches: Calibration data, read more than once; may be empty for ``hqq``.
        options: Defaults to :class:`AlgorithmOptions`.
        progress: Called after each layer.

    Raises:
        ConfigurationError: An algorithm is unknown or lacks its data; a name or scheme does not fit the model.
        InputError: The model fails on a batch.
        QuantizationError: A weight is not finite; its layer is named.
    """
    steps = parse_algorithm(algorithm)
    options = options or AlgorithmOptions()
    if not batches and needs_data(steps):
        raise ConfigurationError(
            f"algorithm={'+'.join(steps)!r} needs calibration data",
            suggestion='Pass calibration_data=, or use algorithm="hqq", which needs none.',
        )
    outcome = AlgorithmOutcome(share_copy(model), samples=sum(batch.samples for batch in batches))
    work = outcome.model
    with evaluating(work), unfused():
        if scaling := next((step for step in steps if step in SCALINGS), None):
            _scale(work, find_targets(work, schemes), scaling, batches, options, outcome)
        targets = find_targets(work, schemes)
        means = _input_means(work, targets, batches) if BIAS_CORRECTION in steps else None
        rounding = next((step for step in steps if step in ROUNDINGS), None)
        quantize_in_order(work, targets, rounding, batches, options.gptq, options.hqq_norm, means, outcome, progress)
    return outcome


def share_copy(model: nn.Module) -> nn.Module:
    """Answer a copy of ``model`` that shares its parameters; buffers and everything else are copied.

    Raises:
        InputError: The model holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    except Exception as error:
        raise InputError(
            f"algorithms work on a copy, and the model ({type(model).__name__}) cannot be copied: {error}"
        ) from error


@contextmanager
def unfused() -> Iterator[None]:
    """Keep PyTorch's transformer layers from their fused path, which reads weights without calling the layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _scale(
    work: nn.Module, targets: dict[str, Target], scaling: str, batches: Sequence[Batch], options: AlgorithmOptions,
    outcome: AlgorithmOutcome,
) -> None:  # fmt: skip
    linears = {name for name, target in targets.items() if type(target.module) is nn.Linear}
    folds = [fold for fold in find_folds(work, batches[0]) if linears & fold.consumers.keys()]
    samples = _sample_inputs(work, targets, folds, batches, options.sampled_rows)
    for fold, sample in zip(folds, samples, strict=True):
        scale = choose_scale(scaling, work, targets, fold, sample)
        if scale is not None:
            apply_fold(work, fold, scale)
            outcome.scaled += [name for name in fold.consumers if name in targets]
    beyond = sorted(linears - {name for fold in folds for name in fold.consumers})
    if beyond:
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        outcome.notes.append(
            f"{scaling} left the inputs of {len(beyond)} linear layers as they are, because no layer before them can "
            f"take up a scaling: {', '.join(beyond[:3])}{more}"
        )


def _sample_inputs(
    work: nn.Module, targets: dict[str, Target], folds: list[Fold], batches: Sequence[Batch], limit: int
) -> list[InputSamples]:
    """Answer a sample of the inputs that the consumers of each fold share up to the order of channels."""
    chosen = [next(name for name in fold.consumers if name in targets) for fold in folds]
    watchers = {name: InputSamples(targets[name], limit) for name in chosen}
    _run(work, watchers, batches)
    return [watchers[name] for name in chosen]


def _input_means(work: nn.Module, targets: dict[str, Target], batches: Sequence[Batch]) -> dict[str, Tensor]:
    watchers = {name: InputMean(target) for name, target in targets.items() if target.why_data_free() is None}
    _run(work, watchers, batches)
    return {name: watcher.mean for name, watcher in watchers.items() if watcher.mean is not None}


def _run(work: nn.Module, watchers: Mapping[str, InputSamples], batches: Sequence[Batch]) -> None:
    with watching(work, inputs=watchers):
        for index, batch in enumerate(batches):
            call_model(work, batch, index)
