"""Runs the folded float graph over calibration data and watches the values that become codes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from mono_quant.calibration import Batch, Observer, create_observer
from mono_quant.core.mappers import QUINT8
from mono_quant.errors import InputError, MonoQuantError
from mono_quant.graph.arithmetic import QParams, memory_format
from mono_quant.graph.capture import Captured
from mono_quant.graph.float_layers import FloatConv
from mono_quant.graph.options import StaticOptions


class ChannelMean:
    """The running mean of each channel.

    Args:
        axis: Where the channels are: 1 for convolutions, -1 for linear layers.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._total: Tensor | None = None
        self._count = 0

    def __call__(self, x: Tensor) -> None:
        axis = self._axis % x.dim()
        others = [dim for dim in range(x.dim()) if dim != axis]
        total = x.detach().sum(others, dtype=torch.float32).double()
        self._total = total if self._total is None else self._total + total
        self._count += x.numel() // x.shape[axis]

    @property
    def mean(self) -> Tensor | None:
        """float64 ``[channels]``; ``None`` before anything was seen."""
        return None if self._total is None else self._total / max(self._count, 1)


class Statistics:
    """What calibration learned: a range for each watched node, a mean for each input of a layer.

    Args:
        watched: Names of the nodes whose values become codes.
        averaged: Nodes that layers read, and the axis of their channels there.
        options: See :class:`StaticOptions`.
    """

    def __init__(self, watched: dict[fx.Node, str], averaged: set[tuple[fx.Node, int]], options: StaticOptions) -> None:
        self.observers: dict[fx.Node, Observer] = {
            node: create_observer(options.observer, dtype=QUINT8, name=name) for node, name in watched.items()
        }
        self.means: dict[fx.Node, dict[int, ChannelMean]] = {}
        for node, axis in averaged if options.correct_bias else ():
            self.means.setdefault(node, {})[axis] = ChannelMean(axis)
        self.samples = 0

    def qparams(self, node: fx.Node) -> QParams:
        """Answer scale and zero point of a watched node.

        Raises:
            QuantizationError: It was never reached; names it.
        """
        scale, zero_point = self.observers[node].calculate_qparams()
        return QParams(float(scale), int(zero_point))

    def mean(self, node: fx.Node, axis: int) -> Tensor | None:
        """Answer the mean of each channel of a layer's input, if it was gathered."""
        return self.means[node][axis].mean if node in self.means else None


class _Watching(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, statistics: Statistics) -> None:
        super().__init__(module)
        self._statistics = statistics

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        observer = self._statistics.observers.get(n)
        if observer is not None:
            observer(value)
        for mean in self._statistics.means.get(n, {}).values():
            mean(value)
        return value


def observe(
    captured: Captured, statistics: Statistics, batches: Iterator[Batch], total: int | None, options: StaticOptions
) -> None:
    """Run every batch through the float graph.

    Raises:
        InputError: The graph fails on a batch; names the batch and what it holds.
        QuantizationError: A value is not finite; names where.
    """
    for layer in captured.module.modules():
        if isinstance(layer, FloatConv):
            # Convolutions of images run faster in this order, which goes on from layer to layer.
            layer.weight = layer.weight.contiguous(memory_format=memory_format(layer.weight.dim()))
    interpreter = _Watching(captured.module, statistics)
    interpreter.extra_traceback = False  # it would be appended to every message
    with torch.no_grad():
        for index, batch in enumerate(batches):
            try:
                interpreter.run(*_ordered(captured, batch))
            except MonoQuantError as error:
                what = f"calibration batch {index} ({batch.describe()}): {error.message}"
                raise type(error)(what, error.suggestion) from error
            except Exception as error:
                raise InputError(
                    f"the model failed on calibration batch {index} ({batch.describe()}): "
                    f"{type(error).__name__}: {error}",
                    suggestion="Every batch must have the shapes, dtypes and device of the first, apart from sizes "
                    "that the model leaves open.",
                ) from error
            statistics.samples += batch.samples
            if options.progress is not None:
                options.progress(statistics.samples, total, "calibrating")


def _ordered(captured: Captured, batch: Batch) -> list[Any]:
    given = dict(zip(captured.parameters, batch.args, strict=False)) | batch.kwargs
    if given.keys() != set(captured.inputs):
        raise InputError(f"a calibration batch holds {sorted(given)}, the first held {sorted(captured.inputs)}")
    return [_channels_last(given[name]) for name in captured.inputs]


def _channels_last(value: Any) -> Any:
    return value.contiguous(memory_format=memory_format(value.dim())) if isinstance(value, Tensor) else value


def first_and_all(batches: Iterator[Batch]) -> tuple[Batch, Iterator[Batch]]:
    """Answer the first batch, and all of them including it."""
    first = next(batches)
    return first, chain([first], batches)
