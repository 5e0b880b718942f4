"""OpenVINO: converted from PyTorch, then quantized by NNCF with 300 calibration sentences."""

from __future__ import annotations

from pathlib import Path

import nncf
import openvino
import torch
from torch import Tensor

from benchmarks.engines.engine import Engine
from benchmarks.minilm import calibration_sentences, full_batch, load_model, tokenize

NAME = "OpenVINO int8 (NNCF, calibrated)"
DISTRIBUTIONS = ("openvino", "nncf", "torch", "transformers")


def build(directory: Path) -> Engine:
    ids, mask = full_batch(2, 16)
    example = {"input_ids": ids, "attention_mask": mask}
    converted = openvino.convert_model(load_model(), example_input=example)
    samples = []
    for sentence in calibration_sentences():
        sentence_ids, sentence_mask = tokenize([sentence])
        samples.append({"input_ids": sentence_ids.numpy(), "attention_mask": sentence_mask.numpy()})
    quantized = nncf.quantize(converted, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)
    path = directory / "model.xml"
    openvino.save_model(quantized, path)
    threads = torch.get_num_threads()
    compiled = openvino.compile_model(
        path, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    )

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        # Copied: the array is the engine's own output buffer, which the next call overwrites.
        return torch.from_numpy(compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0].copy())

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Engine(encode, size)
