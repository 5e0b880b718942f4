"""What the PyTorch backend keeps between calls follows the weight it was computed from."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mono_quant import ops
from mono_quant.ops import torch_cpu
from tests.ops.operands import ConvWeight, LinearWeight

X = torch.linspace(-1, 2, 5 * 40).reshape(5, 40)
IMAGE = torch.linspace(-1, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)


def run_linear() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    weight = LinearWeight.random(20, 40, symmetric=False)

    def run(codes: Tensor) -> Tensor:
        weight.codes = codes
        return weight.linear(X)

    return weight.codes, run


def run_conv() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    weight = ConvWeight.random(6, 4, (3, 3), padding=1, symmetric=False)

    def run(codes: Tensor) -> Tensor:
        weight.codes = codes
        return weight.convolve(IMAGE)

    return weight.codes, run


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("operator", [run_linear, run_conv])
class TestAWeightThatIsWrittenTo:
    def check(self, codes: Tensor, run: Callable[[Tensor], Tensor], write: Callable[[Tensor], object]) -> None:
        before = run(codes)
        write(codes)
        after = run(codes)
        assert not torch.equal(before, after)
        assert torch.equal(after, run(codes.clone()))

    def test_in_place(self, operator: Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        codes, run = operator()
        self.check(codes, run, lambda w: w.copy_(w.flip(0)))
        self.check(codes, run, lambda w: w[2:4].fill_(5))
        self.check(codes, run, lambda w: w.view(-1)[7:70].zero_())

    def test_by_loading_a_state_dict(self, operator: Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        codes, run = operator()
        module = torch.nn.Module()
        module.register_buffer("weight", codes)
        self.check(codes, run, lambda w: module.load_state_dict({"weight": w.flip(0).clone()}))

    def test_inside_inference_mode(self, operator: Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        codes, run = operator()
        with torch.inference_mode():
            self.check(codes, run, lambda w: w.copy_(w.flip(0)))
            made_here = codes.clone()
            assert made_here.is_inference()
            self.check(made_here, run, lambda w: w.copy_(w.flip(0)))
        assert torch.equal(run(made_here), run(codes * 1)) == torch.equal(made_here, codes)

    def test_by_exchanging_its_data(self, operator: Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        codes, run = operator()

        def exchange(weight: Tensor) -> None:
            weight.data = weight.flip(0).contiguous()

        self.check(codes, run, exchange)


def test_what_is_kept_goes_with_its_weight() -> None:
    with ops.use_backend("torch"):
        weight = LinearWeight.random(20, 40)
        weight.linear(X)
    if not torch_cpu.integer_products_are_exact():
        pytest.skip("this processor multiplies in the reference, which keeps nothing")
    sums = weakref.ref(torch_cpu._column_sums.get(weight.codes))
    assert sums() is torch_cpu._column_sums.get(weight.codes)
    del weight
    gc.collect()
    assert sums() is None


def test_without_exact_integer_products_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, conv = LinearWeight.random(20, 40, symmetric=False), ConvWeight.random(6, 4, (3, 3), symmetric=False)
    with ops.use_backend("reference"):
        expected = weight.linear(X), conv.convolve(IMAGE)
    monkeypatch.setattr(torch_cpu, "integer_products_are_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    with ops.use_backend("torch"):
        assert torch.equal(weight.linear(X), expected[0])
        assert torch.equal(conv.convolve(IMAGE), expected[1])


@pytest.mark.parametrize("length", [3, 40, 2000])
def test_rows_in_several_blocks_are_the_rows_in_one(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = LinearWeight.random(30, length, symmetric=False), torch.randn(50, length)
    with ops.use_backend("torch"):
        expected = weight.linear(x), *torch.ops.mono_quant.quantize_rows(x)
        monkeypatch.setattr(torch_cpu, "_BLOCK_ELEMENTS", 7 * length)
        answers = weight.linear(x), *torch.ops.mono_quant.quantize_rows(x)
    for answer, wanted in zip(answers, expected, strict=True):
        assert torch.equal(answer, wanted)
