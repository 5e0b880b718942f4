"""Weights in the kernels' tiles: made on first use, never saved, and never held beside the plain layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from mono_quant.locks import ForkSafeLock
from mono_quant.modules.base import QuantizedModule, ordinary_tensors
from mono_quant.ops import get_backend

_PACKED: Final = ("packed_weight", "column_sum")

# One lock for all layers: packing happens once for each, and a lock of its own would keep a layer from being pickled.
_lock = ForkSafeLock()


class _PackedBuffers(dict[str, Tensor | None]):
    """Buffers of a packed layer, in which ``weight`` can be read and replaced although tiles stand in its place.

    ``torch.func.functional_call`` does both, going around the layer's attributes: it puts given tensors into the dict
    and afterwards those back that it found there. Whoever iterates sees what is stored.

    Args:
        buffers: What is stored.
        plain: Answers the plain layout of tiles.
    """

    def __init__(self, buffers: Mapping[str, Tensor | None], plain: Callable[[Tensor | None], Tensor]) -> None:
        super().__init__(buffers)
        self._plain = plain

    def __contains__(self, name: object) -> bool:
        return name == "weight" or super().__contains__(name)

    def __missing__(self, name: str) -> Tensor:
        if name != "weight":
            raise KeyError(name)
        return self._plain(self["packed_weight"])

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        if name == "weight":
            for packed in _PACKED:
                self.pop(packed, None)
        super().__setitem__(name, tensor)


class PackedWeight(QuantizedModule):
    """A layer with an int8 matrix that moves into the kernels' tiles when it first runs on the native backend.

    While packed, the buffers ``packed_weight`` and ``column_sum`` stand in the place of ``weight``. Reading the
    weight, the state dict, a copy or another device sees the plain layout, rebuilt for the purpose.

    The dict of buffers is replaced as a whole and never changed by packing, so that whoever iterates over it
    meanwhile, in another thread, sees one layout.

    Attributes:
        shares_weight: Set where another layer holds the same codes (tied weights); such a layer stays plain, since
            packing would end the sharing.
    """

    shares_weight: bool = False

    def _packed_weight(self) -> tuple[Tensor, Tensor] | None:
        """Answer the tiles and the column sums, packing now if that is due; ``None`` where the layer stays plain."""
        buffers = self._buffers
        packed = buffers.get("packed_weight")
        if packed is None:
            if torch.compiler.is_compiling() or not self._should_pack():
                return None
            return self._pack()
        column_sum = buffers["column_sum"]
        assert column_sum is not None
        return packed, column_sum

    def _should_pack(self) -> bool:
        codes = self._buffers.get("weight")
        if codes is None:
            return True  # another thread is packing: wait for it
        return (
            get_backend() == "native"
            and not self.shares_weight
            and codes.device.type == "cpu"
            and type(codes) is Tensor  # tracers run layers on tensors of their own kinds
            and codes.numel() > 0
            # What is made inside a transform of torch.func belongs to it, and is of no use once that is over.
            and torch._C._functorch.peek_interpreter_stack() is None
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        )

    def _pack(self) -> tuple[Tensor, Tensor]:
        with _lock:
            packed, column_sum = self._buffers.get("packed_weight"), self._buffers.get("column_sum")
            if packed is not None and column_sum is not None:
                return packed, column_sum
            codes = self.codes
            with ordinary_tensors():
                packed = torch.ops.mono_quant.pack_weight(codes)
                column_sum = codes.sum(dim=1, dtype=torch.int32)
            assert isinstance(packed, Tensor)
            others = {name: tensor for name, tensor in self._buffers.items() if name != "weight"}
            self._non_persistent_buffers_set = self._non_persistent_buffers_set.union(_PACKED)
            tiles: dict[str, Tensor | None] = {"column_sum": column_sum, "packed_weight": packed}
            self._buffers = _PackedBuffers({**others, **tiles}, self._unpacked)
            return packed, column_sum

    def unpack(self) -> None:
        """Go back to the plain layout; the next run on the native backend packs again."""
        with _lock:
            if "packed_weight" not in self._buffers:
                return
            self._buffers = self._plain(self._buffers)

    def _plain(self, buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Answer ``buffers``, which hold tiles, in the plain layout."""
        others = {name: tensor for name, tensor in buffers.items() if name not in _PACKED}
        # In front, where it was: the order of a state dict is part of what users compare.
        return {"weight": self._unpacked(buffers["packed_weight"]), **others}

    def _unpacked(self, packed: Tensor | None) -> Tensor:
        with ordinary_tensors():
            plain: Tensor = torch.ops.mono_quant.unpack_weight(packed, *self._matrix_shape())
        return plain

    @property
    def codes(self) -> Tensor:
        buffers = self._buffers
        packed = buffers.get("packed_weight")
        codes = buffers["weight"] if packed is None else self._unpacked(packed)
        assert codes is not None
        return codes

    def _matrix_shape(self) -> tuple[int, int]:
        """Answer output and input channels of the plain layout, which the padded tiles do not show."""
        raise NotImplementedError(f"{type(self).__name__} does not say how large its weight is")

    def set_tensor(self, name: str, tensor: Tensor | None) -> None:
        if name == "weight":
            for packed in _PACKED:
                self._buffers.pop(packed, None)
        super().set_tensor(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with _lock:  # or the layer could move between the two
            if "packed_weight" in self._buffers:
                destination[prefix + "weight"] = self.codes
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            # A spawned process maps the very tensors that are pickled, after pickling is over: they must live on.
            self.unpack()
        state = dict(self.__dict__)
        buffers = state["_buffers"]
        state["_buffers"] = self._plain(buffers) if "packed_weight" in buffers else dict(buffers)
        return state


def mark_shared(layers: Iterable[QuantizedModule]) -> None:
    """Keep the weight of ``layers``, which hold the same codes, in the plain layout that all of them can read."""
    for layer in layers:
        if isinstance(layer, PackedWeight):
            layer.shares_weight = True


def mark_layers_that_share(model: nn.Module) -> None:
    """Call :func:`mark_shared` for every group of layers in ``model`` that hold one and the same weight tensor."""
    holders: dict[int, list[QuantizedModule]] = {}
    for module in model.modules():
        if isinstance(module, QuantizedModule) and module._buffers.get("weight") is not None:
            holders.setdefault(id(module._buffers["weight"]), []).append(module)
    for layers in holders.values():
        if len(layers) > 1:
            mark_shared(layers)
