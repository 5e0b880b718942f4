"""Saves a quantized model, loads it again and compares: what a checkpoint loses shows here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mono_quant.core import LayerInfo, QuantizationInfo
from mono_quant.errors import MonoQuantError
from mono_quant.io import CheckpointHeader, load_model, save_model, save_tensors
from mono_quant.report.metrics import sqnr_db
from mono_quant.report.outputs import Inputs, inference, named_tensors, run_model
from mono_quant.report.weights import Model, Records, quantized_layers, stored_weight

# A loaded model has the same bits, but sums in another memory alignment may be taken in another order.
_SAME_OUTPUT_DB = 60.0


def round_trip_faults(
    original: Model,
    quantized: Model,
    records: Records | None = None,
    inputs: Inputs | None = None,
    header: CheckpointHeader | None = None,
) -> list[str]:
    """Answer what changes when ``quantized`` is saved to a temporary file and loaded; nothing if all is well.

    Args:
        original: Where it is a module, the file is loaded into its architecture, else as plain tensors.
        quantized: The quantized model.
        records: For a quantized state dict, what its checkpoint's header says of each layer.
        header: For the tensors of a file with static layers, its header: without it they say nothing of each other.
        inputs: Run the quantized and the loaded model on these and compare the outputs; for modules.
    """
    as_modules = isinstance(original, nn.Module) and isinstance(quantized, nn.Module)
    with tempfile.TemporaryDirectory(prefix="mono_quant-") as directory:
        path = Path(directory) / "round_trip.safetensors"
        try:
            if header is None or isinstance(quantized, nn.Module):
                save_model(quantized, path, _info(quantized, records))
            else:
                save_tensors(quantized, header, path)
            loaded = load_model(path, original if as_modules and isinstance(original, nn.Module) else None)
        except (MonoQuantError, OSError) as error:
            message = error.message if isinstance(error, MonoQuantError) else str(error)
            return [f"the model cannot be saved and loaded: {message}"]
        faults = _different_tensors(_tensors(quantized), _tensors(loaded))
        if inputs is not None and isinstance(quantized, nn.Module) and isinstance(loaded, nn.Module):
            with inference(quantized, loaded):
                before = named_tensors(run_model(quantized, inputs))
                after = named_tensors(run_model(loaded, inputs))
            faults += _different_outputs(before, after)
    return faults


def _info(quantized: Model, records: Records | None) -> QuantizationInfo | None:
    """Answer what saving a state dict has to be told: how each of its layers is quantized."""
    if isinstance(quantized, nn.Module):
        return None
    layers = {
        layer: LayerInfo(stored_weight(quantized, layer, records).scheme, 0, 0)
        for layer in quantized_layers(quantized, records)
    }
    symmetric = all(layer.scheme.symmetric for layer in layers.values())
    return QuantizationInfo(list(layers), [], 0, torch.int8, symmetric, layers=layers)


def _tensors(model: Model) -> Mapping[str, Tensor]:
    if not isinstance(model, nn.Module):
        return model
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _different_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    faults = []
    missing, unexpected = before.keys() - after.keys(), after.keys() - before.keys()
    if missing:
        faults.append(f"saving and loading loses {_some(missing)}")
    if unexpected:
        faults.append(f"saving and loading adds {_some(unexpected)}")
    changed = {name for name in before.keys() & after.keys() if not _same_bits(before[name], after[name])}
    if changed:
        faults.append(f"saving and loading changes {_some(changed)}")
    return faults


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    # As bytes: NaN equals itself, and 0 does not equal -0.
    pair = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(pair[0], pair[1].to(pair[0].device))


def _different_outputs(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    if before.keys() != after.keys():
        return ["the loaded model answers other tensors than the saved one"]
    return [
        f"output {name!r} of the loaded model differs from the saved one's"
        for name, tensor in before.items()
        if tensor.shape != after[name].shape
        or not (_same_bits(tensor, after[name]) or sqnr_db(tensor, after[name]) >= _SAME_OUTPUT_DB)
    ]


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


__all__ = ["round_trip_faults"]
