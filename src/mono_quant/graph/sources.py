"""What a fused run was made from, beside weights, and by what to tell whether it is still so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, starmap
from operator import attrgetter, is_, itemgetter
from typing import Final

import torch
from torch import Tensor

from mono_quant.graph.layers import Layer

_BUFFERS: Final = itemgetter("_buffers")
_VERSION: Final = attrgetter("_version")
_ADDRESS: Final = Tensor.data_ptr
_WEIGHTS: Final = ("weight", "packed_weight")


class Sources:
    """Biases, scales, tables and descriptions of layers as they are now, before they are copied.

    At every call of a run they are compared with what the layers hold then, some hundred tensors for fifty
    convolutions: so the loops are those of the interpreter, not written out, and take twenty microseconds. Weights are
    left out: a run shares them with its layers, which tell it when they let go of them.

    Args:
        layers: Those of the run's steps.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        # Layers replace their dict of buffers when they pack or unpack their weight: it is read anew each time.
        named = [(vars(layer), name) for layer in layers for name in layer._buffers if name not in _WEIGHTS]
        self._owners = tuple(owner for owner, _ in named)
        self._names = tuple(name for _, name in named)
        # A bias that is absent is an attribute, as is one that is then assigned, unless it is a parameter.
        without = [layer for layer in layers if "bias" not in layer._buffers]
        absent = [(place, "bias") for layer in without for place in (vars(layer), layer._parameters)]
        self._attributes = (*((vars(layer), "spec") for layer in layers), *absent)
        self._known = tuple(self._contents())
        tensors = [value for value in self._known if isinstance(value, Tensor)]
        self._counted = tuple(tensor for tensor in tensors if not tensor.is_inference())
        self._versions = [*map(_VERSION, self._counted)]
        self._addresses = [*map(_ADDRESS, self._counted)]
        # Inference tensors count no versions: what they hold is compared.
        self._uncounted = tuple(tensor for tensor in tensors if tensor.is_inference())
        self._values = tuple(tensor.clone() for tensor in self._uncounted)

    def are_current(self) -> bool:
        """Say whether nothing has been replaced, written to, or given another tensor's data since.

        A write through ``tensor.data`` or through memory shared with NumPy is counted nowhere and cannot be seen.
        """
        return (
            all(map(is_, self._contents(), self._known))
            and [*map(_VERSION, self._counted)] == self._versions
            and [*map(_ADDRESS, self._counted)] == self._addresses
            and all(map(torch.equal, self._uncounted, self._values))
        )

    def _contents(self) -> Iterator[object]:
        buffers = map(dict.get, map(_BUFFERS, self._owners), self._names)
        return chain(buffers, starmap(dict.get, self._attributes))
