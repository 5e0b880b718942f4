"""Runs models on given inputs and takes their outputs apart into named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.errors import InputError, InputTypeError, MonoQuantError
from mono_quant.report.metrics import cosine_similarity, max_abs_error, sqnr_db

#: A tensor, a tuple of positional or a mapping of keyword arguments, or a callable that runs the model it is given.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any]


@dataclass(frozen=True)
class OutputError:
    """How far one output tensor of the quantized model is from the original's.

    Attributes:
        name: ``output`` for a bare tensor, else its key or position, such as ``last_hidden_state`` or ``[0]``.
        shape: The tensor's shape.
        sqnr_db: Signal-to-noise ratio in decibels.
        cosine: Cosine similarity of the whole tensor.
        max_abs_error: Largest absolute difference.
        finite: Whether the quantized model's tensor is finite wherever the original's is.
    """

    name: str
    shape: tuple[int, ...]
    sqnr_db: float
    cosine: float
    max_abs_error: float
    finite: bool


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode without gradients, and each module back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """Answer what ``model`` makes of ``inputs``.

    Raises:
        InputTypeError: ``inputs`` is not one of the forms of :data:`Inputs`.
        InputError: The model raised an error, which is the cause of this one.
    """
    try:
        if isinstance(inputs, Tensor):
            return model(inputs)
        if isinstance(inputs, tuple):
            return model(*inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if callable(inputs):
            return inputs(model)
    except MonoQuantError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot run on these inputs: {type(error).__name__}: {error}"
        ) from error
    raise InputTypeError(
        f"the inputs have the type {type(inputs).__name__}; expected a tensor, a tuple of positional arguments, "
        "a dict of keyword arguments, or a function that takes the model and answers its output"
    )


def require_modules(original: object, quantized: object) -> tuple[nn.Module, nn.Module]:
    """Answer two models that can run.

    Raises:
        InputTypeError: Either is a state dict.
    """
    if isinstance(original, nn.Module) and isinstance(quantized, nn.Module):
        return original, quantized
    raise InputTypeError(
        "inputs need two modules: a state dict cannot run",
        suggestion="Load the checkpoint into its architecture: load_model(path, model).",
    )


def named_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """Answer the tensors inside a model's output under names; whatever else is inside is left out.

    Tensors, tuples, lists, mappings (transformers' ``ModelOutput`` is one) and dataclasses are looked into.
    """
    if isinstance(output, Tensor):
        return {name or "output": output}
    items: list[tuple[str, Any]] = []
    if isinstance(output, Mapping):
        items = [(f"{name}.{key}" if name else str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple | list):
        items = [(f"{name}[{position}]", value) for position, value in enumerate(output)]
    elif is_dataclass(output) and not isinstance(output, type):
        pairs = [(field.name, getattr(output, field.name, None)) for field in fields(output)]
        items = [(f"{name}.{key}" if name else key, value) for key, value in pairs]
    return {inner: tensor for key, value in items for inner, tensor in named_tensors(value, key).items()}


def compare_outputs(reference: Any, approximation: Any) -> tuple[OutputError, ...]:
    """Answer the error of each tensor in a model's output.

    Args:
        reference: The original model's output.
        approximation: The quantized model's output, of the same structure.

    Raises:
        InputError: There is no tensor in the output, or the two hold different tensors or shapes.
    """
    first, second = named_tensors(reference), named_tensors(approximation)
    if not first:
        raise InputError(f"the original model's output ({type(reference).__name__}) holds no tensor to compare")
    if first.keys() != second.keys():
        raise InputError(f"the models answer different tensors: {sorted(first.keys())} against {sorted(second.keys())}")
    errors = []
    for name, exact in first.items():
        other = second[name]
        if exact.shape != other.shape:
            raise InputError(
                f"output {name!r} has shape {tuple(exact.shape)}, the quantized model's has {tuple(other.shape)}"
            )
        finite = bool((other.isfinite() | ~exact.isfinite()).all())
        errors.append(
            OutputError(
                name=name,
                shape=tuple(exact.shape),
                sqnr_db=sqnr_db(exact, other),
                cosine=cosine_similarity(exact, other),
                max_abs_error=max_abs_error(exact, other),
                finite=finite,
            )
        )
    return tuple(errors)


__all__ = ["Inputs", "OutputError", "compare_outputs", "inference", "named_tensors", "require_modules", "run_model"]
