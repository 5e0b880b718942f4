"""Quantizing leaves its inputs alone and allocates its results and little else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant.core import (
    QuantizedTensor,
    quantize_weight_fp16,
    quantize_weight_groupwise,
    quantize_weight_int4,
    quantize_weight_int8,
    quantize_weight_int8_per_tensor,
)
from tests.core.strategies import (
    channels,
    typed_weights,
)


def snapshot(tensor: Tensor) -> tuple[bytes, torch.Size, tuple[int, ...]]:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes(), tensor.shape, tensor.stride()


class TestInputsAreLeftAlone:
    @given(weight=typed_weights(), symmetric=st.booleans())
    def test_never_modified_and_never_aliased(self, weight: Tensor, symmetric: bool) -> None:
        before = snapshot(weight)
        results: list[Tensor] = []
        for quantized in (
            quantize_weight_int8(weight, symmetric),
            quantize_weight_int8(weight, symmetric, axis=1),
            quantize_weight_int8_per_tensor(weight, symmetric),
            quantize_weight_groupwise(weight, 1, symmetric),
        ):
            results += [quantized.codes, quantized.scale, quantized.dequantize()]
        results += quantize_weight_int4(weight, 1, symmetric)
        for result in results:
            assert result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
            result.zero_()
        assert snapshot(weight) == before

    def test_a_float16_weight_is_copied_and_not_shared(self) -> None:
        weight = torch.randn(3, 4).half()
        assert quantize_weight_fp16(weight).data_ptr() != weight.data_ptr()

    @given(weight=channels(), symmetric=st.booleans())
    def test_dequantizing_leaves_the_codes_alone(self, weight: Tensor, symmetric: bool) -> None:
        quantized = quantize_weight_int8(weight, symmetric)
        before = snapshot(quantized.codes), snapshot(quantized.scale)
        quantized.dequantize().fill_(7)
        assert (snapshot(quantized.codes), snapshot(quantized.scale)) == before


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest storage that any PyTorch operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


class TestMemory:
    ROWS, COLUMNS = 2048, 4096  # 8 million weights, 32 MiB in float32
    FEW_MEGABYTES = 4 << 20

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_quantizing_a_large_weight_allocates_its_codes_and_little_else(
        self, dtype: torch.dtype, symmetric: bool
    ) -> None:
        weight = torch.empty(self.ROWS, self.COLUMNS, dtype=dtype).uniform_(-1, 1)
        with LargestAllocation() as largest:
            quantize_weight_int8(weight, symmetric)
        assert largest.nbytes <= weight.numel()
        for axis_less in (quantize_weight_int8_per_tensor, lambda w, s: quantize_weight_groupwise(w, 64, s)):
            with LargestAllocation() as largest:
                axis_less(weight, symmetric)
            assert largest.nbytes <= weight.numel()

    def test_dequantizing_allocates_its_result_and_little_else(self) -> None:
        codes = torch.zeros(self.ROWS, self.COLUMNS, dtype=torch.int8)
        quantized = QuantizedTensor(codes, torch.ones(self.ROWS))
        with LargestAllocation() as largest:
            quantized.dequantize(torch.bfloat16)
        assert largest.nbytes <= 2 * codes.numel()

    def test_the_resident_peak_is_the_codes_and_a_few_megabytes(self) -> None:
        weight = torch.empty(self.ROWS, self.COLUMNS).uniform_(-1, 1)
        quantize_weight_int8(weight[:8])
        with torch.profiler.profile(profile_memory=True) as profile:
            quantize_weight_int8(weight)
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        assert weight.numel() <= peak <= weight.numel() + self.FEW_MEGABYTES
