"""Consecutive steps of a static graph as one call of the native operator ``run_codes``.

Weights move into the operator's constants, tiled for its kernels; each layer keeps a view in the place of its weight
and rebuilds the plain one where it is asked for. A layer that goes back to the plain layout (to be moved or loaded)
takes the run it belongs to out of use, and so does a layer whose bias, scales or table have changed: these are copied.
The next call makes a new run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from mono_quant.core.free_memory import give_back_freed_memory
from mono_quant.graph.arithmetic import LARGEST_CODE, QParams
from mono_quant.graph.layers import Layer
from mono_quant.graph.layers.conv import QuantizedConvolution
from mono_quant.graph.layers.elementwise import Add, Multiply, Quantize, Table
from mono_quant.graph.layers.spatial import GlobalAverage, MaxPool, Pad
from mono_quant.graph.sources import Sources
from mono_quant.ops import codes
from mono_quant.ops.codes import ALIGNMENT, Link

# Beyond this, rounding by addition would not be exact; what really occurs stays far below.
_LARGEST_VALUE: Final = 2.0**21

# Bytes of plain weights that may wait to be given back to the system.
_FREED_AT_ONCE: Final = 4 << 20

# Codes that are widened to 32 bits at a time.
_WIDENED_AT_ONCE: Final = 1 << 16

_FUSABLE: Final = (Quantize, Add, Multiply, Table, MaxPool, GlobalAverage)


class _Constants:
    """Bytes that steps point into, gathered piece by piece."""

    def __init__(self) -> None:
        self.bytes = 0
        self._fill: list[tuple[int, Callable[[], Tensor], QuantizedConvolution | None]] = []

    def add(self, count: int, values: Callable[[], Tensor], layer: QuantizedConvolution | None = None) -> int:
        """Leave room for ``count`` bytes; answer where they start. ``layer`` takes a view in place of its weight."""
        start = self.bytes
        self.bytes = -(-(start + count) // ALIGNMENT) * ALIGNMENT
        self._fill.append((start, values, layer))
        return start

    def array(self, values: Tensor) -> int:
        """Take in a value for each channel, padded as ``run_codes`` wants them."""
        padded = values.new_zeros(-(-len(values) // ALIGNMENT) * ALIGNMENT)
        padded[: len(values)] = values
        return self.add(padded.numel() * padded.element_size(), lambda: padded)

    def build(self, run: FusedRun) -> Tensor:
        """Answer the bytes. Layers give up their weights one by one, so that none is held twice for long."""
        # Not zeros: pages become resident only as pieces come, while those of the plain weights go.
        content = torch.empty(self.bytes, dtype=torch.uint8)
        ends = [start for start, *_ in self._fill[1:]] + [self.bytes]
        freed = 0
        for (start, values, layer), end in zip(self._fill, ends, strict=True):
            piece = values()
            stop = start + piece.numel() * piece.element_size()
            view = content[start:stop].view(piece.dtype).reshape(piece.shape)
            view.copy_(piece)
            content[stop:end].zero_()
            if layer is not None:
                layer.adopt_tiles(view, run.retire)
                freed += view.numel()
            if freed > _FREED_AT_ONCE:
                # Plain weights that have gone are still resident, beside the tiles that take their place.
                give_back_freed_memory()
                freed = 0
        give_back_freed_memory()
        return content


@dataclass
class FusedRun:
    """Steps ``start`` to ``stop`` of a graph.

    Attributes:
        inputs, outputs: Numbers of the values that it takes and answers.
        released: Numbers of the values that nothing needs afterwards.
        sources: What was copied from the layers.
    """

    start: int
    stop: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    released: tuple[int, ...]
    sources: Sources
    constants: Tensor | None = None
    program: str = ""
    retired: bool = False

    def retire(self) -> None:
        """Take the run out of use: one of its layers went back to its plain weight."""
        self.retired = True

    def is_current(self) -> bool:
        """Say whether the run computes what its layers would."""
        # During an export, stand-ins are in the places of the layers' tensors.
        return not self.retired and (torch.compiler.is_exporting() or self.sources.are_current())

    def __call__(self, values: list[Any]) -> None:
        """Compute the outputs.

        Raises:
            RuntimeError: The inputs are not such as ``run_codes`` takes, or hold NaN.
        """
        answers = torch.ops.mono_quant.run_codes(
            [values[number] for number in self.inputs], self.constants, self.program
        )
        for number, answer in zip(self.outputs, answers, strict=True):
            values[number] = answer
        for number in self.released:
            values[number] = None


def fuse_steps(
    steps: Sequence[Any], layers: Sequence[nn.Module], released: Sequence[tuple[int, ...]], answers: set[int]
) -> list[FusedRun]:
    """Answer the runs that a graph's steps form, and move the weights of their convolutions into them.

    Args:
        steps: The graph's steps.
        layers: The layer of each step, or another module in its place, which runs by itself.
        released: Values that nothing needs after each step.
        answers: Numbers of the values that the graph answers.
    """
    runs = []
    with torch.inference_mode(False), torch.no_grad():
        # A layer that stands in several places runs by itself: it can give its weight to one run only.
        once = [layer if sum(layer is other for other in layers) == 1 else None for layer in layers]
        for start, stop in _stretches(steps, once):
            made = {steps[i].output for i in range(start, stop)}
            read = [number for i in range(start, stop) for number in steps[i].inputs]
            later = {number for step in steps[stop:] for number in step.inputs} | answers
            inputs = tuple(dict.fromkeys(number for number in read if number not in made))
            outputs = tuple(number for number in sorted(made) if number in later)
            gone = {number for i in range(start, stop) for number in released[i]} - made
            fused = cast("Sequence[Layer]", layers[start:stop])
            # Taken note of before anything is copied, or a write in between would go unnoticed.
            run = FusedRun(start, stop, inputs, outputs, tuple(sorted(gone)), Sources(fused))
            _compile(run, steps[start:stop], fused)
            runs.append(run)
    return runs


def _stretches(steps: Sequence[Any], layers: Sequence[nn.Module | None]) -> list[tuple[int, int]]:
    """Answer where consecutive steps with a native form start and stop; only those with a convolution among them."""
    found, start = [], 0
    for index in range(len(layers) + 1):
        stop = index
        if index < len(layers) and (_is_fusable(layers[index]) or _pads_next(steps, layers, index)):
            if not _answers_matrix(layers[index]):
                continue
            stop += 1
        if any(isinstance(layer, QuantizedConvolution) for layer in layers[start:stop]):
            found.append((start, stop))
        start = index + 1
    return found


def _answers_matrix(layer: nn.Module | None) -> bool:
    return isinstance(layer, GlobalAverage) and not layer.spec.keepdim


def _is_fusable(layer: nn.Module | None) -> bool:
    if isinstance(layer, QuantizedConvolution):
        return layer.has_tiles()
    if isinstance(layer, MaxPool):
        return len(layer.spec.kernel_size) == 2
    return isinstance(layer, _FUSABLE)


def _pads_next(steps: Sequence[Any], layers: Sequence[nn.Module | None], index: int) -> bool:
    """Say whether a step pads an image for the convolution that follows, and for nothing else."""
    layer = layers[index]
    if not isinstance(layer, Pad) or len(layer.spec.pad) > 4 or min(layer.spec.pad) < 0 or index + 1 == len(layers):
        return False
    users = [i for i, step in enumerate(steps) if steps[index].output in step.inputs]
    follower = layers[index + 1]
    reads_once = steps[index + 1].inputs.count(steps[index].output) == 1 == len(users)
    first = steps[index + 1].inputs[0] == steps[index].output
    return isinstance(follower, QuantizedConvolution) and follower.has_tiles() and reads_once and first


def _compile(run: FusedRun, steps: Sequence[Any], layers: Sequence[Layer]) -> None:
    numbers = {number: position for position, number in enumerate(run.inputs)}
    constants = _Constants()
    links: list[Link] = []
    padding: Sequence[int] = ()
    for step, layer in zip(steps, layers, strict=True):
        inputs = [numbers[number] for number in step.inputs]
        if isinstance(layer, Pad):
            # The next step's convolution pads.
            numbers[step.output], padding = inputs[0], layer.spec.pad
            continue
        made = _step(layer, constants)
        if padding and isinstance(made, codes.ConvStep):
            made = _padded(made, padding)
            padding = ()
        numbers[step.output] = len(run.inputs) + len(links)
        links.append(Link(made, inputs[0], inputs[1] if len(inputs) > 1 else -1))
    run.program = codes.encode_program(len(run.inputs), [numbers[number] for number in run.outputs], links)
    run.constants = constants.build(run)


def _padded(step: codes.ConvStep, padding: Sequence[int]) -> codes.ConvStep:
    """Answer a convolution that pads as :func:`torch.nn.functional.pad` would have done before."""
    left, right, top, bottom = (*padding, 0, 0)[:4]
    return replace(
        step,
        padding_h=step.padding_h + top,
        padding_w=step.padding_w + left,
        padding_bottom=step.padding_bottom + bottom,
        padding_right=step.padding_right + right,
    )


def _step(layer: Layer, constants: _Constants) -> codes.Step:
    match layer:
        case QuantizedConvolution():
            return _convolution(layer, constants)
        case Quantize():
            return codes.QuantizeStep(1.0 / layer.spec.output.scale, layer.spec.output.zero_point)
        case Add():
            a, b, out = layer.spec.first, layer.spec.second, layer.spec.output
            shift = -(a.scale * a.zero_point + b.scale * b.zero_point) / out.scale
            return codes.AddStep(a.scale / out.scale, b.scale / out.scale, shift, *_limits(out), out.zero_point)
        case Multiply():
            a, b, out = layer.spec.first, layer.spec.second, layer.spec.output
            scale = a.scale * b.scale / out.scale
            return codes.MultiplyStep(a.zero_point, b.zero_point, scale, *_limits(out), out.zero_point)
        case MaxPool():
            pool = layer.spec
            geometry = [*pool.kernel_size, *pool.stride, *pool.padding, *pool.dilation]
            return codes.MaxPoolStep(*geometry, int(pool.ceil_mode))  # type: ignore[call-arg]
        case GlobalAverage():
            given = layer.spec.input
            return codes.GlobalAverageStep(given.zero_point, given.scale, int(layer.spec.keepdim))
        case Table():
            table = layer.table
            return codes.TableStep(constants.add(table.numel(), lambda: table))
    raise AssertionError(f"{layer.kind} has no native form")


def _limits(out: QParams) -> tuple[float, float]:
    return -float(out.zero_point), float(LARGEST_CODE - out.zero_point)


def _row_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Answer the sum of each row of int8 codes and that of their magnitudes, int32, without a wide copy of them all."""
    sums, magnitudes = [], []
    for rows in weight.split(max(1, _WIDENED_AT_ONCE // max(1, weight.shape[1]))):
        wide = rows.to(torch.int32)
        sums.append(wide.sum(1, dtype=torch.int32))
        magnitudes.append(wide.abs_().sum(1, dtype=torch.int32))
    return torch.cat(sums), torch.cat(magnitudes)


def _convolution(layer: QuantizedConvolution, constants: _Constants) -> codes.ConvStep:
    spec, weight, out = layer.spec, layer.codes, layer.spec.output
    sums, magnitudes = _row_sums(weight.flatten(1))
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias
    finish, unit, bounds = "clamp", 1.0, None
    if out is None:
        finish = "float"
    else:
        bounds = spec.activation.code_bounds(out)
        if bounds is None:
            finish = spec.activation.name
        else:
            unit = out.scale
    scale = (layer.weight_scale.double() * spec.input.scale / unit).float()
    bias = (bias.double() / unit).float()
    other_scale = 0.0 if spec.other is None else spec.other.scale / unit
    zero = 0 if out is None else out.zero_point
    low, high = bounds or (0, LARGEST_CODE)
    # Storing codes bounds them already, where the values before it cannot be huge.
    reach = magnitudes * float(LARGEST_CODE) * scale + bias.abs()
    huge = float(reach.max()) + LARGEST_CODE * other_scale >= _LARGEST_VALUE
    tiles = layer.tiles_size()
    kind = codes.DepthwiseStep if layer.is_depthwise() else codes.ConvStep
    return kind(  # type: ignore[call-arg]
        weight.shape[0], *weight.shape[2:], *spec.stride, *spec.padding, *spec.dilation, spec.input.zero_point,
        constants.add(tiles, layer.tiles, layer),
        constants.array(sums * spec.input.zero_point), constants.array(scale), constants.array(bias),
        codes.FINISHES.index(finish), 1.0 if out is None else 1.0 / out.scale, float(low - zero), float(high - zero),
        zero, int(huge or (low, high) != (0, LARGEST_CODE)),
        other_scale, 0 if spec.other is None else spec.other.zero_point,
        weight.shape[1] * spec.groups, *spec.padding,
    )  # fmt: skip
