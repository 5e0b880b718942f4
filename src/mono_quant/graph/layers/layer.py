"""What the layers of a static graph share: a frozen description and buffers, both plain enough for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn

from mono_quant.errors import CheckpointError
from mono_quant.modules.gradients import are_recorded
from mono_quant.modules.notices import report_once

_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    )
}  # fmt: skip


class Layer(nn.Module):
    """One step of a static graph.

    Args:
        spec: The layer's description, a frozen dataclass of numbers, strings and lists of them.
        tensors: Its buffers by name; those that are ``None`` are absent.
    """

    #: Name of the class in a checkpoint.
    kind: ClassVar[str]
    spec_type: ClassVar[type[Any]]

    def __init__(self, spec: Any, **tensors: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        for name, tensor in tensors.items():
            if tensor is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, _counted(tensor))

    def describe(self) -> dict[str, Any]:
        """Answer the layer without its numbers as plain values; :func:`build_layer` undoes it."""
        state = self.state_dict()
        return {
            "kind": self.kind,
            "spec": asdict(self.spec),
            "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()},
        }

    @classmethod
    def from_description(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Answer a layer with the given buffers."""
        return cls(cls.spec_type(**spec), **tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self.spec).items())


def _counted(tensor: Tensor) -> Tensor:
    """Answer ``tensor``, or its copy if it is an inference tensor: those do not count what is written to them."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone() if tensor.is_inference() else tensor


def build_layer(description: dict[str, Any], kinds: dict[str, type[Layer]]) -> Layer:
    """Undo :meth:`Layer.describe`: answer a layer whose buffers have the right shapes and no values yet.

    Raises:
        CheckpointError: The description is not one of this version's layers.
    """
    try:
        layer_type = kinds[description["kind"]]
        tensors = {
            name: torch.zeros([int(size) for size in shape], dtype=_DTYPES[dtype])
            for name, (dtype, shape) in description["tensors"].items()
        }
        return layer_type.from_description(description["spec"], tensors)
    except CheckpointError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the description of a static graph holds a layer that this version cannot build: {error!r}",
            suggestion="Load it with the version of mono_quant that wrote it.",
        ) from error


def report_lost_gradients(inputs: Iterable[object]) -> None:
    """Warn once if a derivative with respect to one of ``inputs`` is recorded: codes pass none on."""
    if any(isinstance(x, Tensor) and are_recorded(x, None) for x in inputs):
        report_once(
            "statically quantized layers pass no gradient to their input; quantize without calibration_data for a "
            "model that does"
        )
