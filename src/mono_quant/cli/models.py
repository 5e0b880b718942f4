"""Turns the arguments of the command line into models and inputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mono_quant.errors import InputError
from mono_quant.io import LayerRecord, find_header, load_model, load_source
from mono_quant.report import Inputs, example_inputs, load_inputs

#: A module to load tensors into, or the transformers directory that describes one.
Architecture = nn.Module | Path


@dataclass(frozen=True)
class LoadedModel:
    """A model argument, loaded.

    Attributes:
        argument: As typed.
        model: A module, or the tensors of a file without an architecture.
        inputs: Example inputs that a factory answered beside the module, or ``None``.
        records: What the header says of each quantized layer, if the argument is a checkpoint of this library.
    """

    argument: str
    model: nn.Module | dict[str, Tensor]
    inputs: Inputs | None = None
    records: Mapping[str, LayerRecord] | None = None


def is_factory(argument: str) -> bool:
    """Answer whether an argument is ``package.module:factory`` rather than a path."""
    return ":" in argument and not Path(argument).exists()


def load(argument: str, architecture: Architecture | None = None, allow_pickle: bool = False) -> LoadedModel:
    """Load a model argument.

    Args:
        argument: A transformers directory, a file of tensors, a checkpoint, or ``package.module:factory``.
        architecture: What to load the tensors of a file into; without it they stay tensors.
        allow_pickle: Whether a ``.pt`` file may be unpickled, which can run code.

    Raises:
        InputError: There is no such thing, or the factory fails.
        CheckpointError: The file cannot be read, or does not fit the architecture.
    """
    if is_factory(argument):
        module, inputs = _module_from_factory(argument)
        return LoadedModel(argument, module, inputs)
    path = existing_path(argument)
    header = find_header(path, allow_pickle)
    records = None if header is None else header.layers
    if path.is_dir():
        return LoadedModel(argument, _evaluating(load_model(path) if records else load_source(path)), records=records)
    if architecture is not None:
        loaded = load_model(path, architecture, allow_pickle=allow_pickle)
        return LoadedModel(argument, _evaluating(loaded), records=records)
    read = load_model if records else load_source
    return LoadedModel(argument, _evaluating(read(path, allow_pickle=allow_pickle)), records=records)


def load_pair(
    original: str, quantized: str, architecture: str | None, allow_pickle: bool
) -> tuple[LoadedModel, LoadedModel]:
    """Load an original and its quantized model; a file of tensors takes over the original's architecture.

    Args:
        original: A model argument.
        quantized: Another.
        architecture: What to load files of tensors into, a factory or a transformers directory.
        allow_pickle: Whether ``.pt`` files may be unpickled, which can run code.

    Raises:
        InputError, CheckpointError: As :func:`load`.
    """
    module: Architecture | None
    if architecture is not None and is_factory(architecture):
        module, inputs = _module_from_factory(architecture)
    else:
        module, inputs = load_architecture(architecture), None
    # Loading leaves the architecture as it is, so that one serves both.
    first = load(original, module, allow_pickle)
    second = load(quantized, module or architecture_of(original), allow_pickle)
    return (first if first.inputs is not None else replace(first, inputs=inputs)), second


def call_loader(argument: str) -> Any:
    """Answer what ``package.module:loader`` answers.

    Raises:
        InputError: It cannot be imported, or raises.
    """
    return _call(argument, "the loader")


def existing_path(argument: str) -> Path:
    """Answer the path that an argument names.

    Raises:
        InputError: There is nothing.
    """
    path = Path(argument)
    if not path.exists():
        raise InputError(
            f"there is no file or directory {argument!r}",
            suggestion="Check the path; a factory is written package.module:factory.",
        )
    return path


def load_architecture(argument: str | None) -> Architecture | None:
    """Answer what ``--architecture`` names, a factory or a transformers directory; ``None`` without an argument.

    Raises:
        InputError: It is neither, or the factory fails.
    """
    if argument is None:
        return None
    if is_factory(argument):
        return _module_from_factory(argument)[0]
    path = existing_path(argument)
    if not path.is_dir():
        raise InputError(f"{argument} is a file; an architecture is package.module:factory or a transformers directory")
    return path


def architecture_of(argument: str) -> Architecture | None:
    """Answer the architecture of a model argument that has one: a new module of its factory, or its directory."""
    return load_architecture(argument) if is_factory(argument) or Path(argument).is_dir() else None


def choose_inputs(option: str | None, models: list[LoadedModel], batch: int, length: int) -> Inputs | None:
    """Answer inputs for models: those asked for, else those of a factory, else made for a transformers model.

    Args:
        option: A ``.safetensors`` or ``.npy`` file, or ``package.module:loader``.
        models: The models that they are for.
        batch: Rows of inputs that are made.
        length: Tokens in each.

    Returns:
        ``None`` where there is no module to run or nothing to run it on.

    Raises:
        InputError: The file or loader fails, or a model has no architecture to run.
    """
    tensors_only = [loaded.argument for loaded in models if not isinstance(loaded.model, nn.Module)]
    if option is not None:
        if tensors_only:
            raise InputError(
                f"{tensors_only[0]} holds tensors without an architecture and cannot run on inputs",
                suggestion="Give --architecture package.module:factory.",
            )
        if not is_factory(option):
            return load_inputs(option)
        answer: Inputs = call_loader(option)
        return answer
    if tensors_only:
        return None
    for loaded in models:
        if loaded.inputs is not None:
            return loaded.inputs
    first = models[0].model
    if hasattr(first, "config") and hasattr(first, "main_input_name"):
        assert isinstance(first, nn.Module)
        return example_inputs(first, batch, length)
    return None


def _module_from_factory(argument: str) -> tuple[nn.Module, Any]:
    answer = _call(argument, "the factory")
    inputs = None
    if isinstance(answer, tuple) and len(answer) == 2:
        answer, inputs = answer
    if not isinstance(answer, nn.Module):
        raise InputError(
            f"the factory {argument!r} answered something of type {type(answer).__name__}; expected a torch.nn.Module, "
            "or a module and example inputs"
        )
    return answer.eval(), inputs


def find_object(argument: str, what: str) -> Any:
    """Answer what stands under a name of the form ``package.module:name``.

    Raises:
        InputError: It cannot be imported or is not there; names it and the cause.
    """
    module_name, _, attribute = argument.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{argument!r} is not of the form package.module:factory")
    with _importing_from_current_directory():
        try:
            found: Any = importlib.import_module(module_name)
            for name in attribute.split("."):
                found = getattr(found, name)
        except ModuleNotFoundError as error:
            raise InputError(
                f"cannot import {module_name!r} for {what} {argument!r}: {error}",
                suggestion="Install it, or run in the directory that holds it.",
            ) from error
        except AttributeError as error:
            raise InputError(f"cannot find {what} {argument!r}: {error}") from error
        # Foreign code: whatever it does, and be it sys.exit() on import, is not for this command to mend.
        except (Exception, SystemExit) as error:
            raise InputError(f"importing {what} {argument!r} raised {type(error).__name__}: {error}") from error
    return found


def _call(argument: str, what: str) -> Any:
    """Answer what ``package.module:factory`` answers; a module may also stand there itself.

    Raises:
        InputError: It cannot be imported, is not there, cannot be called, or raises; names it and the cause.
    """
    found = find_object(argument, what)
    with _importing_from_current_directory():
        try:
            return found if isinstance(found, nn.Module) else found()
        except (Exception, SystemExit) as error:
            raise InputError(f"{what} {argument!r} raised {type(error).__name__}: {error}") from error


@contextmanager
def _importing_from_current_directory() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _evaluating(model: nn.Module | dict[str, Tensor]) -> nn.Module | dict[str, Tensor]:
    return model.eval() if isinstance(model, nn.Module) else model


__all__ = [
    "Architecture",
    "LoadedModel",
    "architecture_of",
    "call_loader",
    "choose_inputs",
    "existing_path",
    "find_object",
    "is_factory",
    "load",
    "load_architecture",
    "load_pair",
]
