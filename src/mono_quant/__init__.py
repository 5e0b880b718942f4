"""mono_quant makes a PyTorch model smaller and faster with one call, and proves that it still works."""

from mono_quant._version import __version__

__all__ = ["__version__"]
