"""Statically quantized models as plain values beside their state dict, and back."""

from __future__ import annotations

from typing import Any

from torch import nn

from mono_quant.errors import CheckpointError, InputError, MonoQuantError
from mono_quant.graph.layerwise import describe_layers, put_layers
from mono_quant.graph.program import StaticGraph


def describe_static(module: nn.Module) -> dict[str, Any]:
    """Answer a statically quantized model without its numbers, as plain values that JSON can hold.

    Together with ``module.state_dict()`` this is the whole model.

    Raises:
        InputError: The module is not statically quantized.
    """
    if isinstance(module, StaticGraph):
        return {"kind": "graph", "graph": module.describe()}
    layers = describe_layers(module)
    if not layers:
        raise InputError(f"{type(module).__name__} is not a statically quantized model")
    return {"kind": "layers", "layers": layers}


def restore_static(description: dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    """Undo :func:`describe_static`: answer a model whose numbers are still to come with ``load_state_dict``.

    Args:
        description: As :func:`describe_static` answered it, possibly read from JSON.
        model: The float model, where the description is one of layers; a graph needs none.

    Raises:
        CheckpointError: The description is damaged or from a newer version.
        InputError: The layers' float model is missing, or does not have them.
    """
    kind = description.get("kind")
    try:
        if kind == "graph":
            return StaticGraph.from_description(description["graph"]).eval()
        if kind == "layers":
            if model is None:
                raise InputError(
                    "the model was quantized layer by layer and needs its float architecture",
                    suggestion="Pass the float model.",
                )
            return put_layers(model, description["layers"]).eval()
    except MonoQuantError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the description of a static model is damaged: {error!r}") from error
    raise CheckpointError(f"the description of a static model is of kind {kind!r}, expected graph or layers")
