"""Numbers only: schemes, mappers, quantizers, packing and the quantized tensor. Knows no ``nn.Module``."""

from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.mappers import (
    calculate_scale_zp_groupwise,
    calculate_scale_zp_per_channel,
    calculate_scale_zp_per_tensor,
    get_dtype_range,
)
from mono_quant.core.packing import pack_int32, pack_tiles, unpack_int32, unpack_tiles
from mono_quant.core.quantization_info import Cut, LayerInfo, QuantizationInfo
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.core.quantizers import (
    dequantize_weight,
    dequantize_weight_int4,
    quantize_affine,
    quantize_weight_bf16,
    quantize_weight_fp16,
    quantize_weight_groupwise,
    quantize_weight_int4,
    quantize_weight_int8,
    quantize_weight_int8_per_tensor,
)
from mono_quant.core.schemes import AsymmetricScheme, QuantizationScheme, SymmetricScheme

__all__ = [
    "AsymmetricScheme",
    "Cut",
    "LayerInfo",
    "LayerScheme",
    "QuantizationInfo",
    "QuantizationScheme",
    "QuantizedTensor",
    "SymmetricScheme",
    "calculate_scale_zp_groupwise",
    "calculate_scale_zp_per_channel",
    "calculate_scale_zp_per_tensor",
    "dequantize_weight",
    "dequantize_weight_int4",
    "get_dtype_range",
    "pack_int32",
    "pack_tiles",
    "quantize_affine",
    "quantize_weight_bf16",
    "quantize_weight_fp16",
    "quantize_weight_groupwise",
    "quantize_weight_int4",
    "quantize_weight_int8",
    "quantize_weight_int8_per_tensor",
    "unpack_int32",
    "unpack_tiles",
]
