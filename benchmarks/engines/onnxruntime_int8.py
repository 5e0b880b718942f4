"""ONNX Runtime: exported from PyTorch, then dynamically quantized with its own tool, weights per channel."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from benchmarks.engines.engine import Engine
from benchmarks.minilm import encoder, full_batch, load_model

NAME = "ONNX Runtime int8 dynamic"
DISTRIBUTIONS = ("onnxruntime", "onnx", "onnxscript", "torch", "transformers")


class _HiddenStates(nn.Module):
    """Gives the exporter one tensor to return."""

    def __init__(self) -> None:
        super().__init__()
        self.model = load_model()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return encoder(self.model)(ids, mask)


def build(directory: Path) -> Engine:
    exported, quantized = directory / "float32.onnx", directory / "int8.onnx"
    batch, length = torch.export.Dim("batch", max=1024), torch.export.Dim("length", max=512)
    torch.onnx.export(
        _HiddenStates().eval(),
        full_batch(2, 16),
        str(exported),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["ids", "mask"],
        output_names=["hidden"],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
    )
    quantize_dynamic(exported, quantized, per_channel=True, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(quantized), options, providers=["CPUExecutionProvider"])

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["hidden"], {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    return Engine(encode, quantized.stat().st_size)
