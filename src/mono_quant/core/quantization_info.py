"""What a quantization did: which layers, to what, why the others were left, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mono_quant.core.layer_scheme import LayerScheme


@dataclass(frozen=True)
class LayerInfo:
    """One quantized layer.

    Attributes:
        scheme: How it is quantized.
        bytes_before: Bytes of its weight and bias in float.
        bytes_after: Bytes of its quantized tensors; 0 if they belong to a layer it is tied to.
        sqnr_db: Signal-to-quantization-noise ratio of the weight in decibels, or ``None`` if it was not measured.
    """

    scheme: LayerScheme
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Cut:
    """An operation of a static graph that runs in float.

    Attributes:
        name: The layer or operation.
        operation: What is done there.
        reason: Why it is not done in 8 bits.
    """

    name: str
    operation: str
    reason: str


@dataclass
class QuantizationInfo:
    """Metadata of one quantization run.

    Attributes:
        selected_layers: Names of the quantized layers, in the model's order.
        skipped_layers: Names of the layers with weights that stayed in float, in the model's order.
        calibration_samples_used: Samples that were run to observe activations; 0 for dynamic quantization.
        dtype: ``torch.qint8`` or ``torch.float16``.
        symmetric: Whether weights have no zero points.
        sqnr_db: Signal-to-quantization-noise ratio over all quantized weights, in decibels.
        original_size_mb: Parameters and buffers before, in MiB.
        quantized_size_mb: Parameters and buffers after, in MiB.
        compression_ratio: The one divided by the other.
        warnings: What the caller should know, one sentence each.
        skip_reasons: For each skipped layer, why.
        layers: For each quantized layer, its scheme, bytes and error.
        bytes_before: Bytes of all parameters and buffers before; tied ones count once.
        bytes_after: The same, after.
        seconds: Wall time of the run.
        output_sqnr_db: Static quantization: signal-to-noise ratio of the model's answers on calibration samples, in
            decibels.
        cuts: Static quantization: where the graph leaves 8 bits, in order.
        not_captured: Static quantization: why the model is not one graph but was quantized layer by layer.
        fused_layers: Names of the layers of transformers that run as one native call.
        unfused_layers: For each other layer of the same classes, why it does not.
    """

    selected_layers: list[str]
    skipped_layers: list[str]
    calibration_samples_used: int
    dtype: torch.dtype
    symmetric: bool
    sqnr_db: float | None = None
    original_size_mb: float | None = None
    quantized_size_mb: float | None = None
    compression_ratio: float | None = None
    warnings: list[str] = field(default_factory=list)
    skip_reasons: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    output_sqnr_db: float | None = None
    cuts: list[Cut] = field(default_factory=list)
    not_captured: str | None = None
    fused_layers: list[str] = field(default_factory=list)
    unfused_layers: dict[str, str] = field(default_factory=dict)
