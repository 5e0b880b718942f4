"""Calibration data in any of the usual forms, brought to the arguments of the model's calls, one batch at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Final

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mono_quant.calibration.batches import Batch, describe_value, require_usable, tensors_in
from mono_quant.errors import ConfigurationError, InputError, InputTypeError

#: A tensor, a mapping of tensors, or an iterable of batches; see :func:`iterate_batches`.
CalibrationData = Tensor | Mapping[str, Any] | Iterable[Any]

# Samples of one call where the data is a single tensor or mapping and says nothing about batches.
SAMPLES_PER_BATCH: Final = 32

_LABEL_KEYS: Final = ("label", "labels")
_EXPECTED: Final = "a tensor, a mapping of tensors, a DataLoader, or an iterable of tensors, tuples or mappings"


def iterate_batches(data: CalibrationData, limit: int | None = None, model: nn.Module | None = None) -> Iterator[Batch]:
    """Answer calibration data as the arguments of the model's calls, lazily, one batch at a time.

    The first dimension of every tensor is the batch. ``data`` is one of

    - a tensor, or a mapping of tensors (a dict, transformers' ``BatchEncoding``): cut along the first dimension into
      batches of 32 samples;
    - a ``DataLoader`` or any other iterable (list, generator) of batches, each of which is a tensor, a mapping of
      keyword arguments, a tuple or list, or a :class:`Batch` with the arguments of the call.

    A tuple is the model's positional arguments, with one exception: a pair whose second part the model cannot take
    is (inputs, labels), and only the inputs, themselves a tensor, tuple or mapping, are used. The model can take it
    if its ``forward`` has a second positional parameter that is required or defaults to ``None`` (or takes
    ``*args``); a parameter that defaults to a flag or a number is an option, not an input. Without ``model`` tuples
    are positional arguments. In a mapping ``label`` and ``labels`` are left out if ``forward`` has no such parameter.

    Args:
        data: As above.
        limit: Use at most this many samples; the batch that reaches it is cut.
        model: Whose ``forward`` decides about pairs.

    Raises:
        ConfigurationError: ``limit`` is not positive.
        InputTypeError: The data or a batch is of another type; names the type and the batch.
        InputError: There is no batch at all, or one holds no samples, NaN or infinite values; names the batch.
    """
    if limit is not None and limit < 1:
        raise ConfigurationError(f"a limit of {limit} calibration samples leaves nothing; expected at least 1")
    return _limited(_raw_batches(data), limit, _Signature(model))


def count_samples(data: CalibrationData, limit: int | None = None) -> int | None:
    """Answer how many samples :func:`iterate_batches` will answer, or ``None`` if only reading the data would tell.

    Args:
        data: As :func:`iterate_batches` takes it.
        limit: As there.
    """
    total: int | None = None
    if isinstance(data, Tensor | Mapping):
        total = _first_length(data)
    elif isinstance(data, DataLoader):
        sampler = data.sampler
        if data.batch_size is not None and not data.drop_last and isinstance(sampler, Sized):
            total = len(sampler)
    elif isinstance(data, list | tuple):
        total = sum(_first_length(batch) for batch in data)
    return total if total is None or limit is None else min(total, limit)


def _first_length(value: object) -> int:
    first = next(tensors_in(value), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def _limited(raw: Iterator[object], limit: int | None, signature: _Signature) -> Iterator[Batch]:
    done = 0
    for index, value in enumerate(raw):
        batch = require_usable(signature.bind(value, index), index)
        if limit is not None and done + batch.samples > limit:
            batch = batch.head(limit - done)
        done += batch.samples
        yield batch
        if limit is not None and done >= limit:
            return
    if done == 0:
        raise InputError(
            "the calibration data is empty: it answered no batch",
            suggestion="A generator can be read only once; pass a list or a DataLoader, or make a new generator.",
        )


def _raw_batches(data: object) -> Iterator[object]:
    if isinstance(data, Tensor):
        if data.dim() == 0:
            raise InputTypeError("calibration data is a tensor without dimensions; its first must be the samples")
        return iter(data.split(SAMPLES_PER_BATCH)) if len(data) else iter(())
    if isinstance(data, Mapping):
        return _split_mapping(data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise InputTypeError(
            f"calibration data is a {type(data).__name__}, whose items are samples, not batches",
            suggestion="Wrap it in torch.utils.data.DataLoader(dataset, batch_size=...).",
        )
    if isinstance(data, str | bytes) or not isinstance(data, Iterable | Dataset):
        raise InputTypeError(f"calibration data is a {type(data).__name__}; expected {_EXPECTED}")
    return iter(data)


def _split_mapping(data: Mapping[str, Any]) -> Iterator[object]:
    lengths = {key: value.shape[0] for key, value in data.items() if isinstance(value, Tensor) and value.dim()}
    if not lengths:
        raise InputTypeError(f"calibration data is a mapping without tensors: {describe_value(data)}")
    if len(set(lengths.values())) > 1:
        raise InputError(f"the tensors of the calibration data differ in their number of samples: {lengths}")
    samples = next(iter(lengths.values()))
    for start in range(0, samples, SAMPLES_PER_BATCH):
        part = slice(start, start + SAMPLES_PER_BATCH)
        yield {key: value[part] if key in lengths else value for key, value in data.items()}


class _Signature:
    """What a model's ``forward`` can be called with."""

    def __init__(self, model: nn.Module | None) -> None:
        self.name = "the model" if model is None else type(model).__name__
        self.positional: int | None = None
        self.keywords: frozenset[str] | None = None
        if model is None:
            return
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            return  # compiled code without a signature: as without a model
        kinds = inspect.Parameter
        if not any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
            candidates = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
            self.positional = sum(p.default is kinds.empty or p.default is None for p in candidates)
        if not any(p.kind is kinds.VAR_KEYWORD for p in parameters):
            self.keywords = frozenset(p.name for p in parameters)

    def bind(self, value: object, index: int) -> Batch:
        """Answer the arguments that a batch stands for."""
        if isinstance(value, Batch):  # a tuple too, of arguments that are bound already
            return value
        if isinstance(value, Tensor):
            return Batch((value,), {})
        if isinstance(value, Mapping):
            return Batch((), self._keyword_arguments(value, index))
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise InputTypeError(
                f"calibration batch {index} is a {type(value).__name__}; expected a tensor, a mapping, or a tuple",
                suggestion="Convert numbers and arrays with torch.as_tensor, text with the model's tokenizer.",
            )
        if self.positional is None or len(value) <= self.positional:
            return Batch(tuple(value), {})
        if len(value) == 2:
            return self.bind(value[0], index)
        raise InputError(
            f"calibration batch {index} holds {len(value)} values, {describe_value(value)}; "
            f"{self.name}.forward takes {self.positional} positional inputs"
        )

    def _keyword_arguments(self, value: Mapping[Any, Any], index: int) -> dict[str, Any]:
        keywords = {str(key): item for key, item in value.items()}
        if self.keywords is None:
            return keywords
        known = {key: item for key, item in keywords.items() if key in self.keywords or key not in _LABEL_KEYS}
        unknown = sorted(known.keys() - self.keywords)
        if unknown:
            raise InputError(
                f"calibration batch {index} holds {unknown}, which {self.name}.forward does not take; "
                f"it takes {sorted(self.keywords)}"
            )
        return known


__all__ = ["SAMPLES_PER_BATCH", "CalibrationData", "count_samples", "iterate_batches"]
