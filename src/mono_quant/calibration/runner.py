"""Runs a model over calibration data with observers attached, and leaves no trace on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mono_quant.calibration.batches import Batch, tensors_in
from mono_quant.calibration.data import CalibrationData, count_samples, iterate_batches
from mono_quant.errors import ConfigurationError, InputError, MonoQuantError

#: Called after each batch with the samples done, the samples in all (``None`` if unknown) and what is being done.
CalibrationProgress = Callable[[int, int | None, str], None]

#: Watches a tensor; every :class:`~mono_quant.calibration.observers.Observer` is one.
Watcher = Callable[[Tensor], None]

LABEL = "calibrating"

W = TypeVar("W", bound=Watcher)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode without gradients; restore the mode of every module, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not model.eval(), which a model may override with side effects that could not be undone.
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def watching(
    model: nn.Module,
    inputs: Mapping[str, Watcher] | None = None,
    outputs: Mapping[str, Watcher] | None = None,
) -> Iterator[None]:
    """Attach watchers to modules by name, for a ``with`` block; every hook is removed, whatever happens.

    Args:
        model: Holds the modules.
        inputs: For a module's name, what watches the first tensor that it is called with.
        outputs: For a module's name, what watches the first tensor that it answers.

    Raises:
        ConfigurationError: ``model`` has no module of that name.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for watchers, attach in ((inputs, _watch_input), (outputs, _watch_output)):
            for name, watcher in (watchers or {}).items():
                if name not in modules:
                    raise ConfigurationError(f"the model has no module named {name!r} to observe")
                stack.callback(attach(modules[name], watcher))
        yield


def _watch_input(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(tensors_in(args, kwargs), None)
        if first is not None:
            watcher(first)

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _watch_output(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = next(tensors_in(output), None)
        if first is not None:
            watcher(first)

    return module.register_forward_hook(hook).remove


def run_batches(
    model: nn.Module,
    data: CalibrationData,
    limit: int | None = None,
    progress: CalibrationProgress | None = None,
    label: str = LABEL,
) -> int:
    """Call ``model`` with every batch, in evaluation mode and without gradients.

    Args:
        model: Called as ``model(*args, **kwargs)``; its hooks run.
        data: See :func:`~mono_quant.calibration.data.iterate_batches`.
        limit: Use at most this many samples.
        progress: Called after each batch.
        label: What to tell ``progress``.

    Returns:
        The number of samples run.

    Raises:
        InputError: The data is unusable, or the model fails on a batch; names the batch and what it holds.
        InputTypeError, ConfigurationError: As :func:`~mono_quant.calibration.data.iterate_batches`.
    """
    total = count_samples(data, limit)
    done = 0
    with evaluating(model):
        for index, batch in enumerate(iterate_batches(data, limit, model)):
            call_model(model, batch, index)
            done += batch.samples
            if progress is not None:
                progress(done, total, label)
    return done


def call_model(model: nn.Module, batch: Batch, index: int) -> Any:
    """Answer ``model(*batch.args, **batch.kwargs)``.

    Raises:
        InputError: The model fails; names the batch, what it holds, and what the model's parameters are.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except MonoQuantError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} failed on calibration batch {index} ({batch.describe()}): "
            f"{type(error).__name__}: {error}",
            suggestion=f"Check shape, dtype and device; {_parameters_of(model)}, and the first dimension of every "
            "input is the batch.",
        ) from error


def _parameters_of(model: nn.Module) -> str:
    first: Tensor | None = next(chain(model.parameters(), model.buffers()), None)
    if first is None:
        return "the model has no parameters"
    return f"the model's parameters are {str(first.dtype).removeprefix('torch.')} on {first.device}"


def run_calibration(
    model: nn.Module,
    calibration_data: CalibrationData,
    observers: Mapping[str, W] | None = None,
    num_samples: int | None = 150,
    *,
    progress: CalibrationProgress | None = None,
    observe: str = "output",
) -> dict[str, W]:
    """Run ``model`` over calibration data while observers watch its modules.

    The model is run in evaluation mode without gradients; the mode of every module is restored and every hook removed
    even if the model fails or the run is interrupted.

    Args:
        model: Not modified.
        calibration_data: See :func:`~mono_quant.calibration.data.iterate_batches`.
        observers: For each module's name, its observer; without any, the model is only run, for hooks of the caller.
        num_samples: Use at most this many samples; ``None`` for all.
        progress: Called after each batch.
        observe: ``"output"`` or ``"input"`` of the modules: the first tensor there.

    Returns:
        The observers, which have seen the data. One whose module was never reached has seen nothing, which its
        ``calculate_qparams`` says.

    Raises:
        ConfigurationError: There is no module of an observer's name, or ``observe`` is neither word.
        InputError, InputTypeError: As :func:`run_batches`.
        QuantizationError: A module answers NaN or infinite values; names it.
    """
    watchers = dict(observers or {})
    if observe not in ("input", "output"):
        raise ConfigurationError(f"observe={observe!r} is not one of input, output")
    for name, watcher in watchers.items():
        if getattr(watcher, "name", None) == "":
            watcher.name = name  # type: ignore[attr-defined]
    with watching(model, **{f"{observe}s": watchers}):
        run_batches(model, calibration_data, num_samples, progress)
    return watchers


__all__ = ["CalibrationProgress", "Watcher", "call_model", "evaluating", "run_batches", "run_calibration", "watching"]
