"""Measures what every layer does to a model in every format, in one pass over the data for each direction.

For each batch:

1. The float model runs once. Each layer's inputs and output are kept until the batch is done.
2. Gradients flow back once for each probe, from random directions of the model's output to every layer's output.
3. Each layer runs in each format on the inputs that it had: the difference to its float output is its error alone, and
   the product of difference and gradient is what reaches the model's output (:mod:`mono_quant.api.probes`).
4. The model runs once for each format with every layer in it: errors in company.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.algorithms.apply import unfused
from mono_quant.api.error_sums import ErrorSums, Outputs
from mono_quant.api.formats import FLOAT, Unit, uniform_assignment
from mono_quant.api.probes import Call, Gradient, Probes, UnitError
from mono_quant.api.working_copy import WorkingCopy
from mono_quant.calibration import Batch, call_model
from mono_quant.calibration.batches import map_tensors
from mono_quant.modules.fusion import activation_name, computes_activations

#: Called with the passes done, the passes in all, and what is being done.
Report = Callable[[int, int, str], None]

# The least disturbed of some calls is the layer's own time.
_MOST_REPEATS: Final = 25
_SECONDS_OF_REPEATS: Final = 0.02


@dataclass
class Effects:
    """Sums over all batches; keys are names of layers (or units) and formats.

    Attributes:
        signal: Energy of the model's outputs on their common scale.
        noise: Energy of the error there that a unit causes in a format when it alone is quantized.
        divergence: Mean divergence of the logits, in nats for each position, of the same.
        alone, company: Errors of a layer's own output.
        seconds: One pass of the first batch through a layer, and through the activation that it may compute.
        uniform: Errors of the model's output with every layer in one format, and the divergence of its logits.
        incomparable: Layers whose outputs had other shapes in a quantized model.
        by_run: Units that no gradient reached: the model was run with each of them on the first batch.
        samples: Samples that were run.
    """

    signal: float = 0.0
    noise: dict[tuple[str, str], float] = field(default_factory=dict)
    divergence: dict[tuple[str, str], float] = field(default_factory=dict)
    alone: dict[tuple[str, str], ErrorSums] = field(default_factory=dict)
    company: dict[tuple[str, str], ErrorSums] = field(default_factory=dict)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    uniform: dict[str, tuple[ErrorSums, float]] = field(default_factory=dict)
    incomparable: set[str] = field(default_factory=set)
    by_run: list[str] = field(default_factory=list)
    samples: int = 0


def measure_effects(
    copy: WorkingCopy, batches: Sequence[Batch], formats: Sequence[str], outputs: Outputs, seed: int, report: Report
) -> Effects:
    """Run the passes over ``batches``; the same seed answers the same numbers, but for the times.

    Raises:
        InputError: The model fails on a batch, which is named.
    """
    run = _Run(copy, tuple(formats), outputs, Probes(seed, outputs, sum(batch.samples for batch in batches)))
    total = len(batches) * (1 + len(formats))
    with unfused(), torch.inference_mode(False):
        for index, batch in enumerate(batches):
            owned = Batch(map_tensors(torch.clone, batch.args), map_tensors(torch.clone, batch.kwargs))
            calls, answer = run.float_pass(owned, index)
            report(index * (1 + len(formats)) + 1, total, "measuring layers")
            for position, name in enumerate(formats):
                run.company_pass(owned, index, name, calls, answer)
                report(index * (1 + len(formats)) + position + 2, total, f"measuring {name}")
            if index == 0:
                run.without_gradient(owned, answer)
            run.effects.samples += batch.samples
    run.finish()
    return run.effects


class _Run:
    """The passes over one batch after the other."""

    def __init__(self, copy: WorkingCopy, formats: tuple[str, ...], outputs: Outputs, probes: Probes) -> None:
        self.effects = Effects()
        self._copy, self._formats, self._outputs, self._probes = copy, formats, outputs, probes
        self._unit_of = {layer: unit for unit in copy.units for layer in unit.layers}
        self._floats = {unit.name: FLOAT for unit in copy.units}
        self._probed: set[str] = set()
        self._by_run: dict[tuple[str, str], tuple[float, float]] = {}
        self._activations = copy.fused_activations()
        self._positions = 0
        self._first_signal = 0.0

    def float_pass(self, batch: Batch, index: int) -> tuple[list[Call], dict[str, Tensor]]:
        calls: list[Call] = []
        copy = self._copy
        with copy.using(self._floats) as model, _recording(copy, calls), torch.enable_grad():
            answer = self._outputs.tensors(call_model(model, batch, index))
            gradients = self._probes.gradients(answer, calls)
        exact = {name: tensor.detach() for name, tensor in answer.items()}
        sums = ErrorSums()
        self._outputs.add_error(sums, exact, exact)
        self.effects.signal += sums.signal
        self._positions += self._outputs.divergence(exact, exact)[1]
        if index == 0:
            self._first_signal = sums.signal
        with torch.no_grad():
            self._layers_alone(calls, gradients, batch.samples, index)
        return calls, exact

    def _layers_alone(self, calls: list[Call], gradients: list[Gradient], samples: int, index: int) -> None:
        effects = self.effects
        errors: dict[tuple[str, str], UnitError] = {}
        for position, call in enumerate(calls):
            unit = self._unit_of[call.layer]
            for name in unit.formats:
                layer = self._copy.layer(call.layer, name)
                answered = layer(*call.args, **call.kwargs)
                effects.alone.setdefault((call.layer, name), ErrorSums()).add(call.output, answered)
                error = errors.setdefault((unit.name, name), UnitError(gradients))
                error.add_call(position, answered.float() - call.output.float(), samples)
                if index == 0:
                    self._time(call, name, layer)
            if index == 0:
                self._time(call, FLOAT, self._copy.layer(call.layer, FLOAT))
        for key, error in errors.items():
            if error.probed:
                self._probed.add(key[0])
            effects.noise[key] = effects.noise.get(key, 0.0) + error.noise()
            effects.divergence[key] = effects.divergence.get(key, 0.0) + error.divergence()

    def _time(self, call: Call, name: str, layer: nn.Module) -> None:
        activation = self._activations.get(call.layer)
        best, spent, repeats = float("inf"), 0.0, 0
        with _computing(layer, activation) as after:
            while not repeats or (repeats < _MOST_REPEATS and spent < _SECONDS_OF_REPEATS):
                start = time.perf_counter()
                output = layer(*call.args, **call.kwargs)
                if after is not None:
                    after(output)
                passed = time.perf_counter() - start
                best, spent, repeats = min(best, passed), spent + passed, repeats + 1
        key = (call.layer, name)
        self.effects.seconds[key] = self.effects.seconds.get(key, 0.0) + best

    def company_pass(self, batch: Batch, index: int, name: str, calls: list[Call], exact: dict[str, Tensor]) -> None:
        assignment = uniform_assignment(self._copy.units, name)
        expected: dict[str, list[Tensor]] = {}
        for call in calls:
            expected.setdefault(call.layer, []).append(call.output)

        def compare(layer: str, output: Tensor) -> None:
            queue = expected.get(layer)
            if not queue or queue[0].shape != output.shape:
                self.effects.incomparable.add(layer)
                return
            self.effects.company.setdefault((layer, name), ErrorSums()).add(queue.pop(0), output)

        layers = {
            layer: self._copy.layer(layer, name)
            for layer, unit in self._unit_of.items()
            if assignment[unit.name] == name
        }
        with self._copy.using(assignment) as model, _comparing(layers, compare):
            answer = self._outputs.tensors(call_model(model, batch, index))
        sums, divergence = self.effects.uniform.get(name, (ErrorSums(), 0.0))
        self._outputs.add_error(sums, exact, answer)
        self.effects.uniform[name] = (sums, divergence + self._outputs.divergence(exact, answer)[0])

    def without_gradient(self, batch: Batch, exact: dict[str, Tensor]) -> None:
        """Run the model with each unit alone that data reached and gradients did not."""
        reached = {self._unit_of[layer].name for layer, _ in self.effects.alone}
        for unit in self._copy.units:
            if unit.name not in reached or unit.name in self._probed:
                continue
            self.effects.by_run.append(unit.name)
            for name in unit.formats:
                self._run_with(unit, name, batch, exact)

    def _run_with(self, unit: Unit, name: str, batch: Batch, exact: dict[str, Tensor]) -> None:
        with self._copy.using({**self._floats, unit.name: name}) as model:
            answer = self._outputs.tensors(call_model(model, batch, 0))
        sums = ErrorSums()
        self._outputs.add_error(sums, exact, answer)
        divergence, positions = self._outputs.divergence(exact, answer)
        share = sums.noise / self._first_signal if self._first_signal else 0.0
        self._by_run[unit.name, name] = (share, divergence / max(1, positions))

    def finish(self) -> None:
        """Turn sums into energies of the whole run, and into means."""
        effects, positions = self.effects, max(1, self._positions)
        for name, (sums, divergence) in effects.uniform.items():
            effects.uniform[name] = (sums, divergence / positions)
        effects.divergence = {key: value / positions for key, value in effects.divergence.items()}
        for key, (share, divergence) in self._by_run.items():
            effects.noise[key], effects.divergence[key] = share * effects.signal, divergence


@contextmanager
def _computing(layer: nn.Module, activation: nn.Module | None) -> Iterator[nn.Module | None]:
    """Let ``layer`` compute an activation for a ``with`` block; answer the activation if it cannot."""
    if activation is None or not computes_activations(layer):
        yield activation
        return
    layer.activation = activation_name(activation) or "none"
    try:
        yield None
    finally:
        layer.activation = "none"


@contextmanager
def _recording(copy: WorkingCopy, calls: list[Call]) -> Iterator[None]:
    """Keep every call of the float layers for a ``with`` block; their outputs lead gradients to the calls."""

    def recorder(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            # The model may go on to change its tensors in place.
            kept = map_tensors(_detached, args), map_tensors(_detached, kwargs)
            offset = torch.zeros_like(output, requires_grad=True)
            calls.append(Call(name, *kept, output.detach(), offset))
            return output + offset

        return hook

    with ExitStack() as stack:
        for unit in copy.units:
            for name in unit.layers:
                layer = copy.layer(name, FLOAT)
                stack.callback(layer.register_forward_hook(recorder(name), with_kwargs=True).remove)
        yield


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@contextmanager
def _comparing(layers: dict[str, nn.Module], compare: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand every output of ``layers`` to ``compare`` for a ``with`` block."""

    def watcher(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                compare(name, output)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watcher(name)).remove)
        yield
