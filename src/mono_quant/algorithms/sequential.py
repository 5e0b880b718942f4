"""Quantizes a model's layers in the order in which they compute, each for what the quantized ones before it answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from mono_quant.algorithms.bias_correction import corrected_bias
from mono_quant.algorithms.gptq import GPTQOptions, quantize_gptq
from mono_quant.algorithms.grid import Grid
from mono_quant.algorithms.hqq import quantize_data_free
from mono_quant.algorithms.lockstep import MAX_STREAMS, Lockstep, join_batches
from mono_quant.algorithms.samples import InputMean
from mono_quant.algorithms.targets import Dequantizing, Target, second_moments
from mono_quant.calibration.batches import Batch
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.errors import MonoQuantError, QuantizationError

UNREACHED = "no calibration batch reached it"


class Record(Protocol):
    """Where the outcome goes; see :class:`~mono_quant.algorithms.apply.AlgorithmOutcome`."""

    quantized: dict[str, QuantizedTensor]
    fallbacks: dict[str, str]
    notes: list[str]


def quantize_in_order(
    work: nn.Module,
    targets: dict[str, Target],
    rounding: str | None,
    batches: Sequence[Batch],
    gptq: GPTQOptions,
    hqq_norm: float,
    means: dict[str, Tensor] | None,
    record: Record,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Quantize ``targets``, layers of ``work``.

    Args:
        work: A copy that may be changed: biases are corrected in it.
        targets: What to quantize.
        rounding: ``"gptq"``, ``"hqq"`` or ``None`` for round-to-nearest.
        batches: Calibration data; used by GPTQ and for bias correction.
        gptq, hqq_norm: Details of the two.
        means: The mean inputs of the float model, if biases are to be corrected.
        record: Takes the codes, the layers that fell back to working without data, and notes.
        progress: Called after each layer.
    """
    run = _Run(targets, rounding, gptq, hqq_norm, means, record, progress)
    if rounding != "gptq" and means is None:
        for name in targets:
            run.without_data(name)
        return
    run.tied_and_data_free()
    waiting = {name: target.module for name, target in targets.items() if name not in record.quantized}
    ready = {
        name: (targets[name].module, targets[name].replacement(quantized))
        for name, quantized in record.quantized.items()
    }
    streams = join_batches(batches)
    if len(streams) > MAX_STREAMS:
        record.notes.append(
            f"GPTQ and bias correction used the first {MAX_STREAMS} of {len(streams)} calibration batches, which "
            "differ in shape and cannot be joined"
        )
    lockstep = Lockstep(work, waiting, run.visit, ready)
    for name in lockstep.run(streams[:MAX_STREAMS]):
        run.without_data(name, UNREACHED)


class _Run:
    def __init__(
        self, targets: dict[str, Target], rounding: str | None, gptq: GPTQOptions, hqq_norm: float,
        means: dict[str, Tensor] | None, record: Record, progress: Callable[[int, int, str], None] | None,
    ) -> None:  # fmt: skip
        self._targets, self._rounding, self._gptq, self._norm = targets, rounding, gptq, hqq_norm
        self._means, self._record, self._progress = means, record, progress
        self._tied = _tied_groups(targets)
        # The inputs that the last moments came from; layers that read the same tensors share them.
        self._inputs: list[tuple[Tensor, int]] = []
        self._moments: Tensor | None = None
        self._replaced: nn.Module | None = None

    def without_data(self, name: str, reason: str | None = None) -> QuantizedTensor:
        """Quantize a layer by its weight alone, and those that share the weight with it.

        Args:
            name: The layer.
            reason: Why, if the algorithm would have used data.
        """
        target = self._targets[name]
        shared = self._record.quantized.get(self._tied.get(name, name))
        if shared is None:
            try:
                if self._rounding is None:
                    shared = Grid.from_range(target.matrix, target.scheme).quantize(target.weight, target.scheme)
                else:
                    shared = quantize_data_free(target.weight, target.scheme, self._norm)
            except MonoQuantError as error:
                raise type(error)(f"layer {name!r}: {error.message}", error.suggestion) from error
        if reason is not None:
            self._record.fallbacks[name] = reason
        self._done(name, shared)
        return shared

    def tied_and_data_free(self) -> None:
        """Quantize what has no rows of inputs, and what shares its weight: a weight has one set of codes."""
        for name, target in self._targets.items():
            reason = target.why_data_free()
            if name in self._tied:
                reason = "it shares its weight with another layer"
            if reason is not None:
                self.without_data(name, reason)

    def visit(self, name: str, inputs: list[Tensor]) -> nn.Module:
        """Quantize a layer for its inputs; answer what computes in its place."""
        target = self._targets[name]
        if self._rounding == "gptq":
            try:
                rounded = quantize_gptq(target.matrix, self._second_moments(target, inputs), target.scheme, self._gptq)
                quantized = rounded.grid.tensor(rounded.codes, target.scheme, target.weight.shape)
                if rounded.damping > self._gptq.damping:
                    self._record.notes.append(
                        f"layer {name!r}: its inputs' second moments needed a damping of {rounded.damping:g}"
                    )
                self._done(name, quantized)
            except QuantizationError as error:
                quantized = self.without_data(name, error.message)
        else:
            quantized = self.without_data(name)
        self._correct_bias(target, quantized, inputs)
        if isinstance(self._replaced, Dequantizing):
            self._replaced.release()
        self._replaced = target.replacement(quantized)
        return self._replaced

    def _second_moments(self, target: Target, inputs: list[Tensor]) -> Tensor:
        same = len(inputs) == len(self._inputs) and all(
            tensor is known and tensor._version == version
            for tensor, (known, version) in zip(inputs, self._inputs, strict=True)
        )
        if self._moments is None or not same or self._moments.shape[0] != target.matrix.shape[1]:
            # Only one matrix of moments is held at a time: the last goes first.
            self._moments = None
            self._inputs = []
            self._moments = second_moments(target, inputs)
            if target.weight.dim() == 2:
                self._inputs = [(tensor, tensor._version) for tensor in inputs]
        return self._moments

    def _correct_bias(self, target: Target, quantized: QuantizedTensor, inputs: list[Tensor]) -> None:
        if self._means is None or target.name not in self._means or not hasattr(target.module, "bias"):
            return
        watcher = InputMean(target)
        for tensor in inputs:
            watcher(tensor)
        mean = watcher.mean
        assert mean is not None
        old = target.module._parameters.get("bias")
        bias = corrected_bias(target.matrix, quantized, self._means[target.name], mean, old)
        target.module.register_parameter(
            "bias", nn.Parameter(bias, requires_grad=old is not None and old.requires_grad)
        )

    def _done(self, name: str, quantized: QuantizedTensor) -> None:
        self._record.quantized[name] = quantized
        if self._progress is not None:
            self._progress(len(self._record.quantized), len(self._targets), name)


def _tied_groups(targets: dict[str, Target]) -> dict[str, str]:
    """Answer, for each layer whose weight several layers of the same scheme share, the first of them."""
    first: dict[tuple[int, object], str] = {}
    groups: dict[str, str] = {}
    for name, target in targets.items():
        weight = target.module._parameters.get("weight")
        if weight is None:
            continue
        leader = first.setdefault((id(weight), target.scheme), name)
        if leader != name:
            groups[leader] = groups[name] = leader
    return groups
