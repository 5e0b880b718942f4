"""How far two tensors are apart, and how large a model is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.core import QuantizedTensor
from mono_quant.errors import InputError, InputTypeError
from mono_quant.graph.layers.packed import PackedLayer
from mono_quant.modules import QuantizedModule

# Sums run in float64 over pieces of this many elements, so that a large tensor is never doubled.
_CHUNK_ELEMENTS = 1 << 18
_NEIGHBOUR_ROWS = 256


def sqnr_db(reference: Tensor, approximation: Tensor | QuantizedTensor) -> float:
    """Answer the signal-to-quantization-noise ratio ``10 log10(sum(r**2) / sum((r - a)**2))``.

    Args:
        reference: The exact values, any shape and real dtype.
        approximation: Of the same shape; a quantized tensor is dequantized first.

    Returns:
        Decibels: infinity where the two agree, minus infinity where a zero reference is missed or a finite value
        became infinite, NaN where either holds NaN. Infinities that agree (masked logits) count for nothing.

    Raises:
        InputTypeError: Either is not a tensor.
        InputError: The shapes differ.
    """
    first, second = _pair(reference, approximation)
    # A common factor leaves the ratio alone and keeps the squares of float64 values within its range.
    return decibels(*_energies(first, second, _peak(first)))


#: The name that mono-quant 1.1 gives :func:`sqnr_db`.
calculate_sqnr = sqnr_db


def error_energy(reference: Tensor, approximation: Tensor | QuantizedTensor) -> tuple[float, float]:
    """Answer the sum of squares of ``reference`` and of its difference to ``approximation``, both in float64.

    Sums of several tensors may be added before :func:`decibels` makes them one ratio.

    Raises:
        InputTypeError: Either is not a tensor.
        InputError: The shapes differ.
    """
    return _energies(*_pair(reference, approximation), 1.0)


def decibels(signal: float, noise: float) -> float:
    """Answer ``10 log10(signal / noise)``; infinity without noise, minus infinity without a signal."""
    if math.isnan(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    if signal == 0.0 or math.isinf(noise):
        return -math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise))


def cosine_similarity(reference: Tensor, approximation: Tensor | QuantizedTensor) -> float:
    """Answer the cosine of the angle between two tensors, each taken as one long vector.

    Returns:
        A number in [-1, 1]: 1 where both are zero (or empty), 0 where only one is, NaN where either is not finite.

    Raises:
        InputTypeError: Either is not a tensor.
        InputError: The shapes differ.
    """
    first, second = _pair(reference, approximation)
    first_peak, second_peak = _peak(first), _peak(second)
    product = first_energy = second_energy = 0.0
    for a, b in _chunks(first, second):
        a, b = a / first_peak, b / second_peak
        product += float(torch.dot(a, b))
        first_energy += float(torch.dot(a, a))
        second_energy += float(torch.dot(b, b))
    if first_energy == 0.0 or second_energy == 0.0:
        return 1.0 if first_energy == second_energy else 0.0
    cosine = product / math.sqrt(first_energy) / math.sqrt(second_energy)
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def max_abs_error(reference: Tensor, approximation: Tensor | QuantizedTensor) -> float:
    """Answer the largest absolute difference of two elements; 0 where the tensors are empty, NaN where one is NaN.

    Raises:
        InputTypeError: Either is not a tensor.
        InputError: The shapes differ.
    """
    first, second = _pair(reference, approximation)
    largest = 0.0
    for exact, other in _chunks(first, second):
        difference = float(torch.where(exact == other, 0.0, exact - other).abs().max())
        # max() would let a later number win over NaN.
        largest = difference if math.isnan(difference) or difference > largest else largest
        if math.isnan(largest):
            break
    return largest


def nearest_neighbour_agreement(reference: Tensor, approximation: Tensor, k: int = 10) -> float:
    """Answer how many of each row's nearest neighbours stay the same, as the mean share of ``k``.

    Neighbours are the other rows of the same matrix with the largest cosine; a row is not its own neighbour.

    Args:
        reference: Floating point ``[n, d]``, for example sentence embeddings of the float model.
        approximation: Floating point ``[n, d']`` of the quantized model, the same rows in the same order.
        k: Neighbours that are looked at, fewer than ``n``.

    Returns:
        A number in [0, 1], or NaN where either matrix is not finite.

    Raises:
        InputError: The matrices do not have the same number of rows, or ``k`` is not in [1, n - 1].
    """
    if reference.dim() != 2 or approximation.dim() != 2 or len(reference) != len(approximation):
        raise InputError(
            f"expected two matrices with one row for each item, found shapes {tuple(reference.shape)} and "
            f"{tuple(approximation.shape)}"
        )
    rows = len(reference)
    if not 1 <= k < rows:
        raise InputError(f"k={k} neighbours cannot be chosen among the {max(0, rows - 1)} other rows")
    first, second = (F.normalize(matrix.detach().double(), dim=1) for matrix in (reference, approximation))
    if not bool(first.isfinite().all() and second.isfinite().all()):
        return math.nan
    common = 0
    for start in range(0, rows, _NEIGHBOUR_ROWS):
        here = torch.arange(start, min(start + _NEIGHBOUR_ROWS, rows), device=first.device)
        chosen = torch.zeros(2, len(here), rows, dtype=torch.bool, device=first.device)
        for mark, matrix in zip(chosen, (first, second.to(first.device)), strict=True):
            cosines = matrix[here] @ matrix.T
            cosines[torch.arange(len(here)), here] = -math.inf
            mark.scatter_(1, cosines.topk(k, dim=1).indices, True)
        common += int((chosen[0] & chosen[1]).sum())
    return common / (rows * k)


def model_bytes(model: nn.Module | Mapping[str, Tensor]) -> int:
    """Answer the bytes of all parameters and buffers of a model, or of all tensors of a state dict.

    A tensor that several names share counts once. Quantized layers count what they store: layouts that kernels make
    for themselves do not count.

    Raises:
        InputTypeError: ``model`` is neither a module nor a mapping.
    """
    sizes: dict[tuple[object, ...], int] = {}
    for key, tensor in _stored_tensors(model):
        sizes[key] = _nbytes(tensor)
    return sum(sizes.values())


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    # The other layouts do not tell what they store.
    return tensor.nbytes if tensor.layout == torch.strided else tensor.numel() * tensor.element_size()


def calculate_model_size(model: nn.Module | Mapping[str, Tensor]) -> tuple[float, int]:
    """Answer a model's size in MiB (see :func:`model_bytes`) and its number of parameters.

    The weights and biases of quantized layers count as the parameters that they stand for; tied ones count once. A
    state dict does not tell parameters from buffers: all its elements count, but no scales, zero points and shapes of
    quantized weights.

    Raises:
        InputTypeError: ``model`` is neither a module nor a mapping.
    """
    size = model_bytes(model) / 2**20
    counted: dict[tuple[object, ...], int] = {}
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            prefix, _, local = name.rpartition("weight_")
            if local == "packed" and f"{prefix}weight_shape" in model:
                counted[memory_key(tensor)] = math.prod(model[f"{prefix}weight_shape"].tolist())
            elif local not in ("scale", "zero_point", "shape"):
                counted[memory_key(tensor)] = tensor.numel()
        return size, sum(counted.values())
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not is_lazy(parameter):
                counted[memory_key(parameter)] = parameter.numel()
        if isinstance(module, PackedLayer):
            counted[id(module), "weight"] = module.codes.numel()
            counted[id(module), "bias"] = 0 if module.bias is None else module.bias.numel()  # type: ignore[operator]
        if isinstance(module, QuantizedModule):
            shape = getattr(module, "weight_shape", module.codes.shape)
            counted[weight_memory(module)] = math.prod(shape)
            if isinstance(module.bias, Tensor):
                counted[memory_key(module.bias)] = module.bias.numel()
    return size, sum(counted.values())


def memory_key(tensor: Tensor) -> tuple[object, ...]:
    """Answer what two tensors have in common exactly if they are one and the same memory."""
    if tensor.device.type == "meta" or tensor.numel() == 0 or tensor.layout != torch.strided:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.nbytes)


def weight_memory(layer: QuantizedModule) -> tuple[object, ...]:
    """Answer what two quantized layers have in common exactly if they hold one weight together.

    A layer whose codes are in a kernel's layout rebuilds them at each reading, and never shares them.
    """
    for name in ("weight", "weight_packed"):
        stored = layer._buffers.get(name)
        if stored is not None:
            return memory_key(stored)
    return (id(layer),)


def _stored_tensors(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[tuple[object, ...], Tensor]]:
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            if not isinstance(tensor, Tensor):
                raise InputTypeError(f"the state dict holds a {type(tensor).__name__} at {name!r}; expected tensors")
            yield memory_key(tensor), tensor
        return
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module or a state dict, found {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, PackedLayer):
            yield from ((memory_key(tensor), tensor) for tensor in _plain_tensors(module))
            continue
        for parameter in module.parameters(recurse=False):
            # The shape of a lazy parameter is not known before the first call.
            if not is_lazy(parameter):
                yield memory_key(parameter), parameter
        quantized = isinstance(module, QuantizedModule)
        if isinstance(module, QuantizedModule):
            yield weight_memory(module), module.codes
        for name, buffer in module.named_buffers(recurse=False):
            if not is_lazy(buffer) and not (quantized and name in module._non_persistent_buffers_set):
                yield memory_key(buffer), buffer


def _plain_tensors(layer: PackedLayer) -> list[Tensor]:
    """Answer what a layer of a static graph stores, whatever layout its kernel has made of it."""
    return list(layer.state_dict().values())


def _pair(reference: Tensor, approximation: Tensor | QuantizedTensor) -> tuple[Tensor, Tensor]:
    pair = []
    for tensor in (reference, approximation):
        if not isinstance(tensor, Tensor | QuantizedTensor):
            raise InputTypeError(f"expected a tensor, found {type(tensor).__name__}")
        plain = tensor.dequantize() if isinstance(tensor, QuantizedTensor) or tensor.is_quantized else tensor
        pair.append(plain.detach())
    first, second = pair
    if first.shape != second.shape:
        raise InputError(f"cannot compare tensors of shapes {tuple(first.shape)} and {tuple(second.shape)}")
    return first, second.to(first.device)


def _energies(reference: Tensor, approximation: Tensor, unit: float) -> tuple[float, float]:
    signal = noise = 0.0
    for exact, other in _chunks(reference, approximation):
        signal += float(torch.where(exact.isinf(), 0.0, exact / unit).square().sum())
        noise += float(torch.where(exact == other, 0.0, (exact - other) / unit).square().sum())
    return signal, noise


def _peak(tensor: Tensor) -> float:
    """Answer the largest finite magnitude, or 1 where there is none."""
    peak = 0.0
    for (part,) in _chunks(tensor):
        magnitude = part.abs()
        peak = max(peak, float(torch.where(magnitude.isfinite(), magnitude, 0.0).max()))
    return peak or 1.0


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _CHUNK_ELEMENTS):
        yield tuple(tensor[start : start + _CHUNK_ELEMENTS].double() for tensor in flat)


__all__ = [
    "calculate_model_size",
    "calculate_sqnr",
    "cosine_similarity",
    "decibels",
    "error_energy",
    "max_abs_error",
    "memory_key",
    "model_bytes",
    "nearest_neighbour_agreement",
    "sqnr_db",
    "weight_memory",
]
