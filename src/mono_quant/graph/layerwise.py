"""Static layers inside the model as it is, for models that cannot be captured as a graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final, Self, cast

import torch
from torch import Tensor, nn

from mono_quant.calibration import Batch, Observer, call_model, create_observer, evaluating, watching
from mono_quant.core import QuantizedTensor
from mono_quant.core.mappers import QUINT8
from mono_quant.errors import CheckpointError, InputError, MonoQuantError
from mono_quant.graph import build
from mono_quant.graph.arithmetic import QParams
from mono_quant.graph.float_layers import FloatConv, FloatLayer, FloatLinear
from mono_quant.graph.layers import KINDS, Layer
from mono_quant.graph.layers.checks import require_sound
from mono_quant.graph.layers.conv import ConvSpec, QuantizedConvolution
from mono_quant.graph.layers.elementwise import OutputSpec, Quantize
from mono_quant.graph.layers.layer import build_layer, report_lost_gradients
from mono_quant.graph.layers.linear import StaticLinear
from mono_quant.graph.observe import ChannelMean
from mono_quant.graph.options import StaticOptions, StaticReport
from mono_quant.modules import REPLACED_FORWARD, has_own_forward

# By exact type: a subclass may do something else with its weight.
_TYPES: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# What models read of their layers beside the tensors.
_GEOMETRY: Final = (
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
    "groups", "padding_mode", "transposed", "output_padding",
)  # fmt: skip


class StaticLayer(nn.Module):
    """Stands in for one float layer: quantizes the input with a fixed scale, computes in 8 bits, answers floats.

    It has the float layer's attributes, hooks, and its ``weight`` as it reads after rounding. Gradients end here.

    Args:
        layer: The 8-bit layer, which answers float32.
        scale: Scale and zero point of the input.
        dims: Dimensions of an input with a batch; one less is a single sample. ``None`` if any number will do.
    """

    def __init__(self, layer: Layer, scale: QParams, dims: int | None) -> None:
        super().__init__()
        self.quantize = Quantize(OutputSpec(scale))
        self.layer = layer
        self.dims = dims
        self.float_dtype = torch.float32

    def stand_in_for(self, module: nn.Module) -> Self:
        """Take over a float layer's attributes, hooks and dtype; answer the layer itself."""
        for name in _GEOMETRY:
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        for name, hooks in vars(module).items():
            if name.startswith("_forward_") and "hooks" in name and hooks:
                getattr(self, name).update(hooks)
        weight = getattr(module, "weight", None)
        self.float_dtype = weight.dtype if isinstance(weight, Tensor) else self.float_dtype
        return self

    @property
    def codes(self) -> QuantizedTensor:
        """The stored weight, output channels first."""
        layer: Any = self.layer
        return QuantizedTensor(layer.codes, layer.weight_scale, None, axis=0)

    @property
    def weight(self) -> Tensor:
        """The weight in the float layer's dtype, computed at each reading."""
        return self.codes.dequantize(self.float_dtype)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return None if bias is None else bias.to(self.float_dtype)

    def to_float(self) -> nn.Module:
        """Answer a standard layer with the rounded weight and the bias; this one is not modified."""
        weight, bias, spec = self.weight, self.bias, self.layer.spec
        outputs, inputs, *kernel = weight.shape
        float_layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        if isinstance(spec, ConvSpec):
            convolution: Any = _TYPES[len(kernel)]
            float_layer = convolution(
                inputs * spec.groups, outputs, tuple(kernel), tuple(spec.stride), tuple(spec.padding),
                tuple(spec.dilation), spec.groups, bias=bias is not None, device="meta",
            )  # fmt: skip
        else:
            float_layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        float_layer.weight = nn.Parameter(weight)
        float_layer.bias = None if bias is None else nn.Parameter(bias)
        return float_layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        report_lost_gradients((input,))
        single = self.dims is not None and input.dim() == self.dims - 1
        out: Tensor = self.layer(self.quantize(input.unsqueeze(0) if single else input))
        return (out.squeeze(0) if single else out).to(input.dtype)

    def describe(self) -> dict[str, Any]:
        """Answer the layer without its numbers as plain values; :meth:`from_description` undoes it."""
        return {"layer": self.layer.describe(), "scale": list(self.quantize.spec.output), "dims": self.dims}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> StaticLayer:
        """Answer a layer whose buffers have the right shapes and no values yet."""
        layer = build_layer(description["layer"], KINDS)
        made = cls(layer, QParams(*description["scale"]), description["dims"])
        for part in (layer, made.quantize):
            require_sound(str(description["layer"]["kind"]), part, 1)
        if not isinstance(layer, QuantizedConvolution | StaticLinear) or not isinstance(made.dims, int | None):
            raise CheckpointError(f"the description of a static layer is damaged: it is a {layer.kind} step")
        return made


def quantize_layerwise(
    model: nn.Module, batches: Iterator[Batch], total: int | None, options: StaticOptions, report: StaticReport
) -> nn.Module:
    """Answer a copy of ``model`` whose convolutions and linears are static 8-bit layers; ``model`` is not modified.

    Args:
        model: In any mode.
        batches: Calibration batches.
        total: How many samples there are, if known.
        options: See :class:`StaticOptions`.
        report: Gets the layers, and those left in float with the reason.

    Raises:
        InputError: The model fails on a batch, or cannot be copied.
        QuantizationError: A weight or an activation is not finite; names the layer.
    """
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) in _TYPES:
            reason = "named in skip" if name in options.skip else _objection(module)
            if reason is None:
                chosen[name] = module
            else:
                report.skipped[name] = reason
    observers = {name: create_observer(options.observer, dtype=QUINT8, name=name) for name in chosen}
    means = {name: ChannelMean(-1 if isinstance(m, nn.Linear) else 1) for name, m in chosen.items()}
    if not options.correct_bias:
        means.clear()
    with evaluating(model), watching(model, inputs=observers), watching(model, inputs=means):
        for index, batch in enumerate(batches):
            call_model(model, batch, index)
            report.samples += batch.samples
            if options.progress is not None:
                options.progress(report.samples, total, "calibrating")
    memo: dict[int, Any] = {}
    for name, module in chosen.items():
        if observers[name].channels is None:
            report.skipped[name] = "the calibration data never reached it"
            continue
        mean = means[name].mean if name in means else None
        made = _static_layer(name, module, observers[name], mean)
        memo[id(module)] = made.stand_in_for(module)
        report.layers.append(name)
        report.energies[name] = made.codes.error_energy(module.weight)  # type: ignore[arg-type]
    return _copy(model, memo).eval()


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"the model ({type(model).__name__}) cannot be copied: {error}") from error


def _objection(module: nn.Module) -> str | None:
    if has_own_forward(module):
        return REPLACED_FORWARD
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"its padding mode is {module.padding_mode}"
    if isinstance(getattr(module, "padding", 0), str) and module.padding != "valid":
        pads = cast(list[int], module._reversed_padding_repeated_twice)
        if pads[::2] != pads[1::2]:
            return "its padding is not the same on both sides"
    return None


def _static_layer(name: str, module: nn.Module, observer: Observer, mean: Tensor | None) -> StaticLayer:
    scale, zero_point = observer.calculate_qparams()
    given = QParams(float(scale), int(zero_point))
    layer = _float_layer(module)
    try:
        if isinstance(layer, FloatConv):
            return StaticLayer(build.convolution(layer, given, None, None, mean), given, layer.weight.dim())
        return StaticLayer(build.static_linear(layer, given, None, mean), given, None)
    except MonoQuantError as error:
        raise type(error)(f"layer {name!r}: {error.message}", error.suggestion) from error


def _float_layer(module: Any) -> FloatLayer:
    weight = module.weight.detach().to(torch.float32)
    bias = None if module.bias is None else module.bias.detach().to(torch.float32)
    if isinstance(module, nn.Linear):
        return FloatLinear(weight, bias)
    padding = module.padding
    if isinstance(padding, str):
        padding = module._reversed_padding_repeated_twice[::-2] if padding == "same" else [0] * len(module.stride)
    return FloatConv(weight, bias, list(module.stride), list(padding), list(module.dilation), module.groups)


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """Answer the static layers inside a model by name, as plain values."""
    return {name: module.describe() for name, module in model.named_modules() if isinstance(module, StaticLayer)}


def put_layers(model: nn.Module, descriptions: dict[str, Any]) -> nn.Module:
    """Answer a copy of the float ``model`` with static layers, without values yet, in the described places.

    Raises:
        CheckpointError: A description is damaged.
        InputError: The model has no module of a described name.
    """
    modules = dict(model.named_modules())
    missing = sorted(descriptions.keys() - modules.keys())
    if missing:
        raise InputError(f"the model has no layer named {', '.join(missing)}, which the checkpoint describes")
    memo: dict[int, Any] = {}
    for name, description in descriptions.items():
        memo[id(modules[name])] = StaticLayer.from_description(description).stand_in_for(modules[name])
    return _copy(model, memo)
