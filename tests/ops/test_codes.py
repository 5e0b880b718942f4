"""Chains of steps on codes: every kernel answers what the specification does, whatever the shapes and threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from mono_quant import ops
from mono_quant.core import pack_tiles
from mono_quant.errors import ConfigurationError
from mono_quant.ops import codes, native
from mono_quant.ops.codes import Link
from tests.ops.code_chains import ConvCase, by_channel, chain, conv_case, conv_cases, images, join
from tests.ops.operands import OPS, REFUSED


def run(case: ConvCase) -> list[Tensor]:
    answers: list[Tensor] = OPS.run_codes(case.inputs, case.constants, case.program)
    return answers


def wanted(case: ConvCase) -> list[Tensor]:
    with ops.use_backend("reference"):
        return run(case)


@pytest.fixture(params=native.available_instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.instruction_set()
    assert before is not None
    with ops.use_backend("native"):
        native.set_instruction_set(request.param)
        yield request.param
        native.set_instruction_set(before)


@pytest.mark.usefixtures("isa")
class TestEveryInstructionSet:
    @given(case=conv_cases())
    def test_convolves_as_specified(self, case: ConvCase) -> None:
        (answer,), (want,) = run(case), wanted(case)
        assert (answer.shape, answer.dtype, answer.stride()) == (want.shape, want.dtype, want.stride())
        if case.finish == "silu":
            # The exponential is rounded differently: the neighbouring code at a tie.
            assert int((answer.int() - want.int()).abs().max()) <= 1
        else:
            assert torch.equal(answer, want)

    @pytest.mark.parametrize("padding", [(0, 0, 1, 0), (0, 0, 0, 2), (1, 0, 0, 0), (0, 1, 0, 0)])
    def test_a_kernel_of_one_pixel_is_padded_on_any_side(self, padding: tuple[int, int, int, int]) -> None:
        case = conv_case(4, 2, 16, 20, (1, 1), (6, 5), padding=padding)
        assert torch.equal(run(case)[0], wanted(case)[0])

    @pytest.mark.parametrize("batch", [1, 2, 7])
    @pytest.mark.parametrize("channels", [3, 8])
    def test_runs_a_chain_of_every_step_as_specified(self, batch: int, channels: int) -> None:
        case = chain(batch, channels=channels)
        for answer, want in zip(run(case), wanted(case), strict=True):
            assert torch.equal(answer, want)

    def test_large_images_are_divided_among_threads_and_groups_of_samples(self) -> None:
        case = chain(5, size=(130, 170), channels=16)
        before = torch.get_num_threads()
        want = wanted(case)
        try:
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                assert all(torch.equal(a, w) for a, w in zip(run(case), want, strict=True))
        finally:
            torch.set_num_threads(before)

    def test_sums_at_the_edge_of_int32_are_exact(self) -> None:
        # 65,536 products of 255 and -128 in one sum.
        weight = torch.full((2, 65_536), -128, dtype=torch.int8)
        pieces = [pack_tiles(weight), *(by_channel(t) for t in (torch.zeros(2).int(), torch.ones(2), torch.zeros(2)))]
        constants, starts = join(pieces)
        step = codes.ConvStep(
            2, 1, 1, 1, 1, 0, 0, 1, 1, 0, *starts, codes.FINISHES.index("float"), 1.0, 0.0, 0.0, 0, 0, 0.0, 0, 65_536,
            0, 0,
        )  # fmt: skip
        x = torch.full((1, 65_536, 1, 1), 255, dtype=torch.uint8)
        answer = OPS.run_codes([x], constants, codes.encode_program(1, [1], [Link(step, 0)]))[0]
        assert answer.flatten().tolist() == [-255.0 * 128 * 65_536] * 2

    def test_several_calls_at_once_get_their_own_answers(self) -> None:
        cases = [chain(1 + i % 3, size=(20 + i, 30), seed=i) for i in range(6)]
        want = [wanted(case) for case in cases]
        with ops.use_backend("native"), ThreadPoolExecutor(max_workers=6) as pool:
            answers = list(pool.map(run, cases * 3))
        for i, answer in enumerate(answers):
            assert all(torch.equal(a, w) for a, w in zip(answer, want[i % 6], strict=True))


@pytest.mark.usefixtures("backend")
class TestMeaning:
    def test_a_convolution_is_that_of_the_values(self) -> None:
        case = conv_case(1, 2, 5, 7, (3, 2), (9, 8), padding=(1, 0, 1, 1), finish="float", zero=11)
        step = codes.decode_program(case.program)[2][0].step
        assert isinstance(step, codes.ConvStep)
        weight = step.weight_of(case.constants).double()
        values = F.pad(case.inputs[0].double() - 11, (0, 1, 1, 1))
        scale = case.constants[step.scale : step.scale + 28].view(torch.float32).double()
        bias = case.constants[step.bias : step.bias + 28].view(torch.float32).double()
        exact = F.conv2d(values, weight) * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        torch.testing.assert_close(run(case)[0].double(), exact, rtol=1e-6, atol=1e-5)

    def test_codes_in_any_memory_order_give_the_same_answer(self) -> None:
        case = conv_case(2, 3, 6, 4, (3, 3), (7, 9))
        want = run(case)[0]
        case.inputs[0] = case.inputs[0].contiguous(memory_format=torch.contiguous_format)
        assert torch.equal(run(case)[0], want)
        case.inputs[0] = F.pad(case.inputs[0], (2, 1))[..., 2:-1]
        assert torch.equal(run(case)[0], want)

    def test_images_in_any_memory_order_give_the_same_codes(self) -> None:
        program = codes.encode_program(1, [1], [Link(codes.QuantizeStep(10.0, 100), 0)])
        x, nothing = torch.randn(2, 5, 6, 300) * 12, torch.zeros(0, dtype=torch.uint8)
        want = (x * 10).round().add(100).clamp(0, 255).to(torch.uint8)
        for image in (x, x.contiguous(memory_format=torch.channels_last), F.pad(x, (1, 1))[..., 1:-1]):
            assert torch.equal(OPS.run_codes([image], nothing, program)[0], want)

    def test_infinities_become_the_ends_and_nan_is_refused(self) -> None:
        program = codes.encode_program(1, [1], [Link(codes.QuantizeStep(1.0, 5), 0)])
        x, nothing = torch.zeros(1, 1, 2, 40), torch.zeros(0, dtype=torch.uint8)
        x[0, 0, 0, 0], x[0, 0, 1, 39] = torch.inf, -torch.inf
        answer = OPS.run_codes([x], nothing, program)[0]
        assert (int(answer[0, 0, 0, 0]), int(answer[0, 0, 1, 39]), int(answer[0, 0, 0, 7])) == (255, 0, 5)
        x[0, 0, 1, 39] = torch.nan
        with pytest.raises(REFUSED, match="NaN"):
            OPS.run_codes([x], nothing, program)

    @pytest.mark.parametrize("ceil_mode", [0, 1])
    @pytest.mark.parametrize("geometry", [(3, 2, 2, 2, 1, 1, 1, 1), (2, 3, 3, 1, 0, 1, 2, 1)])
    def test_maxima_are_those_of_pytorch(self, geometry: tuple[int, ...], ceil_mode: int) -> None:
        x = images(torch.Generator().manual_seed(0), 2, 5, 11, 13)
        step = codes.MaxPoolStep(*geometry, ceil_mode)
        answer = OPS.run_codes([x], torch.zeros(0, dtype=torch.uint8), codes.encode_program(1, [1], [Link(step, 0)]))[0]
        pairs = [geometry[i : i + 2] for i in range(0, 8, 2)]
        assert torch.equal(answer.float(), F.max_pool2d(x.float(), *pairs, ceil_mode=bool(ceil_mode)))

    @pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (2, 3)])
    def test_windows_may_reach_beyond_a_small_image_where_sizes_are_rounded_up(self, kernel: tuple[int, int]) -> None:
        x = images(torch.Generator().manual_seed(0), 2, 5, 2, 2)
        step = codes.MaxPoolStep(*kernel, 2, 2, 0, 0, 1, 1, 1)
        answer = OPS.run_codes([x], torch.zeros(0, dtype=torch.uint8), codes.encode_program(1, [1], [Link(step, 0)]))[0]
        assert torch.equal(answer.float(), F.max_pool2d(x.float(), kernel, 2, ceil_mode=True))

    @pytest.mark.parametrize("batch", [0, 1, 3])
    @pytest.mark.parametrize("size", [(2, 4), (4, 2), (1, 1), (0, 4), (0, 0)])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_an_image_smaller_than_the_windows_is_refused(self, size: tuple[int, int], batch: int, device: str) -> None:
        if device == "meta" and min(size) == 0:
            pytest.skip("shapes alone are not looked at so closely")
        # A division by the stride that rounds towards zero would find a window.
        case = conv_case(0, batch, 8, 8, (3, 3), size, stride=(2, 2))
        pool = codes.encode_program(1, [1], [Link(codes.MaxPoolStep(3, 3, 2, 2, 0, 0, 1, 1, 0), 0)])
        for program in (case.program, pool):
            with pytest.raises(REFUSED):
                OPS.run_codes([x.to(device) for x in case.inputs], case.constants.to(device), program)

    def test_padding_makes_up_for_a_small_image(self) -> None:
        case = conv_case(0, 2, 8, 8, (3, 3), (1, 2), padding=(1, 1, 1, 0))
        answer = run(case)[0]
        assert answer.shape == (2, 8, 1, 1)
        assert torch.equal(answer, wanted(case)[0])

    @pytest.mark.parametrize("shape", [(1, 3, 2902, 2902), (2, 1, 3000, 5700)])
    def test_a_mean_of_more_codes_than_an_int32_sum_holds_is_right(self, shape: tuple[int, ...]) -> None:
        assert shape[2] * shape[3] > 2**31 // 255
        x = torch.full(shape, 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        x[-1, -1] = 254
        program = codes.encode_program(1, [1], [Link(codes.GlobalAverageStep(5, 0.5, 0), 0)])
        answer = OPS.run_codes([x], torch.zeros(0, dtype=torch.uint8), program)[0]
        expected = torch.full(shape[:2], 125.0)
        expected[-1, -1] = 124.5
        torch.testing.assert_close(answer, expected, rtol=1e-6, atol=0)
        with ops.use_backend("reference"):
            assert torch.equal(answer, OPS.run_codes([x], torch.zeros(0, dtype=torch.uint8), program)[0])

    def test_a_mean_over_no_pixels_is_nan_as_that_of_floats(self) -> None:
        program = codes.encode_program(1, [1], [Link(codes.GlobalAverageStep(3, 0.5, 0), 0)])
        nothing = torch.zeros(0, dtype=torch.uint8)
        answer = OPS.run_codes([torch.zeros(2, 5, 0, 3, dtype=torch.uint8)], nothing, program)[0]
        assert answer.shape == (2, 5)
        assert bool(answer.isnan().all())

    @pytest.mark.parametrize("first", [True, False])
    def test_a_product_takes_a_gate_of_one_pixel_on_either_side(self, first: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        x, gate = images(generator, 2, 19, 4, 5), images(generator, 2, 19, 1, 1)
        zeros = (7, 9) if first else (9, 7)
        step = codes.MultiplyStep(*zeros, 0.01, -20.0, 235.0, 20)
        program = codes.encode_program(2, [2], [Link(step, 0, 1)])
        inputs = [gate, x] if first else [x, gate]
        answer = OPS.run_codes(inputs, torch.zeros(0, dtype=torch.uint8), program)[0]
        product = (x.int() - 9) * (gate.int() - 7)
        assert torch.equal(answer, ((product.float() * 0.01).clamp(-20, 235).round() + 20).to(torch.uint8))

    def test_an_empty_batch_has_an_empty_answer(self) -> None:
        case = chain(1)
        answer = OPS.run_codes([case.inputs[0][:0]], case.constants, case.program)
        assert [a.shape[0] for a in answer] == [0, 0]
        assert answer[1].shape == (0, 24)


class TestWriting:
    def test_what_is_written_reads_the_same(self) -> None:
        inputs, outputs, links = codes.decode_program(chain().program)
        assert codes.encode_program(inputs, outputs, links) == chain().program
        assert {type(link.step) for link in links} == set(codes.KINDS)

    @pytest.mark.parametrize("text", ["", "1 1", "1 1 1 1 99 1 0 -1 0", "one", "1 2 1 1 1 7 1 0 -1 1 0"])
    def test_a_damaged_text_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="damaged"):
            codes.decode_program(text)

    @pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())
    @pytest.mark.parametrize("what", ["constants", "text", "channels", "values", "letters", "outputs"])
    def test_the_kernels_refuse_what_would_read_outside(self, what: str) -> None:
        case = conv_case(0, 1, 8, 8, (3, 3), (6, 6))
        if what == "constants":
            case.constants = case.constants[:256].clone()
        elif what == "text":
            case.program = case.program[:-8]
        elif what == "channels":
            case.inputs[0] = images(torch.Generator(), 1, 9, 6, 6)
        elif what == "values":
            case.program = case.program.replace("1 1 1 1 1 1 0 -1", "1 1 1 1 1 1 2 -1", 1)
        elif what == "outputs":
            case.program = case.program.replace("1 1 1 1", "1 2 1 1 1", 1)
        else:
            case.program += " x"
        with ops.use_backend("native"), pytest.raises(RuntimeError, match="mono_quant"):
            run(case)

    @pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())
    @pytest.mark.parametrize("start", [0, 64, -64, 1])
    def test_the_kernels_refuse_a_table_beyond_the_constants(self, start: int) -> None:
        program = codes.encode_program(1, [1], [Link(codes.TableStep(start), 0)])
        x = images(torch.Generator().manual_seed(0), 4, 8, 20, 20)
        constants = torch.zeros(255, dtype=torch.uint8)
        with ops.use_backend("native"), pytest.raises(RuntimeError, match="constants"):
            OPS.run_codes([x], constants, program)

    @pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())
    @pytest.mark.parametrize("what", ["input", "empty", "step"])
    def test_the_kernels_refuse_values_that_no_memory_holds(self, what: str) -> None:
        case = conv_case(0, 1, 8, 8, (3, 3), (6, 6))
        if what == "step":
            link = codes.decode_program(case.program)[2][0]
            case.program = codes.encode_program(1, [1], [replace(link, step=replace(link.step, outputs=1 << 50))])  # type: ignore[type-var]
        else:
            # One element that stands for all: 2**62 of them, or none.
            sides = (1 << 31, 1 << 31) if what == "input" else (0, 1 << 62)
            case.inputs[0] = torch.zeros(1, 8, 1, 1, dtype=torch.uint8)[:, :1].expand(1, 1, *sides)
            case.program = codes.encode_program(1, [1], [Link(codes.MultiplyStep(0, 0, 1.0, 0.0, 255.0, 0), 0, 0)])
        with ops.use_backend("native"), pytest.raises(RuntimeError, match=r"mono_quant.*(large|shape)"):
            run(case)
