"""Runs a model over several batches side by side, so that a layer can be changed once all of them stand before it.

GPTQ quantizes a layer for the inputs that the layers before it, already quantized, produce. Running the model anew for
each layer would take a pass for each; keeping every layer's input would take the memory of all. Here each batch has a
thread of its own that stops before each layer: when the threads stand there, the layer is quantized, and they go
on with the new one. One pass over the data serves all layers, whatever the model's code does between them. Only one
thread runs at a time, so that the order of all computations is fixed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.calibration.batches import Batch, map_tensors, tensors_in
from mono_quant.calibration.runner import call_model
from mono_quant.core.free_memory import give_back_freed_memory

#: Called with a layer's name and the inputs it has been called with; answers what computes in its place from then on.
Visit = Callable[[str, list[Tensor]], nn.Module]

#: Batches that run side by side: each holds its live activations and a thread.
MAX_STREAMS: Final = 64
# Batches of equal shapes are joined until there are this many: a thread for each is a waste.
_FEW_STREAMS: Final = 8


class _Cancelled(BaseException):
    """Unwinds a stream that is no longer needed; no model's ``except Exception`` catches it."""


@dataclass(eq=False)
class _Stream:
    """One batch on its way through the model."""

    index: int
    batch: Batch
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    layer: str | None = None
    input: Tensor | None = None
    error: BaseException | None = None
    done: bool = False
    cancelled: bool = False

    def park(self, layer: str, tensor: Tensor) -> None:
        """Stop the calling thread, which is the stream's own, until it is its turn again."""
        self.layer, self.input = layer, tensor
        self.back.release()
        self.turn.acquire()
        self.layer = self.input = None
        if self.cancelled:
            raise _Cancelled


class Lockstep:
    """A run of a model over batches that stop before each of ``layers``.

    Args:
        model: A copy whose module objects may be changed for the time of the run; in evaluation mode.
        layers: The layers to stop at, by name, in the model's order. Each is called with a tensor first.
        visit: See :data:`Visit`. A layer that is called several times is visited at the first.
        ready: Layers that are replaced from the start, and by what.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        visit: Visit,
        ready: Mapping[str, tuple[nn.Module, nn.Module]] | None = None,
    ) -> None:
        self._model, self._layers, self._visit = model, dict(layers), visit
        self._rank = {name: rank for rank, name in enumerate(self._layers)}
        self._diverted = {**{name: layer for name, (layer, _) in (ready or {}).items()}, **self._layers}
        self._replacement = {name: replacement for name, (_, replacement) in (ready or {}).items()}
        self._local = threading.local()

    def run(self, batches: Sequence[Batch]) -> list[str]:
        """Run all batches.

        Returns:
            The names of the layers that no batch reached.

        Raises:
            InputError: The model fails on a batch, which is named.
            BaseException: Whatever ``visit`` raises.
        """
        streams = [_Stream(index, batch) for index, batch in enumerate(batches)]
        threads = [threading.Thread(target=self._follow, args=(stream,), daemon=True) for stream in streams]
        started: list[threading.Thread] = []
        forwards = {name: layer.__dict__.get("forward") for name, layer in self._diverted.items()}
        for name, layer in self._diverted.items():
            self._divert(name, layer)
        try:
            for stream, thread in zip(streams, threads, strict=True):
                thread.start()
                started.append(thread)
                _advance(stream)
            while parked := [stream for stream in streams if not stream.done]:
                self._step(parked)
                if self._complete():
                    break
        finally:
            for stream, thread in zip(streams, started, strict=False):
                stream.cancelled = True
                stream.turn.release()
                thread.join()
            for name, layer in self._diverted.items():
                del layer.__dict__["forward"]
                if forwards[name] is not None:
                    layer.__dict__["forward"] = forwards[name]
        return [name for name in self._layers if name not in self._replacement]

    def _step(self, parked: list[_Stream]) -> None:
        # Batches may part ways, as in a mixture of experts. The foremost layer in the model's order goes first, so
        # that batches which do not stand there yet have a chance to arrive.
        name = min((stream.layer for stream in parked if stream.layer is not None), key=self._rank.__getitem__)
        waiting = [stream for stream in parked if stream.layer == name]
        inputs = [stream.input for stream in waiting if stream.input is not None]
        self._replacement[name] = self._visit(name, inputs)
        del inputs
        if not self._complete():
            for stream in waiting:
                _advance(stream)

    def _complete(self) -> bool:
        return len(self._replacement) == len(self._diverted)

    def _follow(self, stream: _Stream) -> None:
        stream.turn.acquire()
        self._local.stream = stream
        try:
            if not stream.cancelled:
                with torch.no_grad():
                    call_model(self._model, stream.batch, stream.index)
        except _Cancelled:
            pass
        except BaseException as error:
            stream.error = error
        finally:
            stream.done = True
            stream.back.release()

    def _divert(self, name: str, layer: nn.Module) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if name not in self._replacement:
                self._local.stream.park(name, next(tensors_in(args, kwargs)))
            return self._replacement[name](*args, **kwargs)

        layer.__dict__["forward"] = forward


def _advance(stream: _Stream) -> None:
    """Let a stream run until it stops at a layer or ends; raise what its model raised."""
    stream.turn.release()
    stream.back.acquire()
    # Memory that a thread frees is kept for this thread: each stream would hold the temporary tensors of several layers
    # while it waits.
    give_back_freed_memory()
    if stream.error is not None:
        raise stream.error


def join_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Join neighbouring batches whose tensors have the same shapes, until there are few.

    Tensors as long as their batch are joined along the first dimension; everything else must be equal.
    """
    size = -(-len(batches) // _FEW_STREAMS)
    joined: list[list[Batch]] = []
    for batch in batches:
        if joined and len(joined[-1]) < size and _joinable(joined[-1][0], batch):
            joined[-1].append(batch)
        else:
            joined.append([batch])
    return [group[0] if len(group) == 1 else _join(group) for group in joined]


def _joinable(first: Batch, second: Batch) -> bool:
    return _outline(first) == _outline(second) and all(
        torch.equal(a, b)
        for a, b in zip(tensors_in(first.args, first.kwargs), tensors_in(second.args, second.kwargs), strict=True)
        if not _per_sample(a, first.samples)
    )


def _per_sample(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == samples


def _outline(batch: Batch) -> object:
    """Answer everything about a batch but the numbers in its tensors."""
    marks = map_tensors(lambda t: _Mark((t.dtype, t.device, t.shape)), batch.args)  # type: ignore[arg-type,return-value]
    named = map_tensors(lambda t: _Mark((t.dtype, t.device, t.shape)), batch.kwargs)  # type: ignore[arg-type,return-value]
    return marks, named


class _Mark(tuple[object, ...]):
    """Stands for a tensor in an outline."""


def _join(group: list[Batch]) -> Batch:
    samples = group[0].samples
    queues = [list(tensors_in(batch.args, batch.kwargs)) for batch in group]
    position = iter(range(len(queues[0])))

    def merge(tensor: Tensor) -> Tensor:
        index = next(position)
        return torch.cat([queue[index] for queue in queues]) if _per_sample(tensor, samples) else tensor

    return Batch(map_tensors(merge, group[0].args), map_tensors(merge, group[0].kwargs))
