"""Weights in oneDNN's layout: made on first use, never saved, never held beside the plain layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any, Self

import torch
from torch import Tensor, nn

from mono_quant.errors import InputTypeError
from mono_quant.graph.layers.layer import Layer
from mono_quant.locks import ForkSafeLock
from mono_quant.ops import get_backend
from mono_quant.ops.torch_cpu import integer_products_are_exact

_lock = ForkSafeLock()


class PackedLayer(Layer):
    """A layer with an int8 ``weight`` that moves into oneDNN's layout when it first runs on the CPU.

    While packed, the buffer ``packed_weight`` stands in the place of ``weight``. The state dict, a copy or another
    device sees the plain layout, rebuilt for the purpose.

    The dict of buffers is replaced as a whole and never changed by packing, so that whoever iterates over it
    meanwhile, in another thread, sees one layout.
    """

    weight_scale: Tensor
    _retire: Callable[[], None] | None = None

    def _pack(self, weight: Tensor, shape: list[int]) -> Tensor:
        """Answer ``weight`` in the layout that oneDNN wants for inputs of a shape."""
        raise NotImplementedError

    def _unpack(self, packed: Tensor) -> Tensor:
        """Answer the plain layout of ``packed``."""
        raise NotImplementedError

    def _packed_weight(self, x: Tensor) -> Tensor | None:
        """Answer the weight packed for inputs like ``x``, packing now if that is due.

        ``None`` where the specification is to run. Inputs of other shapes are right too, if slower by a reordering.
        """
        if torch.compiler.is_exporting():
            return self._exported_weight()
        if self._retire is not None:
            self.unpack()
        packed = self._buffers.get("packed_weight")
        if packed is not None:
            return packed
        with _lock:
            packed = self._buffers.get("packed_weight")
            weight = self._buffers.get("weight")
            if packed is not None or weight is None:
                return packed
            if (
                weight.device.type != "cpu"
                or weight.numel() == 0
                or x.numel() == 0
                or weight[:1].numel() > MAX_EXACT_TAPS
                or get_backend() == "reference"
                or not integer_products_are_exact()
            ):
                return None
            with torch.inference_mode(False), torch.no_grad():
                packed = self._pack(weight, list(x.shape))
            self._hold(packed)
            return packed

    def _exported_weight(self) -> Tensor | None:
        """Answer the weight as a program that is being exported can hold it in oneDNN's layout; ``None`` if it cannot.

        Stand-ins are in the places of the layer's tensors: what is made of them must not stay here.
        """
        return None if self._retire is not None else self._buffers.get("packed_weight")

    def _hold(self, packed: Tensor) -> None:
        others = {name: tensor for name, tensor in self._buffers.items() if name != "weight"}
        self._non_persistent_buffers_set = self._non_persistent_buffers_set.union({"packed_weight"})
        self._buffers = {**others, "packed_weight": packed}

    def _untile(self, tiles: Tensor) -> Tensor:
        """Answer the plain layout of what :meth:`adopt_tiles` took."""
        raise NotImplementedError

    def adopt_tiles(self, tiles: Tensor, retire: Callable[[], None]) -> None:
        """Hold the weight in the layout of the native kernels, inside memory that belongs to ``retire``'s owner.

        Args:
            tiles: The weight in that layout.
            retire: Called when the layer lets go of it.
        """
        self.unpack()
        with _lock:
            self._hold(tiles)
            self._retire = retire

    def _plain(self, buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Answer ``buffers``, of whatever layout, in the plain one."""
        others = {name: tensor for name, tensor in buffers.items() if name not in ("weight", "packed_weight")}
        return {"weight": self._plain_weight(buffers), **others}

    def _plain_weight(self, buffers: Mapping[str, Tensor | None]) -> Tensor:
        packed = buffers.get("packed_weight")
        if packed is not None:
            return self._unpack(packed) if packed.is_mkldnn else self._untile(packed)
        codes = buffers["weight"]
        assert codes is not None
        return codes

    def unpack(self) -> None:
        """Go back to the plain layout; the next run packs again."""
        with _lock:
            if "packed_weight" in self._buffers:
                self._buffers = self._plain(self._buffers)
            if self._retire is not None:
                self._retire()
                self._retire = None

    @property
    def codes(self) -> Tensor:
        """The weight's int8 codes, output channels first."""
        return self._plain_weight(self._buffers)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor):
            shape = self.codes.shape
            if value.dtype != torch.int8 or value.shape != shape or isinstance(value, nn.Parameter):
                raise InputTypeError(
                    f"the weight of a {type(self).__name__} is stored as int8 {list(shape)} and cannot be set to a "
                    f"{type(value).__name__} of {value.dtype} {list(value.shape)}",
                    suggestion="Change the float layer and quantize it again.",
                )
            # There is no such buffer while the layer is packed: nn.Module would put the tensor beside it, to no effect.
            self.unpack()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unpack()
        # Scales and biases mean nothing in another precision: .half() or .to(bfloat16) leave them alone.
        before = {name: t.dtype for name, t in self._buffers.items() if t is not None}
        kept = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != dtype:
                self._buffers[name] = kept[name].to(after.device)
        return self

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
        state.pop("_retire", None)
        if "packed_weight" in state["_buffers"]:
            state["_buffers"] = self._plain(state["_buffers"])
        return state


# 255 * 127 * taps must stay below 2**31 for int32 sums; beyond, the specification adds up in float64.
MAX_EXACT_TAPS = 65_536
