"""Builds one 8-bit layer from one float node and the scales around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from mono_quant.core import QuantizedTensor, quantize_weight_int8
from mono_quant.graph.arithmetic import Activation, QParams
from mono_quant.graph.domains import Kind
from mono_quant.graph.float_layers import FloatConv, FloatLayer
from mono_quant.graph.fold import zero_padding
from mono_quant.graph.fuse import activation_of
from mono_quant.graph.layers import Layer
from mono_quant.graph.layers.aten import Call, CallSpec, encode
from mono_quant.graph.layers.conv import ConvSpec, QuantizedConvolution
from mono_quant.graph.layers.elementwise import Add, Multiply, TwoInputSpec, table_of
from mono_quant.graph.layers.functions import function_name
from mono_quant.graph.layers.linear import DynamicLinear, LinearSpec, StaticLinear
from mono_quant.graph.layers.spatial import (
    AveragePool,
    AveragePoolSpec,
    GlobalAverage,
    GlobalAverageSpec,
    MaxPool,
    MaxPoolSpec,
    Pad,
    PadSpec,
    Spread,
    SpreadSpec,
)

#: Scale and zero point of every node that has codes.
Scales = dict[fx.Node, QParams]


class UnsupportedCallError(Exception):
    """A node calls something that a static graph cannot hold; the message says what."""


def quantized_weight(layer: FloatLayer, input_mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Answer a layer's int8 codes and scales, and a bias that makes up for the rounding of the weight.

    Rounding the weight moves the mean of output ``o`` by the sum of ``(rounded - exact) * mean of the input`` over the
    taps (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019); padding is
    taken for input like any other.

    Args:
        layer: Not modified.
        input_mean: float64 ``[C]``, the mean of each input channel; ``None`` leaves the bias alone.

    Raises:
        QuantizationError: The weight is not finite.
    """
    quantized = quantize_weight_int8(layer.weight, symmetric=True)
    codes, bias = quantized.codes.contiguous(), layer.bias
    if input_mean is None:
        return codes, quantized.scale, None if bias is None else bias.detach().clone()
    error = layer.weight.detach().double() - quantized.dequantize().double()
    taps = error.flatten(2).sum(2) if error.dim() > 2 else error
    groups = layer.groups if isinstance(layer, FloatConv) else 1
    correction = (taps.reshape(groups, -1, taps.shape[1]) * input_mean.reshape(groups, 1, -1)).sum(2).flatten()
    return codes, quantized.scale, (correction if bias is None else bias.detach().double() + correction).float()


def weight_energies(layer: FloatLayer, made: Layer) -> tuple[float, float]:
    """Answer the sum of squares of a float layer's weight and that of what its 8-bit form changed."""
    if isinstance(made, DynamicLinear):
        made = made.linear  # type: ignore[assignment]
    scale: Any = made.weight_scale
    stored = QuantizedTensor(made.codes, scale.reshape(-1), None, axis=0)  # type: ignore[arg-type]
    return stored.error_energy(layer.weight)


def convolution(
    layer: FloatConv, given: QParams, output: QParams | None, other: QParams | None, mean: Tensor | None
) -> QuantizedConvolution:
    """Answer the 8-bit form of a convolution."""
    spec = ConvSpec(
        layer.stride, layer.padding, layer.dilation, layer.groups, given, output, other, layer.activation
    )  # fmt: skip
    return QuantizedConvolution(spec, *quantized_weight(layer, mean))


def static_linear(layer: FloatLayer, given: QParams, output: QParams | None, mean: Tensor | None) -> StaticLinear:
    """Answer the 8-bit form of a linear layer whose input is codes."""
    return StaticLinear(LinearSpec(given, output, layer.activation), *quantized_weight(layer, mean))


def dynamic_linear(layer: FloatLayer) -> DynamicLinear:
    """Answer the 8-bit form of a linear layer whose input is float rows."""
    weight, bias = layer.weight, layer.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return DynamicLinear.from_float(linear, layer.activation)


def global_average(node: fx.Node, scales: Scales) -> GlobalAverage:
    """Answer the mean over all positions of a node's input."""
    source: Any = node.args[0]
    keepdim = node.meta["val"].dim() == source.meta["val"].dim()
    return GlobalAverage(GlobalAverageSpec(scales[source], keepdim))


def call(node: fx.Node, sources: list[fx.Node], constants: dict[fx.Node, Tensor]) -> Call:
    """Answer a node as a call of the function that it is.

    Args:
        node: A call of a function.
        sources: Its inputs, in the order in which the layer will get them.
        constants: Those of its arguments that belong to the model.

    Raises:
        UnsupportedCallError: The function or an argument has no plain form.
    """
    function = function_name(node.target)
    if function is None:
        raise UnsupportedCallError(f"it calls {node.target}, which a static graph cannot hold")
    names = {constant: f"constant_{i}" for i, constant in enumerate(constants)}
    positions = {source: i for i, source in enumerate(sources)}
    try:
        args = encode(list(node.args), positions, names)
        kwargs = {name: encode(value, positions, names) for name, value in node.kwargs.items()}
    except TypeError as error:
        raise UnsupportedCallError(f"it calls {node.target} with {error}") from error
    tensors: dict[str, Tensor | None] = {names[c]: value.detach().clone() for c, value in constants.items()}
    return Call(CallSpec(function, args, kwargs), **tensors)


def float_calls(layer: FloatLayer) -> list[Call]:
    """Answer a layer that stays in float as calls: the function it was, its sum, its activation."""
    tensors = {"weight": layer.weight.detach().clone(), "bias": None if layer.bias is None else layer.bias.clone()}
    bias = None if layer.bias is None else {"constant": "bias"}
    args: list[Any] = [{"input": 0}, {"constant": "weight"}, bias]
    function = "aten.linear.default"
    if isinstance(layer, FloatConv):
        function = f"aten.conv{len(layer.stride)}d.default"
        args += [layer.stride, layer.padding, layer.dilation, layer.groups]
    calls = [Call(CallSpec(function, args, {}), **tensors)]
    if layer.adds:
        calls.append(Call(CallSpec("aten.add.Tensor", [{"input": 0}, {"input": 1}], {})))
    if layer.activation.name != "none":
        calls.append(_activation_call(layer.activation))
    return calls


def _activation_call(activation: Activation) -> Call:
    bounds = [activation.low, activation.high] if activation.name == "clamp" else []
    return Call(CallSpec(f"aten.{activation.name}.default", [{"input": 0}, *bounds], {}))


def _table(node: fx.Node, sources: list[fx.Node], scales: Scales) -> Layer:
    function: Any = node.target
    rest = node.args[1:]
    return table_of(lambda values: function(values, *rest, **node.kwargs), scales[sources[0]], scales[node])


def _clamp(node: fx.Node, sources: list[fx.Node], scales: Scales) -> Layer:
    activation = activation_of(node)
    bounds = None if activation is None else activation.code_bounds(scales[node])
    assert bounds is not None
    return Call(CallSpec("aten.clamp.default", [{"input": 0}, *bounds], {}))


def _average_pool(node: fx.Node, sources: list[fx.Node], scales: Scales) -> Layer:
    dims = node.meta["val"].dim() - 2
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    kernel = _per_dim(given["kernel_size"], dims)
    return AveragePool(
        AveragePoolSpec(
            kernel,
            _per_dim(given.get("stride") or kernel, dims),
            _per_dim(given.get("padding", 0), dims),
            given.get("ceil_mode", False),
            given.get("count_include_pad", True),
            given.get("divisor_override"),
            scales[node],
        )
    )


def _max_pool(node: fx.Node, sources: list[fx.Node], scales: Scales) -> Layer:
    dims = node.meta["val"].dim() - 2
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    kernel = _per_dim(given["kernel_size"], dims)
    return MaxPool(
        MaxPoolSpec(
            kernel,
            _per_dim(given.get("stride") or kernel, dims),
            _per_dim(given.get("padding", 0), dims),
            _per_dim(given.get("dilation", 1), dims),
            given.get("ceil_mode", False),
        )
    )


def _per_dim(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _pad(node: fx.Node, sources: list[fx.Node], scales: Scales) -> Layer:
    pads = zero_padding(node)
    assert pads is not None
    return Pad(PadSpec(pads, scales[node]))


def _spread(node: fx.Node, sources: list[fx.Node], scales: Scales) -> Layer:
    return spread_layer(node, scales[node])


def spread_layer(node: fx.Node, scale: QParams | None) -> Spread:
    """Answer the layer of a node that puts zeros between pixels; ``None`` for float values."""
    stride, sides = node.args[1:]
    return Spread(SpreadSpec(list(stride), list(sides), scale))  # type: ignore[arg-type]


def _two(kind: type[Layer]) -> Callable[[fx.Node, list[fx.Node], Scales], Layer]:
    def build(node: fx.Node, sources: list[fx.Node], scales: Scales) -> Layer:
        first, second = (sources * 2)[:2]
        return kind(TwoInputSpec(scales[first], scales[second], scales[node]))

    return build


#: For each kind of node that works on codes without a weight, how its layer is made.
ON_CODES: Final[dict[str, Callable[[fx.Node, list[fx.Node], Scales], Layer]]] = {
    Kind.TABLE: _table,
    Kind.CLAMP: _clamp,
    Kind.AVERAGE_POOL: _average_pool,
    Kind.MAX_POOL: _max_pool,
    Kind.PAD: _pad,
    Kind.SPREAD: _spread,
    Kind.ADD: _two(Add),
    Kind.MULTIPLY: _two(Multiply),
}


def requantize(given: QParams, wanted: QParams) -> Layer:
    """Answer the change from codes of one scale to codes of another."""
    return table_of(torch.clone, given, wanted)
