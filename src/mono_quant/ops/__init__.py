"""The operators (``torch.ops.mono_quant.*``): schema, shape function, specification, and the choice of backend."""

from mono_quant.ops.backend import (
    available_backends,
    choose_default_backend,
    get_backend,
    set_backend,
    use_backend,
)
from mono_quant.ops.library import NAMESPACE, SCHEMAS
from mono_quant.ops.reference import ACTIVATIONS
from mono_quant.ops.system import SystemConfig, show_config, system_config

choose_default_backend()

__all__ = [
    "ACTIVATIONS",
    "NAMESPACE",
    "SCHEMAS",
    "SystemConfig",
    "available_backends",
    "choose_default_backend",
    "get_backend",
    "set_backend",
    "show_config",
    "system_config",
    "use_backend",
]
