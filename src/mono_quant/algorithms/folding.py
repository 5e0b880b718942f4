"""Finds out which layers can take up a scaling of the next layers' inputs, by trying it.

Dividing the inputs of a linear layer by a scale for each channel costs nothing at run time if the layer before
multiplies its outputs so already. Whether that is possible depends on everything in between and on who else reads those
outputs, which no class name tells. So each layer that could take up a scaling is tried: its outputs are multiplied
channel by channel with factors that are all different, every linear layer checks whether these factors appear in its
inputs, channel by channel and on all rows, and divides them out again. If then all layers and the model answer what
they answered before, the scaling reaches these linear layers and nothing else. Factors that pass through attention
heads, repeated ones, or a product of two branches are found in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.calibration.batches import Batch, tensors_in
from mono_quant.calibration.runner import call_model, evaluating
from mono_quant.modules import has_own_forward

# Factors lie between a quarter and four times, evenly in the logarithm, in random order.
_LARGEST_FACTOR: Final = 4.0
_ROWS: Final = 16
#: Relative differences that count as rounding, by dtype.
_TOLERANCE: Final = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# Part of the largest channel by which every channel may differ: rounding errors spread over channels.
_ROUNDING_SHARE: Final = 0.03
_SEED: Final = 20231


@dataclass(frozen=True)
class Fold:
    """A layer whose outputs can be scaled, and the layers whose inputs that scales.

    Attributes:
        source: Name of the layer that can take up a scaling of its output channels.
        consumers: For each linear layer that reads them, the output channel of ``source`` behind each of its inputs,
            int64 ``[in]``.
    """

    source: str
    consumers: dict[str, Tensor]


class _RejectedError(Exception):
    """The layer tried scales something that is not an input of a linear layer."""


def find_folds(model: nn.Module, batch: Batch) -> list[Fold]:
    """Answer the layers of ``model`` that can take up a scaling of linear layers' inputs, in the model's order.

    Args:
        model: Not modified. Layers that share their weight with another are left alone.
        batch: One call of the model. A sample of it is enough, unless that does not reach every linear layer.
    """
    own = _own_weights(model)
    linears: dict[str, nn.Module] = {
        name: layer for name, layer in own.items() if type(layer) is nn.Linear and not has_own_forward(layer)
    }
    with evaluating(model):
        probe = _Probe(model, _shortened(model, batch), linears)
        if probe.unreached:
            probe = _Probe(model, batch, linears)
        sources = [name for name, module in own.items() if name in linears or _weight(module).dim() == 1]
        folds = [probe.try_source(name, own[name]) for name in sources]
    # A layer that was not reached, such as an expert without a token, may still read what a source answers.
    doubtful = {_weight(linears[name]).shape[1] for name in probe.unreached}
    return [
        fold
        for fold in folds
        if fold is not None and not any(len(channels) in doubtful for channels in fold.consumers.values())
    ]


def apply_fold(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divide the outputs of a fold's source by ``scale``, and multiply the weights that read them.

    Args:
        model: Changed in place, by new parameters; tensors that it shares with another model are not written to.
        fold: What :func:`find_folds` answered for this model.
        scale: Positive, float32, one for each output channel of the source.
    """
    source = model.get_submodule(fold.source)
    for name in ("weight", "bias"):
        parameter = source._parameters.get(name)
        if parameter is not None:
            factor = scale.reshape(-1, *[1] * (parameter.dim() - 1))
            _replace(source, name, parameter.detach().float() / factor)
    for name, channels in fold.consumers.items():
        consumer = model.get_submodule(name)
        _replace(consumer, "weight", _weight(consumer).detach().float() * scale[channels])


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = module._parameters[name]
    assert old is not None
    module._parameters[name] = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _own_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Answer the modules that hold a floating-point weight which no other module holds."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            continue
        if all(owners[id(p)] == 1 for p in module._parameters.values() if p is not None):
            found[name] = module
    return found


def _shortened(model: nn.Module, batch: Batch) -> Batch:
    """Answer one sample of ``batch``, cut to few tokens where its tensors are rows of tokens."""
    sample = batch.head(1)
    lengths = {tensor.shape[1] for tensor in tensors_in(sample.args, sample.kwargs) if tensor.dim() > 1}
    tokens = any(not tensor.is_floating_point() for tensor in tensors_in(sample.args, sample.kwargs))
    if not tokens or len(lengths) != 1 or lengths.pop() <= _ROWS:
        return sample

    def cut(value: Any) -> Any:
        return value[:, :_ROWS] if isinstance(value, Tensor) and value.dim() > 1 else value

    short = Batch(tuple(map(cut, sample.args)), {name: cut(value) for name, value in sample.kwargs.items()})
    try:
        model(*short.args, **short.kwargs)
    except Exception:
        # Not tokens after all, or of a fixed number; a whole sample does as well.
        return sample
    return short


@dataclass
class _Probe:
    """Runs the model once for reference and once for each layer that is tried."""

    model: nn.Module
    batch: Batch
    linears: dict[str, nn.Module]
    _inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    _outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        def record(name: str) -> Callable[[Tensor | None, int], None]:
            def keep(tensor: Tensor | None, call: int) -> None:
                if tensor is not None:
                    self._inputs.setdefault(name, []).append(_some_rows(tensor).clone())

            return keep

        with _input_hooks(self.linears, record):
            # Data that do not fit the model fail here, and are described.
            self._outputs = [tensor.clone() for tensor in _floats(call_model(self.model, self.batch, 0))]

    def _run(self) -> list[Tensor]:
        return _floats(self.model(*self.batch.args, **self.batch.kwargs))

    @property
    def unreached(self) -> list[str]:
        """The linear layers that the reference run did not call."""
        return [name for name in self.linears if name not in self._inputs]

    def try_source(self, name: str, source: nn.Module) -> Fold | None:
        """Answer the fold that starts at ``source``, or ``None`` if it cannot take up a scaling."""
        weight = _weight(source)
        channels = weight.shape[0]
        generator = torch.Generator().manual_seed(_SEED)
        spread = torch.linspace(-1, 1, channels) if channels > 1 else torch.ones(1)
        shuffled = spread[torch.randperm(channels, generator=generator)]
        factors = torch.exp(shuffled * math.log(_LARGEST_FACTOR)).to(weight.device)
        trial = _Trial(self._inputs, factors)

        def scale(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[-1] != channels:
                raise _RejectedError
            scaled = output * factors.to(output.dtype)
            if type(module) is not nn.Linear and not _close(_with_scaled_weight(module, factors, args), scaled):
                raise _RejectedError
            trial.reached = True
            return scaled

        with ExitStack() as stack:
            stack.enter_context(_input_hooks(self.linears, trial.check))
            stack.callback(source.register_forward_hook(scale).remove)
            try:
                outputs = self._run()
            except _RejectedError:
                return None
        same = len(outputs) == len(self._outputs) and all(map(_close, outputs, self._outputs))
        return Fold(name, trial.consumers) if same and trial.reached and trial.consumers else None


class _Trial:
    """Looks for the factors in the inputs of linear layers, and divides them out."""

    def __init__(self, inputs: dict[str, list[Tensor]], factors: Tensor) -> None:
        self._inputs, self._factors = inputs, factors
        self._sorted, self._order = torch.sort(factors)
        self.consumers: dict[str, Tensor] = {}
        self.reached = False

    def check(self, name: str) -> Callable[[Tensor | None, int], Tensor | None]:
        def compare(tensor: Tensor | None, call: int) -> Tensor | None:
            reference = self._inputs.get(name, [])
            if tensor is None:
                raise _RejectedError
            rows = _some_rows(tensor)
            if call >= len(reference) or reference[call].shape != rows.shape:
                raise _RejectedError
            if _close(rows, reference[call]) and name not in self.consumers:
                return None
            channels = self._channels(rows, reference[call])
            if not torch.equal(self.consumers.setdefault(name, channels), channels):
                raise _RejectedError
            return tensor / self._factors[channels].to(tensor.dtype)

        return compare

    def _channels(self, rows: Tensor, reference: Tensor) -> Tensor:
        """Answer which factor scales each column of ``reference`` to ``rows``."""
        tolerance = _TOLERANCE.get(rows.dtype, 0.0)
        exact, scaled = reference.double(), rows.double()
        energy = exact.square().sum(dim=0)
        if rows.shape[1] == len(self._factors) and _close(rows, reference * self._factors.to(rows.dtype)):
            return torch.arange(len(self._factors), device=rows.device)
        # The nearest factor is only known if rounding is small against the distance of neighbours.
        spacing = 2 * math.log(_LARGEST_FACTOR) / max(1, len(self._factors))
        if not bool((energy > 0).all()) or spacing < 4 * tolerance:
            raise _RejectedError
        ratio = ((exact * scaled).sum(dim=0) / energy).float()
        right = torch.searchsorted(self._sorted, ratio).clamp_(1, len(self._sorted) - 1)
        left = right - 1
        nearer = (ratio - self._sorted[left]).abs() < (self._sorted[right] - ratio).abs()
        channels = self._order[torch.where(nearer, left, right)]
        if not _close(rows, reference * self._factors[channels].to(rows.dtype)):
            raise _RejectedError
        return channels


def _with_scaled_weight(module: nn.Module, factors: Tensor, args: tuple[Any, ...]) -> Tensor:
    scaled = {name: p * factors.to(p.dtype) for name, p in module._parameters.items() if p is not None}
    if any(name not in ("weight", "bias") or p.shape != factors.shape for name, p in scaled.items()):
        raise _RejectedError
    # forward() itself: a call would run the hook that this is called from.
    swapped = dict(module._parameters)
    try:
        module._parameters.update({name: nn.Parameter(p, requires_grad=False) for name, p in scaled.items()})
        output = module.forward(*args)
    finally:
        module._parameters.update(swapped)
    if not isinstance(output, Tensor):
        raise _RejectedError
    return output


def _input_hooks(
    modules: dict[str, nn.Module], make: Callable[[str], Callable[[Tensor | None, int], Any]]
) -> ExitStack:
    """Call ``make(name)(input, number of the call)`` before each call of a module; its answer replaces the input.

    The input is ``None`` where a module is not called with a tensor first.
    """
    stack = ExitStack()
    for name, module in modules.items():
        watcher, calls = make(name), iter(range(1 << 62))

        def hook(
            module: nn.Module, args: tuple[Any, ...], watcher: Any = watcher, calls: Any = calls
        ) -> tuple[Any, ...] | None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            changed = watcher(first, next(calls))
            return None if changed is None else (changed, *args[1:])

        stack.callback(module.register_forward_pre_hook(hook).remove)
    return stack


def _some_rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows[:: max(1, len(rows) // _ROWS)]


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    tolerance = _TOLERANCE.get(expected.dtype, 0.0)
    # Column by column: a channel of small numbers must not hide behind one of large ones, but for their rounding.
    difference = (
        torch.where(found == expected, 0, found - expected)
        .abs()
        .reshape(-1, found.shape[-1] if found.dim() else 1)
        .amax(dim=0)
    )
    size = expected.abs().reshape(-1, found.shape[-1] if found.dim() else 1).amax(dim=0)
    return bool((difference <= tolerance * (size + _ROUNDING_SHARE * size.max())).all())


def _floats(answer: Any) -> list[Tensor]:
    """Answer the floating-point tensors in what a model answered."""
    return [tensor.detach() for tensor in tensors_in(_plain(answer)) if tensor.is_floating_point()]


def _plain(value: Any) -> Any:
    """Answer the fields of an output object that is no mapping (a dataclass) as a mapping."""
    return vars(value) if hasattr(value, "__dataclass_fields__") and not isinstance(value, dict) else value
