"""One calibration batch: what it holds, how it is checked, cut and described."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mono_quant.errors import InputError


class Batch(NamedTuple):
    """The arguments of one call of the model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def samples(self) -> int:
        """The length of the first dimension of the first tensor; 1 if that tensor has no dimensions."""
        first = next(tensors_in(self.args, self.kwargs), None)
        return 1 if first is None or first.dim() == 0 else first.shape[0]

    def head(self, samples: int) -> Batch:
        """Answer the first ``samples`` samples: every tensor that is as long as the batch is cut."""
        length = self.samples

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:samples] if tensor.dim() and tensor.shape[0] == length else tensor

        return Batch(map_tensors(cut, self.args), map_tensors(cut, self.kwargs))

    def describe(self) -> str:
        """Say what the batch holds, for example ``float32 [8, 3, 32, 32] on cpu``."""
        parts = [describe_value(value) for value in self.args]
        parts += [f"{name}: {describe_value(value)}" for name, value in self.kwargs.items()]
        return ", ".join(parts) or "nothing"


def tensors_in(*values: object) -> Iterator[Tensor]:
    """Answer the tensors inside nested tuples, lists and mappings, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_in(*value.values())
        elif isinstance(value, tuple | list):
            yield from tensors_in(*value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Answer ``value`` with every tensor inside nested tuples, lists and mappings replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(function, item) for item in value]
        # A named tuple takes its fields one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def describe_value(value: object) -> str:
    """Say what a value is: dtype, shape and device of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe_value(item) for item in value) + ")"
    return type(value).__name__


def require_usable(batch: Batch, index: int) -> Batch:
    """Answer ``batch`` if it holds samples and only finite numbers.

    Raises:
        InputError: It holds no tensor, no sample, no values (meta tensors), NaN or infinite values; says which batch.
    """
    tensors = list(tensors_in(batch.args, batch.kwargs))
    if not tensors:
        raise InputError(f"calibration batch {index} holds no tensor: {batch.describe()}")
    if batch.samples == 0:
        raise InputError(f"calibration batch {index} holds no samples: {batch.describe()}")
    for tensor in tensors:
        if tensor.is_meta:
            raise InputError(f"calibration batch {index} holds no values: {describe_value(tensor)}")
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor.detach())
        # A NaN among the values makes both bounds NaN.
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            found = "NaN" if bool(low.isnan()) else "infinite values"
            raise InputError(
                f"calibration batch {index} holds {found}: {describe_value(tensor)}",
                suggestion="Leave the broken samples out of the calibration data.",
            )
    return batch
