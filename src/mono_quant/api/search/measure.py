"""Measures a model in some choice of formats: by the caller's function, and by its outputs on calibration data."""

from __future__ import annotations

import math
import numbers
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from mono_quant.api.error_sums import ErrorSums, Outputs
from mono_quant.api.formats import FLOAT
from mono_quant.api.method import EvalFn
from mono_quant.api.search.journal import Journal, Measured
from mono_quant.api.working_copy import WorkingCopy
from mono_quant.calibration import Batch, call_model
from mono_quant.errors import InputError, InputTypeError


class Measure:
    """Measures models, each of them once; what the journal holds is not measured again.

    Args:
        copy: The model in all formats.
        journal: Where measurements go.
        eval_fn: The caller's measure, or ``None``.
        batches: Calibration data for the ratio of the outputs; empty if it is not wanted.
        seed: The state of all random generators at each call of ``eval_fn``.
        fuse: Whether int8 linear layers compute the activations that follow them, as they will in the result.
    """

    def __init__(
        self,
        copy: WorkingCopy,
        journal: Journal,
        eval_fn: EvalFn | None,
        batches: Sequence[Batch],
        seed: int,
        fuse: bool,
    ) -> None:
        self.count = 0
        self._copy, self._journal, self._eval_fn, self._seed, self._fuse = copy, journal, eval_fn, seed, fuse
        self._batches = tuple(batches)

    def __call__(self, formats: Mapping[str, str], what: str) -> Measured:
        """Answer the measures of the model in ``formats``.

        Args:
            formats: For each unit's name its format.
            what: Says in errors which model it is.

        Raises:
            InputError: ``eval_fn`` fails, changes the model or answers no finite number.
        """
        known = self._journal.find(formats)
        if known is not None:
            return known
        start = time.perf_counter()
        value = self._value(formats, what)
        sqnr = self._sqnr_db(formats) if self._batches else None
        measured = Measured(dict(formats), value, sqnr, time.perf_counter() - start)
        self._journal.measured.append(measured)
        self._journal.write()
        self.count += 1
        return measured

    def _value(self, formats: Mapping[str, str], what: str) -> float | None:
        if self._eval_fn is None:
            return None
        with self._copy.using(formats, self._fuse) as model, seeded(self._seed):
            value = _checked(self._eval_fn, model, what)
        changed = self._copy.changed_parameter()
        if changed is not None:
            raise InputError(
                f"eval_fn changed {changed!r} of {what}: it must leave the model as it is",
                suggestion="Measure without training steps and without .to() or .half().",
            )
        return value

    def _sqnr_db(self, formats: Mapping[str, str]) -> float:
        outputs, sums = Outputs(), ErrorSums()
        floats = dict.fromkeys(formats, FLOAT)
        for index, batch in enumerate(self._batches):
            # Keeping the float answers of all batches could take more memory than the model.
            with self._copy.using(floats) as model:
                exact = {name: tensor.clone() for name, tensor in self._answer(outputs, model, batch, index).items()}
            with self._copy.using(formats, self._fuse) as model:
                outputs.add_error(sums, exact, self._answer(outputs, model, batch, index))
        return sums.error().sqnr_db

    def _answer(self, outputs: Outputs, model: nn.Module, batch: Batch, index: int) -> dict[str, Tensor]:
        return outputs.tensors(call_model(model, batch, index))


def _checked(eval_fn: EvalFn, model: nn.Module, what: str) -> float:
    try:
        value: object = eval_fn(model)
    except Exception as error:
        raise InputError(f"eval_fn raised {type(error).__name__} on {what}: {error}") from error
    if isinstance(value, Tensor):
        raise InputTypeError(
            f"eval_fn answered a tensor of shape {list(value.shape)} for {what}; expected a number",
            suggestion="Answer a plain number: value.item().",
        )
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise InputTypeError(
            f"eval_fn answered {value!r} of type {type(value).__name__} for {what}; expected a number",
            suggestion="Answer one number that is higher for a better model.",
        )
    if not math.isfinite(value):
        raise InputError(
            f"eval_fn answered {float(value)} for {what}; expected a finite number",
            suggestion="Answer a low number for a model that fails, and look for divisions by zero.",
        )
    return float(value)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the random generators of torch (on the CPU), numpy and Python for a ``with`` block; restore them after it."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
