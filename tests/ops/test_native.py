"""The native library: loading, the choice of instruction set, and the same answers from every one of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import ops
from mono_quant.core import pack_int32, quantize_weight_groupwise
from mono_quant.errors import BackendError
from mono_quant.ops import native
from tests.ops.operands import (
    ACTIVATIONS,
    DTYPES,
    OPS,
    LinearWeight,
    assert_rounded_from,
    in_dtype,
    make_row,
    rows,
    same_bits,
)

pytestmark = pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())

CSRC = Path(__file__).parents[2] / "csrc"
SIZES = (1, 2, 3, 5, 15, 16, 17, 33, 63, 64, 65, 100, 130, 200)


@pytest.fixture(params=native.available_instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each instruction set that this processor has."""
    before = native.instruction_set()
    assert before is not None
    with ops.use_backend("native"):
        native.set_instruction_set(request.param)
        yield request.param
        native.set_instruction_set(before)


@pytest.fixture(params=(1, 2, 8))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class TestLoading:
    def test_the_library_registers_every_operator_it_names(self) -> None:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key
        assert native.operators() <= set(ops.SCHEMAS)
        assert all(registered(f"mono_quant::{name}", "CPU") for name in native.operators())

    def test_the_best_instruction_set_comes_first_and_the_portable_one_last(self) -> None:
        assert native.available_instruction_sets()[-1] == "generic"
        assert native.instruction_set() in native.available_instruction_sets()

    def test_an_unavailable_instruction_set_is_refused_by_name(self) -> None:
        before = native.instruction_set()
        with pytest.raises(BackendError, match="'avx1024' is not available"):
            native.set_instruction_set("avx1024")
        assert native.instruction_set() == before

    def test_the_environment_switches_the_library_off(self) -> None:
        code = "from mono_quant import ops; print(ops.native.is_loaded(), ops.get_backend())"
        done = run_python(code, MONO_QUANT_NATIVE="0", MONO_QUANT_BACKEND="")
        assert done.stdout.split() == ["False", "torch"], done.stderr

    def test_the_environment_chooses_the_instruction_set(self) -> None:
        code = "from mono_quant.ops import native; native.is_loaded(); print(native.instruction_set())"
        assert run_python(code, MONO_QUANT_ISA="generic").stdout.split() == ["generic"]

    def test_a_wrong_instruction_set_in_the_environment_is_an_error_that_lists_the_right_ones(self) -> None:
        done = run_python("from mono_quant import ops; ops.get_backend()", MONO_QUANT_ISA="sse9", MONO_QUANT_BACKEND="")
        assert done.returncode != 0
        assert "'sse9' is not available" in done.stderr
        assert "generic" in done.stderr


@st.composite
def linear_cases(draw: st.DrawFn) -> tuple[Tensor, LinearWeight, str]:
    in_features, out_features = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    kinds = draw(st.lists(st.sampled_from(("normal", "zero", "positive", "outlier", "huge")), min_size=0, max_size=60))
    x = torch.stack([make_row(kind, in_features, generator) for kind in kinds] or [torch.zeros(in_features)])
    x = in_dtype(x[: len(kinds)], draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        # Rows that lie apart and do not start where vectors would.
        x = torch.cat([x[:, :1], x, x[:, :1]], dim=1)[:, 1:-1]
    weight = LinearWeight.random(
        out_features, in_features, symmetric=draw(st.booleans()), bias=draw(st.booleans()), seed=seed
    )
    return x, weight, draw(st.sampled_from(ACTIVATIONS))


@pytest.mark.usefixtures("isa")
class TestEveryInstructionSet:
    @given(x=rows(), dtype=st.sampled_from(DTYPES))
    def test_gives_the_codes_of_the_reference(self, x: Tensor, dtype: torch.dtype) -> None:
        x = in_dtype(x, dtype)
        answers = OPS.quantize_rows(x)
        with ops.use_backend("reference"):
            wanted = OPS.quantize_rows(x)
        assert all(same_bits(answer, want) for answer, want in zip(answers, wanted, strict=True))

    @given(case=linear_cases())
    def test_gives_the_sums_of_the_reference(self, case: tuple[Tensor, LinearWeight, str]) -> None:
        x, weight, _ = case
        answer = weight.linear(x)
        with ops.use_backend("reference"):
            wanted = weight.linear(x)
        # The same integer sums and the same float32 operations in the same order: the same bits.
        assert same_bits(answer, wanted)
        assert same_bits(weight.linear_packed(x), wanted)

    @given(case=linear_cases())
    def test_activations_agree_to_one_rounding_of_the_output(self, case: tuple[Tensor, LinearWeight, str]) -> None:
        x, weight, activation = case
        answer = weight.linear(x, activation).double()
        before = weight.linear(x).double().abs()
        with ops.use_backend("reference"):
            wanted = weight.linear(x, activation).double()
        finite = wanted.isfinite() & before.isfinite()
        limit = torch.finfo(x.dtype).eps * wanted.abs() + 3e-7 * before + torch.finfo(x.dtype).smallest_normal
        assert bool(((answer - wanted).abs() <= limit)[finite].all())

    @pytest.mark.parametrize("length", [32_768, 40_000, 70_001])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_sums_beyond_the_range_of_int32_are_exact(self, length: int, symmetric: bool) -> None:
        weight = LinearWeight(
            codes=torch.full((3, length), 127, dtype=torch.int8),
            scale=torch.ones(3, 1),
            zero_point=None if symmetric else torch.full((3, 1), -128, dtype=torch.int8),
            bias=None,
        )
        x = torch.rand(2, length) + 0.5
        answer = weight.linear(x), weight.linear_packed(x)
        with ops.use_backend("reference"):
            wanted = weight.linear(x)
        assert same_bits(answer[0], wanted)
        assert same_bits(answer[1], wanted)

    @pytest.mark.parametrize("in_features", [1, 15, 64, 100, 576])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_the_plain_layout_gives_the_bits_of_the_tiles_for_any_number_of_rows(
        self, in_features: int, symmetric: bool
    ) -> None:
        # Few rows meet the plain weight as it is, more rows meet tiles made for the call.
        weight = LinearWeight.random(67, in_features, symmetric=symmetric)
        x = torch.randn(40, in_features, generator=torch.Generator().manual_seed(1))
        wanted = weight.linear_packed(x)
        for count in range(1, 41):
            assert same_bits(weight.linear(x[:count]), wanted[:count]), count

    def test_a_row_with_an_infinity_is_nan_and_harms_no_other(self) -> None:
        weight = LinearWeight.random(20, 70)
        x = torch.randn(9, 70)
        clean = weight.linear_packed(x)
        x[4, 33], x[6, 69] = torch.inf, torch.nan
        answer = weight.linear_packed(x)
        broken = torch.tensor([4, 6])
        assert bool(answer[broken].isnan().all())
        others = [row for row in range(9) if row not in (4, 6)]
        assert torch.equal(answer[others], clean[others])

    def test_a_row_does_not_depend_on_the_batch_or_the_threads(self, threads: int) -> None:
        weight = LinearWeight.random(200, 300)
        codes = pack_int32(torch.randint(-8, 8, (200, 256), dtype=torch.int8), 4)
        scale = torch.rand(200, 4)
        x = torch.randn(333, 300)
        half = torch.randn(200, 256).half()
        many = weight.linear_packed(x)
        narrow = x[:, :256]
        weight_only = OPS.linear_weight_only(narrow, codes, scale, None, None, 256, 4, 64)
        float16 = OPS.linear_half(narrow, half, None)
        for first, count in ((0, 1), (7, 2), (100, 5), (250, 83)):
            part = slice(first, first + count)
            assert torch.equal(weight.linear_packed(x[part]), many[part])
            assert torch.equal(
                OPS.linear_weight_only(narrow[part], codes, scale, None, None, 256, 4, 64), weight_only[part]
            )
            assert torch.equal(OPS.linear_half(narrow[part], half, None), float16[part])

    @given(
        m=st.integers(1, 70), n=st.sampled_from(SIZES), groups=st.integers(1, 5), bits=st.sampled_from([4, 8]),
        size=st.sampled_from([7, 16, 32, 64, 96, 100, 131]), symmetric=st.booleans(), dtype=st.sampled_from(DTYPES),
    )  # fmt: skip
    def test_rows_meet_weights_of_few_bits_the_same_way_alone_and_together(
        self, m: int, n: int, groups: int, bits: int, size: int, symmetric: bool, dtype: torch.dtype
    ) -> None:
        weight = quantize_weight_groupwise(torch.randn(n, groups * size), size, symmetric, bits)
        if weight.zero_point is not None and n % 2:
            # As some algorithms choose them: not a number that the weight's bits could hold.
            zero_point = torch.randint(-128, 128, weight.zero_point.shape, dtype=torch.int8)
            weight = dataclasses.replace(weight, zero_point=zero_point)
        packed = pack_int32(weight.codes, bits)
        x = torch.randn(m, groups * size) * torch.logspace(-30, 30, m).unsqueeze(1)
        # Denormal numbers, and a row that is broken.
        x[0] *= 1e-9
        x[-1, 0] = torch.inf
        x = x.to(dtype)

        def run(part: Tensor) -> Tensor:
            return OPS.linear_weight_only(
                part, packed, weight.scale, weight.zero_point, None, groups * size, bits, size
            )

        together = run(x)
        for first, last in ((0, 1), (m - 1, m), (m // 2, m // 2 + 3), (m // 3, m), (0, min(m, 17))):
            assert same_bits(run(x[first:last]), together[first:last])
        finite = x.isfinite().all(1)
        exact = x[finite].double() @ weight.dequantize().double().t()
        magnitude = x[finite].double().abs() @ weight.dequantize().double().abs().t()
        # Units for bfloat16 treat denormal numbers as zeros.
        assert_rounded_from(together[finite], exact, magnitude * (x.shape[1] + 4) / 6 + 1e-30)

    def test_eight_threads_at_once_get_their_own_answers(self) -> None:
        weight = LinearWeight.random(96, 130)
        inputs = [torch.randn(1 + 9 * i, 130) for i in range(16)]
        wanted = [weight.linear_packed(x, "gelu") for x in inputs]
        with ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(lambda x: weight.linear_packed(x, "gelu"), inputs * 4))
        assert all(torch.equal(answer, wanted[i % 16]) for i, answer in enumerate(answers))


class TestActivationsOnTheirOwn:
    @pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
    def test_the_curves_are_right_to_float32_rounding_of_their_argument(self, isa: str, activation: str) -> None:
        # With a weight of zeros the output is the activation of the bias.
        bias = torch.linspace(-12, 12, 40_001)
        weight = LinearWeight(torch.zeros(len(bias), 1, dtype=torch.int8), torch.ones(len(bias), 1), None, bias)
        answer = weight.linear_packed(torch.zeros(1, 1), activation)[0].double()
        exact, _ = weight.exact(torch.zeros(1, 1), activation)
        spacing = torch.finfo(torch.float32).eps * bias.double().abs().clamp(min=1e-30)
        assert bool(((answer - exact[0]).abs() <= 2 * spacing).all())


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
class TestObjectCode:
    """No instruction outside the chosen set is in a unit's code, as the linker left it."""

    # What is in no kernel unit runs before an instruction set is chosen.
    WIDER = {  # noqa: RUF012
        "kernels_generic.cpp": ("%ymm", "%zmm"),
        "kernels_avx2.cpp": ("%zmm", "%k1", "%xmm16", "%ymm16", "%ymm31", "vpdp"),
        "kernels_avxvnni.cpp": ("%zmm", "%k1", "%xmm16", "%ymm16", "%ymm31"),
        "kernels_avx512vnni.cpp": ("vdpbf16ps", "%tmm"),
        "kernels_avx512bf16.cpp": ("%tmm",),
        **{path.name: ("%ymm", "%zmm") for path in CSRC.glob("ops_*.cpp")},
        "isa.cpp": ("%ymm", "%zmm"),
    }

    @staticmethod
    def _objdump(option: str) -> str:
        return subprocess.run(
            ["objdump", option, str(native.LIBRARY)], capture_output=True, text=True, check=True
        ).stdout

    def _code_by_unit(self) -> dict[str, list[str]]:
        unit_of: dict[str, str] = {}
        unit = ""
        for line in self._objdump("-t").splitlines():
            fields = line.split()
            if " df *ABS*" in line:
                unit = fields[-1]
            elif " F .text" in line and " l " in line:
                unit_of[fields[0]] = unit
        code: dict[str, list[str]] = {}
        for block in self._objdump("-d").split("\n\n"):
            address = block.lstrip().split(" ", 1)[0]
            if address in unit_of:
                code.setdefault(unit_of[address], []).append(block)
        return code

    def test_no_unit_holds_wider_registers_than_its_own(self) -> None:
        code = self._code_by_unit()
        for unit, wider in self.WIDER.items():
            assert code[unit], unit
            assert not [word for word in wider if any(word in block for block in code[unit])], unit
        # The check sees what it looks for where it belongs.
        assert any("%zmm" in block for block in code["kernels_avx512vnni.cpp"])
        assert any("vdpbf16ps" in block for block in code["kernels_avx512bf16.cpp"])
        assert any("tdpbf16ps" in block for block in code["kernels_amx.cpp"])
        assert any("%ymm" in block for block in code["kernels_avx2.cpp"])
        assert any("{vex} vpdpbusd" in block for block in code["kernels_avxvnni.cpp"])
