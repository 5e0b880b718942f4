"""transformers' models and directories; the library is imported when one is met, and never reaches for the network."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant.core.layer_scheme import INT8_DYNAMIC, WEIGHT_ONLY, LayerScheme
from mono_quant.errors import CheckpointError, ConfigurationError, InputError
from mono_quant.integrations.conv1d import QuantizedConv1D
from mono_quant.locks import ForkSafeLock
from mono_quant.modules import QuantizedEmbedding, QuantizedLinear, QuantizedModule, WeightOnlyLinear

_CONFIG: Final = "config.json"
_PRETRAINED: Final = "transformers.modeling_utils.PreTrainedModel"
# While transformers loads a model it changes global state, such as torch's initialisers.
_loading = ForkSafeLock()


def is_transformers_directory(path: str | Path) -> bool:
    """Say whether ``path`` is a directory with a ``config.json`` that names a kind of model."""
    file = Path(path) / _CONFIG
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Meant to be one: loading it will say what is wrong.
        return True
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def is_transformers_model(model: nn.Module) -> bool:
    """Say whether ``model`` is one of transformers' models, without importing the library."""
    return any(f"{base.__module__}.{base.__qualname__}" == _PRETRAINED for base in type(model).__mro__)


def load_transformers(path: str | Path) -> nn.Module:
    """Load a float model from a directory, in evaluation mode and in the dtype that it is stored in.

    The class is the first of ``architectures`` in ``config.json``. Weights may lie in several files with an index.
    Weights that the directory lacks are initialised at random by transformers; one warning names them.

    Raises:
        CheckpointError: The directory cannot be loaded.
        InputError: transformers is not installed, or the model is quantized already.
    """
    directory = Path(path)
    config = _read_config(directory)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"{directory} holds a model that is quantized already (quant_method {method!r})",
            suggestion="If mono_quant saved it, use load_model(); to quantize, use the float model.",
        )
    model_class = _model_class(directory, config)
    with _loading, _without_progress_bar():
        try:
            model, report = model_class.from_pretrained(
                str(directory), local_files_only=True, dtype="auto", output_loading_info=True
            )
        except Exception as error:
            raise _cannot_load(directory, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        warnings.warn(f"{directory} has no weights for {', '.join(missing)}: they are random", stacklevel=2)
    loaded: nn.Module = model.eval()
    return loaded


def empty_transformers(path: str | Path) -> nn.Module:
    """Answer the architecture of a directory in evaluation mode; its weights are not read and hold arbitrary numbers.

    Buffers that no checkpoint holds are computed, which is why this is not on the ``meta`` device.

    Raises:
        CheckpointError: ``config.json`` does not describe a model.
        InputError: transformers is not installed.
    """
    directory = Path(path)
    model_class = _model_class(directory, _read_config(directory))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        if hasattr(config, "quantization_config"):
            # It describes the file; the model says itself what is quantized, and saving it describes that anew.
            del config.quantization_config
        with _WithoutRandomNumbers():  # type: ignore[no-untyped-call]
            model: nn.Module = model_class(config)
    except Exception as error:
        raise _cannot_load(directory, error) from error
    return model.eval()


def model_config(model: nn.Module) -> dict[str, Any]:
    """Answer what belongs into ``config.json`` of a transformers model, without its quantization."""
    source: Any = model.config
    config: dict[str, Any] = json.loads(source.to_json_string())
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    dtype = _compute_dtype(model)
    if dtype is not None:
        # Older versions of transformers read the other name.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    return config


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """Describe a quantized transformers model in the terms of compressed-tensors.

    Layers of one type and scheme form a group. Linear layers that compute in integers quantize their inputs per
    token, asymmetrically; embeddings and packed layers leave theirs alone. Float16 weights are plain weights there.

    Args:
        model: A model whose quantized layers are linear layers and embeddings.

    Returns:
        The ``quantization_config`` of ``config.json``; ``None`` if no layer is quantized.

    Raises:
        ConfigurationError: A quantized layer has no place in that layout; named.
    """
    groups: dict[tuple[str, LayerScheme], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and not module.scheme.stores_floats:
            groups.setdefault((_target(name, module), module.scheme), []).append(name)
    if not groups:
        return None
    types = [target for target, _ in groups]
    described = {
        f"group_{index}": _group(target, scheme, names if types.count(target) > 1 else [target])
        for index, ((target, scheme), names) in enumerate(groups.items())
    }
    formats = {group["format"] for group in described.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": described,
        "ignore": _float_layers(model),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _target(name: str, module: QuantizedModule) -> str:
    kind = type(module)
    if kind in (QuantizedLinear, WeightOnlyLinear):
        return "Linear"
    if kind is QuantizedEmbedding:
        return "Embedding"
    found = "transformers' Conv1D" if isinstance(module, QuantizedConv1D) else module.float_type.__name__
    raise ConfigurationError(
        f"layer {name!r} is a quantized {found}; a directory in compressed-tensors' layout holds Linear and Embedding",
        suggestion="Save to a .safetensors file, or leave such layers in float with skip=.",
    )


def _group(target: str, scheme: LayerScheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = None
    if target == "Linear" and scheme.kind == INT8_DYNAMIC:
        activations = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": "pack-quantized" if scheme.kind == WEIGHT_ONLY else "int-quantized",
    }


def _float_layers(model: nn.Module) -> list[str]:
    """Answer the layers whose weight, of channels by something, is a plain one."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            if module.scheme.stores_floats:
                names.append(name)
            continue
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1:
            names.append(name)
    return names


def _compute_dtype(model: nn.Module) -> torch.dtype | None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            return module.float_dtype
    return None


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / _CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", suggestion="Copy or download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, expected an object")
    return config


def _model_class(directory: Path, config: dict[str, Any]) -> Any:
    """Answer the class that ``config.json`` names.

    Raises:
        CheckpointError: It names none that transformers has.
        InputError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{directory} is a transformers model, and transformers is not installed",
            suggestion="pip install 'mono-quant[transformers]'",
        ) from error
    architectures = config.get("architectures") or []
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None:
        raise CheckpointError(
            f"{directory / _CONFIG} names the architecture {name!r}, which transformers {transformers.__version__} "
            "does not have",
            suggestion="Install the version of transformers that the model was made for, or build the model yourself.",
        )
    return model_class


def _cannot_load(directory: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"transformers cannot load {directory}: {reason}",
        suggestion="Check that the directory is complete: config.json and all weight files.",
    )


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers import utils

    logging: Any = utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _WithoutRandomNumbers(TorchDispatchMode):
    """Leaves tensors as they are where they would be filled at random, for weights that will be replaced anyway.

    Memory that nobody writes to is never really taken. The mode is the thread's own, unlike patched initialisers.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))
