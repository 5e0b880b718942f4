"""What every backend must compute: quantized rows and linear layers against exact arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.core import pack_int32, pack_tiles
from tests.ops.operands import (
    ACTIVATIONS,
    DTYPES,
    OPS,
    REFUSED,
    LinearWeight,
    assert_rounded_from,
    in_dtype,
    rows,
    same_bits,
)

ORDINARY = ("normal", "zero", "positive", "negative", "outlier", "ties")


def exactly(x: Tensor, weight: Tensor) -> Tensor:
    """Integer product in Python's own integers, rounded once to float32."""
    products = [
        [sum(a * b for a, b in zip(row, channel, strict=True)) for channel in weight.tolist()] for row in x.tolist()
    ]
    return torch.tensor(products, dtype=torch.float64).float()


@pytest.mark.usefixtures("backend")
class TestQuantizeRows:
    @given(x=rows(), dtype=st.sampled_from(DTYPES))
    def test_every_backend_gives_the_bits_of_the_reference(self, x: Tensor, dtype: torch.dtype) -> None:
        x = in_dtype(x, dtype)
        answers = OPS.quantize_rows(x)
        with ops.use_backend("reference"):
            expected = OPS.quantize_rows(x)
        for answer, wanted in zip(answers, expected, strict=True):
            assert same_bits(answer, wanted)

    @given(x=rows(), dtype=st.sampled_from(DTYPES))
    def test_codes_stand_for_the_row_within_half_a_scale(self, x: Tensor, dtype: torch.dtype) -> None:
        x = in_dtype(x, dtype)
        codes, scale, zero_point = OPS.quantize_rows(x)
        assert (codes.dtype, scale.dtype, zero_point.dtype) == (torch.uint8, torch.float32, torch.int32)
        assert (codes.shape, scale.shape, zero_point.shape) == (x.shape, x.shape[:-1], x.shape[:-1])
        assert bool(((zero_point >= 0) & (zero_point <= 255)).all())
        restored = (codes.double() - zero_point[:, None]) * scale[:, None].double()
        error = (restored - x.double()).abs().amax(1)
        assert bool((error <= scale.double() * 0.5001).all())

    @given(x=rows(), dtype=st.sampled_from(DTYPES))
    def test_zero_is_kept_exactly(self, x: Tensor, dtype: torch.dtype) -> None:
        x = in_dtype(x, dtype).masked_fill(torch.rand(x.shape) < 0.3, 0)
        codes, _, zero_point = OPS.quantize_rows(x)
        assert torch.equal(codes[x == 0].int(), zero_point[:, None].expand(x.shape)[x == 0])

    def test_known_rows(self) -> None:
        x = torch.tensor([[0.0, 255.0, 100.4], [-255.0, 0.0, -100.6], [-127.5, 127.5, 0.5], [0.0, -0.0, 0.0]])
        codes, scale, zero_point = OPS.quantize_rows(x)
        tiny = torch.finfo(torch.float32).tiny
        assert scale.tolist() == [1.0, 1.0, 1.0, tiny]
        assert zero_point.tolist() == [0, 255, 128, 0]
        assert codes.tolist() == [[0, 255, 100], [0, 255, 154], [0, 255, 128], [0, 0, 0]]

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_that_is_not_finite_has_a_nan_scale_and_no_codes(self, value: float, dtype: torch.dtype) -> None:
        x = torch.randn(5, 70).to(dtype)
        clean = [part.clone() for part in OPS.quantize_rows(x)]
        x[2, 67] = value
        codes, scale, zero_point = OPS.quantize_rows(x)
        assert bool(scale[2].isnan())
        assert int(codes[2].max()) == int(zero_point[2]) == 0
        others = [0, 1, 3, 4]
        for answer, before in zip((codes, scale, zero_point), clean, strict=True):
            assert torch.equal(answer[others], before[others])

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4), (2, 3, 0), (1,), (7,), (2, 1, 3, 1, 5)])
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        codes, scale, zero_point = OPS.quantize_rows(torch.randn(shape))
        assert (codes.shape, scale.shape, zero_point.shape) == (shape, shape[:-1], shape[:-1])
        assert bool(torch.isfinite(scale).all())

    def test_a_scalar_has_no_rows(self) -> None:
        with pytest.raises(REFUSED):
            OPS.quantize_rows(torch.tensor(1.0))


@pytest.mark.usefixtures("backend")
class TestLinearIsExact:
    """Operands with scales of one or a power of two, whose results are integers that float32 can hold."""

    @given(
        shape=st.tuples(st.integers(1, 5), st.integers(2, 150), st.integers(1, 40)),
        symmetric=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def test_integer_products(self, shape: tuple[int, int, int], symmetric: bool, seed: int) -> None:
        m, k, n = shape
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-127, 128, (m, k), generator=generator).float()
        x[:, 0], x[:, 1] = -127.5, 127.5  # scale exactly 1, zero point 128; codes 0 and 255 stand for -128 and 127
        stands_for = x.clone()
        stands_for[:, 0], stands_for[:, 1] = -128, 127
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        zero_point = None if symmetric else torch.randint(-128, 128, (n, 1), dtype=torch.int8, generator=generator)
        shifted = weight.int() - (0 if zero_point is None else zero_point.int())
        expected = exactly(stands_for.int(), shifted)
        exponent = torch.randint(-3, 4, (n,), generator=generator)
        scale = torch.exp2(exponent.float())
        operands = LinearWeight(weight, scale[:, None], zero_point, None)
        assert torch.equal(operands.linear(x), expected * scale)
        assert torch.equal(operands.linear_packed(x), expected * scale)
        # A power of two in the row's scale moves through unchanged as well.
        assert torch.equal(operands.linear(x * 4), expected * scale * 4)

    @pytest.mark.parametrize("length", [33_026, 65_537, 66_312, 140_000])
    @pytest.mark.parametrize(
        ("value", "code", "zero_point"),
        [(255.0, 127, None), (255.0, -128, None), (-255.0, 127, None), (255.0, -128, 127), (-255.0, 127, -128)],
    )
    def test_sums_beyond_int32_do_not_overflow(
        self, length: int, value: float, code: int, zero_point: int | None
    ) -> None:
        x = torch.full((2, length), value)
        weight = torch.full((3, length), code, dtype=torch.int8)
        shift = None if zero_point is None else torch.full((3, 1), zero_point, dtype=torch.int8)
        operands = LinearWeight(weight, torch.ones(3, 1), shift, None)
        expected = torch.full((2, 3), value * (code - (zero_point or 0)) * length, dtype=torch.float64).float()
        assert torch.equal(operands.linear(x), expected)
        assert torch.equal(operands.linear_packed(x), expected)

    @pytest.mark.parametrize("value", [255.0, -255.0])
    def test_no_pair_of_products_saturates(self, value: float) -> None:
        # 255 * 127 + 255 * 127 exceeds 16 bits, where a saturating multiply would clip it.
        weight = torch.tensor([[127] * 64, [-128] * 64, [127, -128] * 32], dtype=torch.int8)
        answer = LinearWeight(weight, torch.ones(3, 1), None, None).linear(torch.full((1, 64), value))
        assert answer.tolist() == [[value * 127 * 64, value * -128 * 64, value * -32]]


@pytest.mark.usefixtures("backend")
class TestLinear:
    @given(
        x=rows(kinds=ORDINARY), n=st.integers(1, 70), symmetric=st.booleans(), bias=st.booleans(),
        dtype=st.sampled_from(DTYPES), activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 2**31),
    )  # fmt: skip
    def test_is_the_integer_product_scaled_and_rounded_once(
        self, x: Tensor, n: int, symmetric: bool, bias: bool, dtype: torch.dtype, activation: str, seed: int
    ) -> None:
        x = in_dtype(x, dtype)
        weight = LinearWeight.random(n, x.shape[1], symmetric=symmetric, bias=bias, seed=seed)
        exact, summand = weight.exact(x, activation)
        for answer in (weight.linear(x, activation), weight.linear_packed(x, activation)):
            assert answer.dtype == dtype
            assert_rounded_from(answer, exact, summand)

    @pytest.mark.parametrize(
        "shape", [(37,), (1, 37), (2, 3, 37), (2, 1, 3, 37), (2, 1, 2, 2, 37), (0, 37), (2, 0, 37)]
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_inputs_of_any_rank_and_no_rows(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        weight = LinearWeight.random(11, 37)
        x = torch.randn(shape).to(dtype)
        answer = weight.linear(x)
        assert answer.shape == (*shape[:-1], 11)
        assert answer.dtype == dtype
        assert answer.is_contiguous()
        assert torch.equal(answer.reshape(-1, 11), weight.linear(x.reshape(-1, 37)))

    @pytest.mark.parametrize(("rows_", "k", "n"), [(1, 1, 1), (4, 1, 3), (1, 9, 3), (4, 9, 1), (1, 1, 5), (3, 1, 1)])
    def test_one_row_one_input_or_one_output_of_any_stride(self, rows_: int, k: int, n: int) -> None:
        # PyTorch calls such matrices contiguous whatever the stride of the dimension of size one.
        weight = LinearWeight.random(n, k, symmetric=False)
        x = torch.randn(rows_, k)
        expected = weight.linear(x)
        assert_rounded_from(expected, *weight.exact(x))
        if 1 in (k, n):
            weight.codes = weight.codes.t().contiguous().t()
        assert torch.equal(weight.linear(x.t().contiguous().t()), expected)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_without_inputs_the_answer_is_the_bias(self, symmetric: bool, activation: str) -> None:
        weight = LinearWeight.random(5, 0, symmetric=symmetric)
        exact, summand = weight.exact(torch.empty(3, 0), activation)
        assert_rounded_from(weight.linear(torch.empty(3, 0), activation), exact, summand)
        assert_rounded_from(weight.linear_packed(torch.empty(3, 0), activation), exact, summand)

    @pytest.mark.parametrize("x", [torch.randn(3, 8), torch.randn(0, 8), torch.empty(3, 0)])
    def test_without_outputs_the_answer_is_empty(self, x: Tensor) -> None:
        weight = LinearWeight.random(0, x.shape[1])
        assert weight.linear(x).shape == (x.shape[0], 0)
        assert weight.linear_packed(x).shape == (x.shape[0], 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strides_make_no_difference(self, dtype: torch.dtype) -> None:
        weight = LinearWeight.random(20, 48)
        base = torch.randn(6, 96, 48).to(dtype)
        views = [
            base.transpose(0, 1),
            base[::2, 1::3],
            torch.randn(48, 5).to(dtype).t(),
            torch.randn(7, 96).to(dtype)[:, ::2],
            torch.randn(1, 48).to(dtype).expand(4, 48),
            torch.randn(7, 100).to(dtype)[:, 3:51],
            torch.randn(48, 1).to(dtype).t(),
        ]
        for view in views:
            assert torch.equal(weight.linear(view), weight.linear(view.contiguous()))
            assert torch.equal(weight.linear_packed(view), weight.linear_packed(view.contiguous()))
            for answer, wanted in zip(OPS.quantize_rows(view), OPS.quantize_rows(view.contiguous()), strict=True):
                assert torch.equal(answer, wanted)

    @pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64])
    def test_the_bias_may_have_another_float_dtype(self, bias_dtype: torch.dtype) -> None:
        weight = LinearWeight.random(20, 48)
        assert weight.bias is not None
        weight.bias = weight.bias.to(bias_dtype)
        x = torch.randn(3, 48)
        assert_rounded_from(weight.linear(x), *weight.exact(x))
        assert_rounded_from(weight.linear_packed(x), *weight.exact(x))

    @pytest.mark.parametrize("width", [0, 6, 24])
    def test_an_input_of_the_wrong_width_is_refused(self, width: int) -> None:
        # 24 is a multiple and 6 * 4 rows hold 3 rows of 8: reshaping alone would notice neither.
        weight, x = LinearWeight.random(4, 8), torch.randn(4, width)
        with pytest.raises(REFUSED):
            weight.linear(x)
        with pytest.raises(REFUSED):
            OPS.linear_half(x, torch.randn(4, 8).half(), None)
        with pytest.raises(REFUSED):
            OPS.linear_weight_only(x, pack_int32(weight.codes, 8), weight.scale, None, None, 8, 8, 8)

    @pytest.mark.parametrize("x", [torch.randn(2, 8), torch.randn(0, 8)])
    def test_an_unknown_activation_is_refused_by_name(self, x: Tensor) -> None:
        with pytest.raises(REFUSED, match="softplus"):
            LinearWeight.random(4, 8).linear(x, "softplus")

    def test_operands_are_not_modified(self) -> None:
        weight, x = LinearWeight.random(9, 33, symmetric=False), torch.randn(5, 33)
        operands = [x, weight.codes, weight.scale, weight.zero_point, weight.bias]
        before = [operand.clone() for operand in operands]  # type: ignore[union-attr]
        weight.linear(x).zero_()
        for part in OPS.quantize_rows(x):
            part.zero_()
        assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))  # type: ignore[arg-type]


@pytest.mark.usefixtures("backend")
class TestWeightLayout:
    @given(n=st.integers(0, 40), k=st.integers(0, 150))
    def test_packing_is_the_layout_of_the_core(self, n: int, k: int) -> None:
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        packed = OPS.pack_weight(codes)
        assert torch.equal(packed, pack_tiles(codes))
        assert torch.equal(OPS.unpack_weight(packed, n, k), codes)

    def test_a_transposed_weight_packs_like_its_copy(self) -> None:
        codes = torch.randint(-128, 128, (70, 33), dtype=torch.int8).t()
        assert torch.equal(OPS.pack_weight(codes), pack_tiles(codes.contiguous()))

    def test_tiles_of_another_size_are_refused(self) -> None:
        with pytest.raises(REFUSED):
            OPS.unpack_weight(OPS.pack_weight(torch.zeros(16, 64, dtype=torch.int8)), 17, 64)
