"""OpenVINO: converted from PyTorch, then quantized by NNCF with its defaults on the calibration images."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import nncf
import openvino
import torch
from torch import Tensor, nn

from benchmarks.vision_engines.engine import Classifier

NAME = "OpenVINO int8 (NNCF, calibrated)"
DISTRIBUTIONS = ("openvino", "nncf", "torch")


def build(model: nn.Module, calibration: Tensor, directory: Path) -> float:
    start = time.perf_counter()
    converted = openvino.convert_model(model, example_input=calibration[:1], input=[-1, 3, *calibration.shape[2:]])
    samples = [image.unsqueeze(0).numpy() for image in calibration]
    quantized = nncf.quantize(converted, nncf.Dataset(samples), subset_size=len(samples))
    seconds = time.perf_counter() - start
    openvino.save_model(quantized, directory / "model.xml")
    return seconds


def load(make: Callable[[], nn.Module], directory: Path) -> Classifier:
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = openvino.compile_model(directory / "model.xml", "CPU", settings)

    def classify(images: Tensor) -> Tensor:
        # Copied: the array is the engine's own output buffer, which the next call overwrites.
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return classify
