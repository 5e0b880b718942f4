"""This library: a static int8 graph, calibrated with its defaults."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.vision_engines.engine import Classifier
from mono_quant.graph import describe_static, quantize_static, restore_static

NAME = "mono_quant static int8"
DISTRIBUTIONS = ("mono-quant", "torch")
#: File of the seconds that running and watching the calibration images took.
CALIBRATION_SECONDS = "calibration_seconds.json"
_BATCH = 10


def build(model: nn.Module, calibration: Tensor, directory: Path) -> float:
    start = time.perf_counter()
    quantized, report = quantize_static(model, list(calibration.split(_BATCH)))
    seconds = time.perf_counter() - start
    # The run over the images alone, without capture and lowering.
    (directory / CALIBRATION_SECONDS).write_text(json.dumps(report.calibration_seconds), encoding="utf-8")
    (directory / "graph.json").write_text(json.dumps(describe_static(quantized)), encoding="utf-8")
    save_file(quantized.state_dict(), directory / "graph.safetensors")
    return seconds


def load(make: Callable[[], nn.Module], directory: Path) -> Classifier:
    quantized = restore_static(json.loads((directory / "graph.json").read_text(encoding="utf-8")))
    quantized.load_state_dict(load_file(directory / "graph.safetensors"))
    return quantized
