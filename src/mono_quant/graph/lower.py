"""From the calibrated float graph to steps on codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from torch import Tensor, fx

from mono_quant.core import Cut
from mono_quant.errors import MonoQuantError
from mono_quant.graph import build
from mono_quant.graph.arithmetic import QParams
from mono_quant.graph.capture import Captured
from mono_quant.graph.domains import Domains, Kind, tensor_inputs
from mono_quant.graph.float_layers import FloatConv, channel_axis
from mono_quant.graph.fold import constant, layer_of
from mono_quant.graph.layers import Layer
from mono_quant.graph.layers.aten import Call, CallSpec
from mono_quant.graph.layers.conv import QuantizedConvolution
from mono_quant.graph.layers.elementwise import Add, Dequantize, InputSpec, Multiply, OutputSpec, Quantize
from mono_quant.graph.layers.linear import DynamicLinear
from mono_quant.graph.layers.spatial import AveragePool, MaxPool
from mono_quant.graph.observe import Statistics
from mono_quant.graph.options import StaticReport
from mono_quant.graph.program import StaticGraph, Step, numbers_in

# Steps that answer memory of their own, which a later step may write to.
_OWNING: Final = (QuantizedConvolution, Add, Multiply, Quantize, AveragePool, MaxPool)

# Kinds that lose nothing in float, so that leaving 8 bits for them is no cut.
_WITHOUT_ARITHMETIC: Final = (Kind.MOVE, Kind.ITEM, Kind.SIZE, Kind.PAD, Kind.MAX_POOL)

_UNKNOWN: Final = QParams(1.0, 0)


class Lowering:
    """One lowering: the steps made so far, and the numbers of their values.

    Args:
        captured: The folded and fused graph.
        domains: Which values are codes.
        statistics: What calibration learned; ``None`` gives every value the scale 1, to see whether a graph can be
            lowered before its calibration.
        names: The layer that each node comes from.
        report: Gets the layers and the cuts.
    """

    def __init__(
        self,
        captured: Captured,
        domains: Domains,
        statistics: Statistics | None,
        names: dict[fx.Node, str],
        report: StaticReport,
    ) -> None:
        self._captured = captured
        self._module = captured.module
        self._domains = domains
        self._statistics = statistics
        self._names = names
        self._report = report
        self._steps: list[Step] = []
        self._layers: list[Layer] = []
        self._scales: build.Scales = {}
        self._codes: dict[fx.Node, int] = {}
        self._floats: dict[fx.Node, int] = {}
        self._next = len(captured.inputs)

    def run(self) -> StaticGraph:
        """Answer the graph.

        Raises:
            UnsupportedCallError: The model calls a function that a static graph cannot hold.
            QuantizationError: A weight is not finite, or a value was never seen; names the layer.
        """
        self._choose_scales()
        outputs: list[Any] = []
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                self._floats[node] = len(self._floats)
            elif node.op == "output":
                outputs = [self._output(item) for item in node.args[0]]
            elif node.op != "get_attr":
                self._lower(node)
        structure = _fill(self._captured.output, outputs)
        self._allow_overwriting(set(numbers_in(structure)))
        return StaticGraph(self._steps, self._layers, self._captured.parameters, self._captured.inputs, structure)

    def _output(self, item: Any) -> Any:
        return ["value", self._float_number(item)] if isinstance(item, fx.Node) else ["constant", item]

    def _choose_scales(self) -> None:
        kinds, codes = self._domains.kinds, self._domains.codes
        for node in self._domains.watched():
            self._scales[node] = _UNKNOWN if self._statistics is None else self._statistics.qparams(node)
        for node in self._module.graph.nodes:
            if kinds.get(node) == Kind.CONCATENATE and node in codes:
                # What is only joined takes the joint scale from the start: joining then moves codes as they are.
                for source in tensor_inputs(node, kinds):
                    if source in self._domains.owners and len(source.users) == 1:
                        self._scales[source] = self._scales[node]
        for node in self._module.graph.nodes:
            if node in codes and node not in self._scales:
                self._scales[node] = self._scales[tensor_inputs(node, kinds)[0]]

    def _emit(self, node: fx.Node, layer: Layer, *inputs: int) -> int:
        self._steps.append(Step(self._names[node], tuple(inputs), self._next))
        self._layers.append(layer)
        self._next += 1
        return self._next - 1

    def _code_number(self, node: fx.Node, scale: QParams | None = None) -> int:
        """Answer the number of a node's codes: turned from its float answer, or to another scale, where need be."""
        if node not in self._codes:
            layer = Quantize(OutputSpec(self._scales[node]))
            self._codes[node] = self._emit(node, layer, self._float_number(node))
        if scale is None or scale == self._scales[node]:
            return self._codes[node]
        return self._emit(node, build.requantize(self._scales[node], scale), self._codes[node])

    def _float_number(self, node: fx.Node) -> int:
        """Answer the number of a node's float answer, turned from codes where need be."""
        if node not in self._floats:
            value = constant(self._module, node)
            if value is not None:
                layer: Layer = Call(CallSpec("aten.alias.default", [{"constant": "value"}], {}), value=value.clone())
                self._floats[node] = self._emit(node, layer)
            else:
                self._floats[node] = self._emit(node, Dequantize(InputSpec(self._scales[node])), self._codes[node])
        return self._floats[node]

    def _lower(self, node: fx.Node) -> None:
        kind = self._domains.kinds[node]
        source: Any = node.args[0] if node.args else None
        if kind == Kind.LAYER:
            self._lower_layer(node)
        elif layer_of(self._module, node) is not None:
            self._lower_float_layer(node)
        elif kind == Kind.GLOBAL_AVERAGE and source in self._domains.codes:
            average = build.global_average(node, self._scales)
            self._floats[node] = self._emit(node, average, self._code_number(source))
        elif node in self._domains.codes:
            self._codes[node] = self._lower_on_codes(node, kind)
        elif kind == Kind.SPREAD:
            self._floats[node] = self._emit(node, build.spread_layer(node, None), self._float_number(source))
        else:
            self._lower_call(node, kind)

    def _lower_on_codes(self, node: fx.Node, kind: str) -> int:
        sources = tensor_inputs(node, self._domains.kinds)
        if kind in build.ON_CODES:
            layer = build.ON_CODES[kind](node, sources, self._scales)
            numbers = [self._code_number(source) for source in sources]
            # x + x and x * x name their one input twice.
            wanted = 2 if kind in (Kind.ADD, Kind.MULTIPLY) else 1
            return self._emit(node, layer, *(numbers * 2)[:wanted])
        everything = list(node.all_input_nodes)
        scale = self._scales[node]
        return self._emit(
            node,
            build.call(node, everything, {}),
            *[self._code_number(s, scale) if s in sources else self._floats[s] for s in everything],
        )

    def _lower_call(self, node: fx.Node, kind: str) -> None:
        constants = {s: value for s in node.all_input_nodes if (value := constant(self._module, s)) is not None}
        sources = [source for source in node.all_input_nodes if source not in constants]
        numbers = [
            self._codes[source] if kind == Kind.SIZE and source in self._codes else self._float_number(source)
            for source in sources
        ]
        self._floats[node] = self._emit(node, build.call(node, sources, constants), *numbers)
        value = node.meta.get("val")
        if kind not in _WITHOUT_ARITHMETIC and isinstance(value, Tensor) and value.is_floating_point():
            reason = "it has no 8-bit form" if kind == Kind.FLOAT else "nothing after it takes 8-bit codes"
            self._report.cuts.append(Cut(self._names[node], str(node.target), reason))

    def _lower_layer(self, node: fx.Node) -> None:
        layer = layer_of(self._module, node)
        assert layer is not None
        sources: list[Any] = list(node.args)
        output = self._scales[node] if node in self._domains.codes else None
        mean = None if self._statistics is None else self._statistics.mean(sources[0], channel_axis(layer))
        name = self._names[node]
        try:
            if isinstance(layer, FloatConv):
                other = self._scales[sources[1]] if layer.adds else None
                made: Layer = build.convolution(layer, self._scales[sources[0]], output, other, mean)
            elif sources[0] in self._domains.codes:
                made = build.static_linear(layer, self._scales[sources[0]], output, mean)
            else:
                made = build.dynamic_linear(layer)
        except MonoQuantError as error:
            raise type(error)(f"layer {name!r}: {error.message}", error.suggestion) from error
        if name not in self._report.layers:  # a layer may be called twice
            self._report.layers.append(name)
            if self._statistics is not None:
                self._report.energies[name] = build.weight_energies(layer, made)
        if isinstance(made, DynamicLinear):
            self._floats[node] = self._emit(node, made, self._float_number(sources[0]))
            return
        number = self._emit(node, made, *[self._code_number(source) for source in sources])
        (self._floats if output is None else self._codes)[node] = number

    def _lower_float_layer(self, node: fx.Node) -> None:
        layer = layer_of(self._module, node)
        assert layer is not None
        sources: list[Any] = list(node.args)
        first, *rest = build.float_calls(layer)
        number = self._emit(node, first, self._float_number(sources[0]))
        for call in rest:
            others = [self._float_number(sources[1])] if call.spec.function == "aten.add.Tensor" else []
            number = self._emit(node, call, number, *others)
        self._floats[node] = number
        self._report.skipped[self._names[node]] = "named in skip"

    def _allow_overwriting(self, kept: set[int]) -> None:
        """Let a convolution that adds write into what it adds, where nothing else needs that any more."""
        users: dict[int, list[int]] = {}
        for index, step in enumerate(self._steps):
            for number in step.inputs:
                users.setdefault(number, []).append(index)
        makers = {step.output: layer for step, layer in zip(self._steps, self._layers, strict=True)}
        for index, (step, layer) in enumerate(zip(self._steps, self._layers, strict=True)):
            if not isinstance(layer, QuantizedConvolution) or layer.spec.other is None:
                continue
            source, added = step.inputs
            # A call may answer a view of what it takes, which would change with it.
            if (
                added not in {source, *kept}
                and users[added][-1] == index
                and isinstance(makers.get(added), _OWNING)
                and not any(isinstance(self._layers[user], Call) for user in users[added])
            ):
                spec = replace(layer.spec, overwrite=True)
                self._layers[index] = QuantizedConvolution(spec, layer.codes, layer.weight_scale, layer.bias)


def _fill(structure: Any, outputs: list[Any]) -> Any:
    kind, content = structure
    if kind == "value":
        return outputs[content]
    if kind == "constant":
        return structure
    if kind in ("dict", "fields"):
        return [kind, {key: _fill(item, outputs) for key, item in content.items()}]
    return [kind, [_fill(item, outputs) for item in content]]
