"""Which quantized layer stands in for which float layer."""

from __future__ import annotations

from typing import Final

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mono_quant.core.layer_scheme import BFLOAT16, WEIGHT_ONLY, LayerScheme
from mono_quant.modules.base import QuantizedModule, has_own_forward
from mono_quant.modules.conv import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d
from mono_quant.modules.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from mono_quant.modules.linear import QuantizedLinear
from mono_quant.modules.weight_only import WeightOnlyLinear

# By exact type: a subclass may compute something else with its weight, and is never swapped by surprise; nor is a layer
# whose own forward was replaced. Types of optional libraries are registered by their qualified name, so that the
# library need not be imported.
_BY_TYPE: dict[type[nn.Module], type[QuantizedModule]] = {}
_BY_NAME: dict[str, type[QuantizedModule]] = {}
_WEIGHT_ONLY: dict[type[nn.Module], type[QuantizedModule]] = {nn.Linear: WeightOnlyLinear}

#: Why nothing stands in for a layer of which :func:`has_own_forward` is true.
REPLACED_FORWARD: Final = "its forward was replaced on the layer itself, and may use the weight in another way"


def register(float_type: type[nn.Module] | str, quantized_type: type[QuantizedModule]) -> None:
    """Let ``quantized_type`` stand in for ``float_type``.

    Args:
        float_type: The exact module type, or its qualified name such as ``"package.module.Layer"``.
        quantized_type: Its counterpart.
    """
    if isinstance(float_type, str):
        _BY_NAME[float_type] = quantized_type
    else:
        _BY_TYPE[float_type] = quantized_type


def _float_type(module: nn.Module) -> type[nn.Module]:
    """Answer the type as written: parametrizing a module puts a class of its own in the place of its type."""
    float_type: type[nn.Module] = type_before_parametrizations(module)
    return float_type


def counterpart_of_type(float_type: type[nn.Module]) -> type[QuantizedModule] | None:
    """Answer the class that can stand in for modules of a type in 8 bits or float16, or ``None``."""
    return _BY_TYPE.get(float_type) or _BY_NAME.get(f"{float_type.__module__}.{float_type.__qualname__}")


def counterpart(module: nn.Module) -> type[QuantizedModule] | None:
    """Answer the class that can stand in for ``module`` in 8 bits or float16, or ``None``."""
    return None if has_own_forward(module) else counterpart_of_type(_float_type(module))


def counterpart_for_scheme(module: nn.Module, scheme: LayerScheme) -> type[QuantizedModule] | None:
    """Answer the class that can stand in for ``module`` in ``scheme``, or ``None``."""
    if has_own_forward(module):
        return None
    if scheme.kind == WEIGHT_ONLY:
        return _WEIGHT_ONLY.get(_float_type(module))
    if scheme.kind == BFLOAT16 and _float_type(module) is not nn.Linear:
        return None
    return counterpart(module)


def registered_types() -> tuple[type[nn.Module], ...]:
    """Answer the float types that have a counterpart, without those registered by name."""
    return tuple(_BY_TYPE)


register(nn.Linear, QuantizedLinear)
register(nn.Conv1d, QuantizedConv1d)
register(nn.Conv2d, QuantizedConv2d)
register(nn.Conv3d, QuantizedConv3d)
register(nn.Embedding, QuantizedEmbedding)
register(nn.EmbeddingBag, QuantizedEmbeddingBag)
