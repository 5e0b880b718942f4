"""Drop-in layers: where quantized arithmetic happens in a model. Factories never modify the original."""

from mono_quant import ops as ops  # registers the operators that the layers call
from mono_quant.modules.base import QuantizedModule, has_own_forward
from mono_quant.modules.conv import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    quantize_conv1d_module,
    quantize_conv2d_module,
    quantize_conv3d_module,
)
from mono_quant.modules.embedding import (
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    quantize_embedding_bag_module,
    quantize_embedding_module,
)
from mono_quant.modules.exchanged_class import restore_layers
from mono_quant.modules.fused_layer import (
    FusedLayer,
    unfused_layers,
    why_not_fused,
)
from mono_quant.modules.fusion import (
    FusedActivation,
    fuse_activations,
    fuse_pair,
    fuse_saved_pair,
    fused_pairs,
    restore_activations,
)
from mono_quant.modules.layer_stack import LayerStack, fuse_layers
from mono_quant.modules.linear import QuantizedLinear, quantize_linear_module
from mono_quant.modules.packed import PackedWeight, mark_layers_that_share, mark_shared
from mono_quant.modules.registry import (
    REPLACED_FORWARD,
    counterpart,
    counterpart_for_scheme,
    counterpart_of_type,
    register,
)
from mono_quant.modules.revert import revert_to_standard_modules, standard_modules
from mono_quant.modules.transformer import disable_fused_path, restore_fused_path
from mono_quant.modules.weight_only import WeightOnlyLinear, quantize_linear_module_int4

# The name that mono-quant 1.1 gives it.
convert_to_pytorch_native = revert_to_standard_modules

__all__ = [
    "FusedActivation",
    "FusedLayer",
    "LayerStack",
    "PackedWeight",
    "convert_to_pytorch_native",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedLinear",
    "QuantizedModule",
    "REPLACED_FORWARD",
    "WeightOnlyLinear",
    "counterpart",
    "counterpart_for_scheme",
    "counterpart_of_type",
    "disable_fused_path",
    "fuse_activations",
    "fuse_layers",
    "fuse_pair",
    "fuse_saved_pair",
    "fused_pairs",
    "has_own_forward",
    "mark_layers_that_share",
    "mark_shared",
    "quantize_conv1d_module",
    "quantize_conv2d_module",
    "quantize_conv3d_module",
    "quantize_embedding_bag_module",
    "quantize_embedding_module",
    "quantize_linear_module",
    "quantize_linear_module_int4",
    "register",
    "restore_activations",
    "restore_layers",
    "restore_fused_path",
    "revert_to_standard_modules",
    "standard_modules",
    "unfused_layers",
    "why_not_fused",
]
