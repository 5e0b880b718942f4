"""Layers and file layouts of other ecosystems; each library is imported only when it is used."""

from mono_quant.integrations import activations as activations  # registers what linear layers can compute
from mono_quant.integrations import decoders as decoders  # these two register what runs as one operator
from mono_quant.integrations import encoders as encoders
from mono_quant.integrations.conv1d import QuantizedConv1D

__all__ = ["QuantizedConv1D"]
