"""Bias correction: takes out of a layer's outputs what quantization adds to their mean.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction"
(2019), section 4.2, in its empirical form: the mean input comes from calibration data, and is that of the quantized
model, so that what the layers before got wrong on average is corrected too.
"""

from __future__ import annotations

from torch import Tensor

from mono_quant.core.quantized_tensor import QuantizedTensor


def corrected_bias(
    matrix: Tensor, quantized: QuantizedTensor, float_mean: Tensor, quantized_mean: Tensor, bias: Tensor | None
) -> Tensor:
    """Answer the bias with which the mean output is that of the float layer.

    Args:
        matrix: The float weight ``[out, in]``.
        quantized: Its quantized form, of any shape with the same number of elements a row.
        float_mean: Mean input of the float model, ``[in]``.
        quantized_mean: Mean input of the quantized model, ``[in]``.
        bias: The float layer's, ``[out]``, or ``None`` for zeros.

    Returns:
        ``[out]`` in the dtype of ``bias``, or of ``matrix`` without one.
    """
    values = quantized.dequantize().flatten(1)
    shift = matrix.float() @ float_mean - values @ quantized_mean
    if bias is not None:
        shift = shift + bias.detach().float()
    return shift.to(matrix.dtype if bias is None else bias.dtype)
