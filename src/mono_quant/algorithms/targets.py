"""A layer as the algorithms see it: a weight matrix and the rows that it is multiplied with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant.core.layer_scheme import WEIGHT_ONLY, LayerScheme
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.modules import QuantizedModule, counterpart_for_scheme

# Elements of the rows of a convolution that are unfolded at a time.
_UNFOLD_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Target:
    """A layer to quantize.

    Attributes:
        name: Its name in the model.
        module: The float layer.
        scheme: An integer scheme.
        quantized_type: What it becomes.
    """

    name: str
    module: nn.Module
    scheme: LayerScheme
    quantized_type: type[QuantizedModule]

    @property
    def weight(self) -> Tensor:
        """The weight, output channels first, as the quantized layer stores it."""
        return self.quantized_type.stored_weight(self.module)

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix ``[out, in]``."""
        return self.weight.flatten(1)

    def rows(self, tensor: Tensor) -> Iterator[Tensor]:
        """Answer an input of the layer as float32 rows ``[n, in]`` that the matrix is multiplied with, in pieces."""
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            yield from _unfolded(self.module, tensor)
        else:
            yield tensor.detach().reshape(-1, tensor.shape[-1]).float()

    def why_data_free(self) -> str | None:
        """Say why the layer's inputs cannot be described by rows; ``None`` if they can."""
        if isinstance(self.module, nn.Embedding | nn.EmbeddingBag):
            return "an embedding has no inputs to multiply with"
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            return "its channels are grouped" if self.module.groups > 1 else None
        return None if self.weight.dim() == 2 else f"its weight has {self.weight.dim()} dimensions"

    def replacement(self, quantized: QuantizedTensor) -> nn.Module:
        """Answer a layer that computes what the quantized one will.

        Weight-only layers compute in float: products with the dequantized weight give the same numbers.
        """
        if self.scheme.kind == WEIGHT_ONLY:
            return Dequantizing(quantized, self.module)
        return self.quantized_type.from_float(self.module, self.scheme, quantized).eval()


class Dequantizing(nn.Module):
    """Multiplies with a quantized weight that is float only while it is being used.

    A model under calibration would hold a second float model if its layers were replaced by float ones, and the
    kernels for packed weights are made for few rows.
    """

    def __init__(self, quantized: QuantizedTensor, like: nn.Module) -> None:
        super().__init__()
        self._quantized = quantized
        # The bias may still be corrected: it is read from the layer at each call.
        self._like = [like]
        self._keeps = True
        self._weight: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight = self._weight
        if weight is None or weight.dtype != input.dtype:
            weight = self._quantized.dequantize(input.dtype)
        self._weight = weight if self._keeps else None
        return F.linear(input, weight, self._like[0]._parameters.get("bias"))

    def release(self) -> None:
        """Keep the float weight no longer: all batches have passed, and others are rare."""
        self._keeps, self._weight = False, None


def find_targets(model: nn.Module, schemes: Mapping[str, LayerScheme]) -> dict[str, Target]:
    """Answer the layers that ``schemes`` name and that get integer codes, in the model's order.

    Raises:
        ConfigurationError: A name is not in the model, or its layer has no counterpart for the scheme.
    """
    modules = dict(model.named_modules())
    for name, scheme in schemes.items():
        if name not in modules:
            raise ConfigurationError(f"the model has no layer named {name!r}")
        if counterpart_for_scheme(modules[name], scheme) is None:
            raise ConfigurationError(f"layer {name!r} ({type(modules[name]).__name__}) cannot be stored as {scheme}")
    targets = {}
    for name, module in modules.items():
        if name not in schemes or schemes[name].stores_floats:
            continue
        scheme = schemes[name]
        quantized_type = counterpart_for_scheme(module, scheme)
        assert quantized_type is not None
        targets[name] = Target(name, module, scheme, quantized_type)
    return targets


def second_moments(target: Target, inputs: list[Tensor]) -> Tensor:
    """Answer the mean of ``x x'`` over the rows ``x`` of a layer's inputs, float32 ``[in, in]``.

    Raises:
        InputError: The inputs do not fit the layer's matrix.
    """
    width = target.matrix.shape[1]
    total = torch.zeros(width, width, device=target.weight.device)
    count = 0
    for tensor in inputs:
        for rows in target.rows(tensor):
            if rows.shape[1] != width:
                raise InputError(
                    f"layer {target.name!r}: calibration leads to inputs of {rows.shape[1]} features, its weight has "
                    f"{width}",
                    suggestion="Check the shape of the calibration data: the model would fail on it.",
                )
            total.addmm_(rows.t(), rows)
            count += len(rows)
    return total.div_(max(1, count))


def _unfolded(module: nn.Conv1d | nn.Conv2d, tensor: Tensor) -> Iterator[Tensor]:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    spatial = tensor.dim() - (2 if tensor.dim() > len(module.kernel_size) + 1 else 1)
    batch = (tensor if spatial + 2 == tensor.dim() else tensor.unsqueeze(0)).detach().float()
    padded = F.pad(batch, module._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if spatial == 1:
        # unfold() knows images only: a sequence is one of height 1.
        padded, kernel, dilation, stride = padded.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    taps = padded.shape[1] * kernel[0] * kernel[1]
    positions = max(1, padded.shape[2] // stride[0]) * max(1, padded.shape[3] // stride[1])
    step = max(1, _UNFOLD_ELEMENTS // max(1, taps * positions))
    for piece in padded.split(step):
        columns = F.unfold(piece, kernel, dilation=dilation, stride=stride)
        yield columns.transpose(1, 2).reshape(-1, taps)
