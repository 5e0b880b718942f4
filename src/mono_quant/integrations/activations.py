"""Activation modules of transformers that a quantized linear layer can compute."""

from __future__ import annotations

from torch import nn

from mono_quant.modules.fusion import register_activation


def _exact_gelu(module: nn.Module) -> str | None:
    """``GELUActivation`` holds the function it calls: PyTorch's, or a slower spelling of its own."""
    return "gelu" if getattr(module, "act", None) is nn.functional.gelu else None


register_activation("transformers.activations.GELUActivation", _exact_gelu)
register_activation("transformers.activations.GELUTanh", lambda module: "gelu_tanh")
register_activation("transformers.activations.NewGELUActivation", lambda module: "gelu_tanh")
register_activation("transformers.activations.SiLUActivation", lambda module: "silu")
