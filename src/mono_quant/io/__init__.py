"""Checkpoints: plain tensors with a header that says how each layer is quantized; nothing is unpickled."""

from mono_quant.core.quantization_info import QuantizationInfo
from mono_quant.io.checkpoint import find_header, read_header
from mono_quant.io.header import FORMAT_VERSION, CheckpointHeader, LayerRecord
from mono_quant.io.load import load_model, load_pytorch, load_safetensors
from mono_quant.io.save import save_model, save_pytorch, save_safetensors, save_tensors
from mono_quant.io.source import load_source
from mono_quant.io.static_record import StaticRecord

__all__ = [
    "FORMAT_VERSION",
    "CheckpointHeader",
    "LayerRecord",
    "QuantizationInfo",
    "StaticRecord",
    "find_header",
    "load_model",
    "load_pytorch",
    "load_safetensors",
    "load_source",
    "read_header",
    "save_model",
    "save_pytorch",
    "save_safetensors",
    "save_tensors",
]
