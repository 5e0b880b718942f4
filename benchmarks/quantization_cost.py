"""What quantizing MiniLM costs in time and memory, measured in a process of its own.

    python -m benchmarks.quantization_cost --inplace

The process loads the model, copies its weights into memory of its own (a loader may map them from the file, and mapped
pages appear only when they are read), quantizes a small model so that imports and code that runs once are paid, and
then quantizes the model while the kernel records the highest resident set size.

``peak_ratio`` is ``(bytes of the model + highest resident size - resident size just before) / bytes of the model``:
what the model and its quantization need together at the worst moment, in units of the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mono_quant
from benchmarks.minilm import load_model
from benchmarks.process_memory import reset_peak, status_bytes
from mono_quant.report import model_bytes


def measure_quantization(inplace: bool) -> dict[str, float]:
    """Measure in a new process.

    Returns:
        ``cpu_seconds``, ``wall_seconds``, ``model_bytes``, ``quantized_bytes`` and ``peak_ratio``; the last is left out
        where the system does not tell (anything but Linux).

    Raises:
        RuntimeError: The process failed.
    """
    command = [sys.executable, "-m", "benchmarks.quantization_cost", *(["--inplace"] if inplace else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _measure_here(inplace: bool) -> dict[str, float]:
    mono_quant.quantize(nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64)))
    model = load_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    size = model_bytes(model)
    gc.collect()
    before = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    result = mono_quant.quantize(model, inplace=inplace)
    figures = {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "model_bytes": float(size),
        "quantized_bytes": float(result.info.bytes_after),
    }
    if before is not None:
        figures["peak_ratio"] = (size + status_bytes("VmHWM") - before) / size
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what quantizing MiniLM costs; prints JSON.")
    parser.add_argument("--inplace", action="store_true", help="quantize the model itself instead of a copy")
    options: Any = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(json.dumps(_measure_here(options.inplace)))


if __name__ == "__main__":
    main()
