"""Keeps PyTorch's transformer layers from going around their quantized parts.

In evaluation ``nn.TransformerEncoderLayer`` hands the weights of all its parts to one fused float kernel. Reading them
works, since quantized layers read as float ones, so nothing fails: the layer just runs in float32, with weights that
are dequantized again at each call. ``nn.TransformerEncoder`` also packs padded batches into nested tensors, which only
the fused kernel takes.
"""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from mono_quant.modules.base import QuantizedModule

# For each type, a plain attribute that PyTorch reads for nothing but the choice of the fused path, and the value
# that declines it. Attributes survive copying, pickling and compiling; hooks or a wrapper would not.
_SWITCHES: Final[tuple[tuple[type[nn.Module], str, object], ...]] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_MEMORY: Final = "_fused_path_before_quantization"


def disable_fused_path(model: nn.Module) -> list[str]:
    """Make transformer layers that hold quantized layers compute part by part.

    The results stay the same but for one thing: where a padded batch went through nested tensors, the outputs at
    padded positions were zeros, and are now whatever the layers answer there, as in training.

    Args:
        model: Changed in place. Call it after the quantized layers are in their places.

    Returns:
        The names of the ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` modules that changed; none the
        second time.
    """
    changed = []
    for name, module in model.named_modules():
        attribute, declined = _switch(module)
        # The absence of use_nested_tensor (models unpickled from old releases) declines by itself.
        if attribute is None or getattr(module, attribute, declined) == declined or not _holds_quantized(module):
            continue
        setattr(module, _MEMORY, getattr(module, attribute))
        setattr(module, attribute, declined)
        changed.append(name)
    return changed


def restore_fused_path(model: nn.Module) -> list[str]:
    """Undo :func:`disable_fused_path` wherever no quantized layer is left.

    Args:
        model: Changed in place.

    Returns:
        The names of the modules that changed.
    """
    changed = []
    for name, module in model.named_modules():
        attribute, _ = _switch(module)
        if attribute is not None and _MEMORY in module.__dict__ and not _holds_quantized(module):
            setattr(module, attribute, module.__dict__.pop(_MEMORY))
            changed.append(name)
    return changed


def _switch(module: nn.Module) -> tuple[str | None, Any]:
    for module_type, attribute, declined in _SWITCHES:
        if isinstance(module, module_type):
            return attribute, declined
    return None, None


def _holds_quantized(module: nn.Module) -> bool:
    return any(isinstance(child, QuantizedModule) for child in module.modules())
