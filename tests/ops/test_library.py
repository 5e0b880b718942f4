"""Every operator is a proper citizen of PyTorch: schema, shape function, compilation without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mono_quant import ops
from mono_quant.core import pack_int32, pack_tiles, quantize_weight_groupwise, quantize_weight_int8
from mono_quant.ops.decoder_reference import LINEARS as DECODER_LINEARS
from tests.ops.code_chains import chain
from tests.ops.encoder_layers import EncoderOperands, sees
from tests.ops.operands import OPS, ConvWeight, LinearWeight


def linear(x: Tensor, n: int, activation: str = "none", **options: bool) -> tuple[Any, ...]:
    weight = LinearWeight.random(n, x.shape[-1], **options)
    return x, weight.codes, weight.scale, weight.zero_point, weight.bias, activation


def linear_packed(x: Tensor, n: int, activation: str = "none", **options: bool) -> tuple[Any, ...]:
    _, codes, scale, zero_point, bias, _ = linear(x, n, **options)
    return x, pack_tiles(codes), codes.sum(1, dtype=torch.int32), scale, zero_point, bias, n, activation


def conv(x: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]:
    weight = ConvWeight.random(*arguments, **options)
    return x, weight.codes, weight.scale, weight.zero_point, weight.bias, *weight.geometry.values()


def weight_only(x: Tensor, n: int, bits: int, size: int, symmetric: bool, bias: Tensor | None) -> tuple[Any, ...]:
    quantized = quantize_weight_groupwise(torch.randn(n, x.shape[-1]), size, symmetric, bits)
    return x, pack_int32(quantized.codes, bits), quantized.scale, quantized.zero_point, bias, x.shape[-1], bits, size


def table(indices: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    quantized = quantize_weight_int8(torch.randn(10, 6), symmetric)
    zero_point = None if quantized.zero_point is None else quantized.zero_point[:, None]
    return indices, quantized.codes, quantized.scale[:, None], zero_point, dtype


def encoder(shape: tuple[int, int], mask: Tensor | None = None, **options: Any) -> tuple[Any, ...]:
    operands = EncoderOperands.random(2, 9, 21, **options)
    return operands.arguments(torch.randn(*shape, operands.width), mask)


def encoder_stack(shape: tuple[int, int], mask: Tensor | None = None) -> tuple[Any, ...]:
    x, mask, weights, heads, scale, *eps, activation = encoder(shape, mask)
    return OPS.hold_encoder_layers(weights * 2, heads, scale, eps * 2, activation), x, mask


def decoder(shape: tuple[int, int], past: int, mask: Tensor | None = None, causal: bool = True) -> tuple[Any, ...]:
    width, heads, key_heads, depth, wide = 12, 4, 2, 6, 21
    sizes = {
        "query": (heads * depth, width), "key": (key_heads * depth, width), "value": (key_heads * depth, width),
        "output": (width, heads * depth), "gate": (wide, width), "up": (wide, width), "down": (width, wide),
    }  # fmt: skip
    weights: list[Tensor] = []
    for size in (sizes[name] for name in DECODER_LINEARS):
        linear = LinearWeight.random(*size)
        zeros = torch.empty(0, dtype=torch.int8)
        sums = linear.codes.sum(1, dtype=torch.int32)
        weights += [pack_tiles(linear.codes), sums, linear.scale.reshape(-1), torch.zeros(size[0]), zeros]
    held = torch.randn(2, shape[0], key_heads, past, depth)
    angles = torch.rand(1, shape[1], depth)
    return (
        torch.randn(*shape, width), held[0], held[1], angles.cos(), angles.sin(), mask,
        [*weights, torch.ones(width), torch.ones(width)], heads, 0.4, 1e-5, 1e-6, causal, "silu",
    )  # fmt: skip


def static_decoder(shape: tuple[int, int], position: int, mask: Tensor | None = None) -> tuple[Any, ...]:
    x, keys, values, *others = decoder(shape, past=11, causal=mask is None)
    return x, keys, values, torch.tensor(position), *others[:2], mask, *others[3:]


def decoder_stack(shape: tuple[int, int], past: int, mask: Tensor | None = None) -> tuple[Any, ...]:
    x, keys, values, *angles, mask, weights, heads, scale, _, _, causal, activation = decoder(
        shape, past, mask, mask is None
    )
    held = OPS.hold_decoder_layers(weights * 2, heads, keys.shape[1], keys.shape[3], scale, [1e-5] * 4, activation)
    return held, x, [keys, keys + 1], [values, values + 1], *angles, mask, causal


def static_decoder_stack(shape: tuple[int, int], position: int, mask: Tensor | None = None) -> tuple[Any, ...]:
    held, x, keys, values, *angles, _, _ = decoder_stack(shape, past=11)
    positions = [torch.tensor(position), torch.tensor(position)]
    return held, x, keys, values, positions, *angles, mask, mask is None


def chain_arguments(batch: int) -> tuple[Any, ...]:
    case = chain(batch)
    return case.inputs, case.constants, case.program


CASES: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "quantize_rows": [
        lambda: (torch.randn(3, 10),),
        lambda: (torch.randn(2, 3, 8).bfloat16().transpose(0, 1),),
        lambda: (torch.randn(0, 4),),
        lambda: (torch.randn(5).half(),),
    ],
    "linear_dynamic": [
        lambda: linear(torch.randn(3, 10), 7),
        lambda: linear(torch.randn(2, 3, 10).bfloat16(), 7, "gelu", symmetric=False, bias=False),
        lambda: linear(torch.randn(10, 4).t().half(), 7, "relu", symmetric=False),
        lambda: linear(torch.randn(0, 10), 7, "silu"),
    ],
    "pack_weight": [
        lambda: (torch.randint(-128, 128, (20, 70), dtype=torch.int8),),
        lambda: (torch.zeros(0, 70, dtype=torch.int8),),
    ],
    "unpack_weight": [
        lambda: (pack_tiles(torch.randint(-128, 128, (20, 70), dtype=torch.int8)), 20, 70),
        lambda: (pack_tiles(torch.zeros(16, 64, dtype=torch.int8)), 16, 64),
    ],
    "linear_dynamic_packed": [
        lambda: linear_packed(torch.randn(3, 10), 7),
        lambda: linear_packed(torch.randn(2, 3, 70).bfloat16(), 20, "gelu_tanh", symmetric=False, bias=False),
        lambda: linear_packed(torch.randn(0, 10), 7),
    ],
    "embedding": [
        lambda: table(torch.tensor([1, 9, 0]), True, torch.float32),
        lambda: table(torch.zeros(2, 3, dtype=torch.int32), False, torch.bfloat16),
        lambda: table(torch.zeros(0, dtype=torch.int64), True, torch.float16),
    ],
    "conv_dynamic": [
        lambda: conv(torch.randn(2, 4, 9), 6, 4, (3,), stride=2, padding=1),
        lambda: conv(torch.randn(2, 4, 9, 8).bfloat16(), 6, 4, (3, 2), groups=2, dilation=2, symmetric=False),
        lambda: conv(torch.randn(1, 4, 5, 5).to(memory_format=torch.channels_last), 6, 4, (1, 1), bias=False),
        lambda: conv(torch.randn(1, 2, 4, 5, 6), 3, 2, (2, 2, 2)),
    ],
    "linear_weight_only": [
        lambda: weight_only(torch.randn(3, 32), 5, 4, 16, True, torch.randn(5)),
        lambda: weight_only(torch.randn(2, 3, 32).bfloat16(), 5, 8, 8, False, None),
    ],
    "linear_half": [
        lambda: (torch.randn(3, 10), torch.randn(5, 10).half(), torch.randn(5)),
        lambda: (torch.randn(2, 3, 10).bfloat16(), torch.randn(5, 10).half(), None),
    ],
    "count_values": [
        lambda: (torch.rand(3, 10) * 8 - 4, 16, -1),
        lambda: (torch.zeros(0, 4), 8, 0),
    ],
    "encoder_layer": [
        lambda: encoder((2, 5)),
        lambda: encoder((3, 4), sees(3, 4, torch.Generator()), symmetric=False, activation="gelu_tanh"),
        lambda: encoder((1, 7), torch.zeros(1, 1, 1, 7), activation="none"),
        lambda: encoder((0, 3)),
    ],
    "encoder_layers": [
        lambda: encoder_stack((2, 5)),
        lambda: encoder_stack((3, 4), sees(3, 4, torch.Generator())),
        lambda: encoder_stack((0, 3)),
    ],
    "decoder_layer": [
        lambda: decoder((2, 5), past=0),
        lambda: decoder((1, 1), past=7, causal=False),
        lambda: decoder((2, 3), past=4, mask=torch.ones(2, 1, 3, 7, dtype=torch.bool), causal=False),
    ],
    "decoder_layer_static_cache": [
        lambda: static_decoder((2, 5), 0),
        lambda: static_decoder((1, 1), 7, torch.arange(11)[None, None, None] < 8),
        lambda: static_decoder((2, 3), 4, torch.ones(11, 11).tril()[None, None, 4:7] > 0),
    ],
    "decoder_layers": [
        lambda: decoder_stack((2, 5), past=0),
        lambda: decoder_stack((1, 1), past=7),
        lambda: decoder_stack((2, 3), past=4, mask=torch.ones(2, 1, 3, 7, dtype=torch.bool)),
    ],
    "decoder_layers_static_cache": [
        lambda: static_decoder_stack((2, 5), 0),
        lambda: static_decoder_stack((1, 1), 7, torch.arange(11)[None, None, None] < 8),
    ],
    "run_codes": [
        lambda: chain_arguments(1),
        lambda: chain_arguments(3),
        lambda: chain_arguments(0),
    ],
}  # fmt: skip

EACH_CASE = [
    pytest.param(name, case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)
]


def test_every_operator_has_cases_a_reference_and_a_shape() -> None:
    # What answers a number by which weights are known is called once, and by no graph.
    assert CASES.keys() | {"hold_decoder_layers", "hold_encoder_layers"} == ops.SCHEMAS.keys()
    assert ops.NAMESPACE == "mono_quant"


@pytest.mark.parametrize(("name", "case"), EACH_CASE)
def test_opcheck(name: str, case: Callable[[], tuple[Any, ...]]) -> None:
    torch.library.opcheck(getattr(OPS, name).default, case())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("name", "case"), EACH_CASE)
def test_the_shape_function_tells_shape_dtype_and_strides(name: str, case: Callable[[], tuple[Any, ...]]) -> None:
    arguments, operator = case(), getattr(OPS, name)
    with FakeTensorMode() as mode:
        fake = operator(*tree_map_only(Tensor, mode.from_tensor, arguments))
    real = operator(*arguments)
    for expected, found in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
        assert expected.stride() == found.stride() or found.numel() == 0


@pytest.mark.usefixtures("backend")
def test_the_meta_device_computes_shapes_only() -> None:
    arguments = [a.to("meta") if isinstance(a, Tensor) else a for a in linear(torch.randn(2, 3, 10), 7)]
    answer = OPS.linear_dynamic(*arguments)
    assert answer.is_meta
    assert answer.shape == (2, 3, 7)


@pytest.mark.usefixtures("backend")
class TestCompile:
    def test_a_graph_of_all_operators_has_no_break(self) -> None:
        x, image = torch.randn(3, 4, 32), torch.randn(2, 4, 9, 8)
        arguments = {name: cases[0]() for name, cases in CASES.items()}
        dense, packed = linear(x, 16, "gelu"), linear_packed(x, 16, symmetric=False)
        half, words = arguments["linear_half"], weight_only(x, 5, 4, 16, True, None)
        convolution = conv(image, 6, 4, (3, 3), padding=1)

        def run(x: Tensor, image: Tensor) -> list[Tensor]:
            codes, scale, zero_point = OPS.quantize_rows(x)
            return [
                (codes - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1),
                OPS.linear_dynamic(x, *dense[1:]).relu(),
                OPS.linear_dynamic_packed(x, *packed[1:]) + 1,
                OPS.linear_weight_only(x, *words[1:]),
                OPS.linear_half(x[..., :10], *half[1:]),
                OPS.conv_dynamic(image, *convolution[1:]) * 2,
                OPS.embedding(*arguments["embedding"]),
                OPS.encoder_layer(*arguments["encoder_layer"]),
                OPS.unpack_weight(OPS.pack_weight(dense[1]), 16, 32),
            ]

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for answer, wanted in zip(compiled(x, image), run(x, image), strict=True):
            assert torch.equal(answer, wanted)

    def test_one_graph_serves_every_batch_and_length(self) -> None:
        weight = LinearWeight.random(16, 24)
        compiled = torch.compile(
            lambda x: weight.linear(x, "silu") * 2, fullgraph=True, backend="aot_eager", dynamic=True
        )
        for shape in ((2, 3, 24), (5, 7, 24), (4, 2, 24)):
            x = torch.randn(shape)
            assert torch.equal(compiled(x), weight.linear(x, "silu") * 2)
