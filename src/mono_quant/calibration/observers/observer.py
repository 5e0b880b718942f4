"""What all observers share: watch tensors, keep bounded statistics, answer a range and its quantization parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, Self

import torch
from torch import Tensor

from mono_quant.core.mappers import (
    QINT8,
    get_dtype_range,
    normalize_axis,
    require_float_tensor,
    scale_zp_from_range,
)
from mono_quant.errors import ConfigurationError, QuantizationError

_SETTINGS: Final = ("dtype", "symmetric", "axis")


class Observer(ABC):
    """Watches tensors and remembers a bounded summary of their values, never the values.

    Args:
        dtype: Target of the quantization: ``torch.qint8`` (codes -128 to 127) or ``torch.quint8`` (0 to 255).
        symmetric: Centre the codes on zero instead of fitting the range.
        axis: ``None`` for one range, or the channel axis for one range per channel.
        name: The layer or value that is watched, for messages.

    Raises:
        ConfigurationError: ``dtype`` has no integer codes.
    """

    def __init__(
        self,
        dtype: torch.dtype = QINT8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        name: str = "",
    ) -> None:
        get_dtype_range(dtype)
        self.dtype = dtype
        self.symmetric = symmetric
        self.axis = axis
        self.name = name
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Forget everything seen."""

    @abstractmethod
    def _observe(self, rows: Tensor) -> None:
        """Take in float32 ``[channels, elements]`` with at least one element each; one channel when per tensor."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Take in what ``other`` saw; both have seen something."""

    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]:
        """Answer the lower and upper bound to quantize, float32 ``[channels]``."""

    @property
    @abstractmethod
    def channels(self) -> int | None:
        """Number of channels seen, 1 when per tensor; ``None`` before anything was seen."""

    def settings(self) -> dict[str, object]:
        """Answer what must agree between observers that are merged."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def forward(self, x: Tensor) -> None:
        """Watch ``x``: floating point, any shape (with the channel axis if there is one). Empty tensors are ignored.

        Raises:
            InputTypeError: ``x`` is not a floating-point tensor.
            InputError: It does not have the channel axis.
            ConfigurationError: Its number of channels differs from the tensors before.
            QuantizationError: It holds NaN or infinite values; names the layer.
        """
        values = require_float_tensor(x).detach().float()
        if values.numel() == 0:
            return
        if self.axis is None:
            # Statistics do not depend on the order of elements; channels-last tensors are read as they lie.
            rows = values.as_strided((1, values.numel()), (values.numel(), 1)) if _is_dense(values) else values
            rows = rows.reshape(1, -1)
        else:
            rows = values.movedim(normalize_axis(self.axis, values.dim()), 0).flatten(1)
        if self.channels not in (None, len(rows)):
            raise ConfigurationError(f"{self._label()} has seen {self.channels} channels before, now {len(rows)}")
        self._observe(rows)

    def __call__(self, x: Tensor) -> None:
        self.forward(x)

    def merge(self, other: Self) -> Self:
        """Take in what another observer of the same kind saw, as if this one had seen it next.

        Statistics that were gathered apart (in other processes, on other shards of the data) give the same answer as
        if they had been gathered together. ``other`` is not changed.

        Raises:
            ConfigurationError: The observers differ in kind, settings or number of channels.
        """
        if type(other) is not type(self) or other.settings() != self.settings():
            raise ConfigurationError(
                f"cannot merge {type(other).__name__} {other.settings()} into {type(self).__name__} {self.settings()}"
            )
        if other.channels is None:
            return self
        if self.channels not in (None, other.channels):
            raise ConfigurationError(f"cannot merge {other.channels} channels into {self.channels}")
        self._merge(other)
        return self

    def range(self) -> tuple[Tensor, Tensor]:
        """Answer the lower and upper bound of what is to be represented.

        Returns:
            float32 of shape ``()``, or ``[channels]`` per channel.

        Raises:
            QuantizationError: Nothing was observed; names the layer.
        """
        if self.channels is None:
            raise QuantizationError(
                f"{self._label()} has observed no data, so there is no range to quantize",
                suggestion="Calibrate with inputs that reach this layer, or leave it in float.",
            )
        low, high = self._range()
        return (low, high) if self.axis is not None else (low[0], high[0])

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Answer scale (float32) and zero point (int32) for the observed range, widened so that zero is exact.

        Returns:
            Of shape ``()``, or ``[channels]`` per channel.

        Raises:
            QuantizationError: Nothing was observed; names the layer.
        """
        low, high = self.range()
        return scale_zp_from_range(low, high, *get_dtype_range(self.dtype), self.symmetric)

    def _label(self) -> str:
        return f"the observer of {self.name!r}" if self.name else f"the {type(self).__name__}"

    def _finite_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Answer each row's minimum and maximum."""
        # Over all elements, PyTorch's reduction uses every core; along rows, one for each row.
        low, high = (b.reshape(1) for b in torch.aminmax(rows)) if len(rows) == 1 else torch.aminmax(rows, dim=1)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise QuantizationError(
                f"{self._label()} met NaN or infinite values",
                suggestion="The model itself produces them on the calibration data; leave the layer in float.",
            )
        return low, high


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill a stretch of memory without gaps or overlaps."""
    if tensor.is_contiguous() or tensor.dim() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
