"""Transposed convolutions stay in 8 bits: ordinary ones over images with zeros between their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mono_quant
from mono_quant.errors import CheckpointError
from mono_quant.graph.layers.spatial import spread
from mono_quant.graph.serialize import describe_static, restore_static
from mono_quant.graph.transposed import TransposedCall, convolution_of

FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[TransposedCall, list[int], list[int]]:
    """A geometry, its kernel and the image's sizes."""
    dims = draw(st.integers(1, 3))

    def each(least: int, most: int) -> list[int]:
        return [draw(st.integers(least, most)) for _ in range(dims)]

    stride, dilation, kernel, sizes = each(1, 3), each(1, 2), each(1, 3), each(1, 5)
    spare = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    padding = each(0, 3)
    for i in range(dims):
        # What PyTorch refuses, because nothing would be left, is no case.
        while (sizes[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + spare[i] + 1 < 1:
            padding[i] -= 1
    return TransposedCall(stride, padding, spare, dilation, draw(st.sampled_from((1, 2)))), kernel, sizes


@given(geometries(), st.booleans())
def test_a_convolution_over_the_spread_image_is_the_transposed_one(
    case: tuple[TransposedCall, list[int], list[int]], with_bias: bool
) -> None:
    call, kernel, sizes = case
    x = torch.randn(2, 4, *sizes, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64)
    bias = torch.randn(3 * call.groups, dtype=torch.float64) if with_bias else None
    expected = FUNCTIONS[len(sizes) - 1](
        x, weight, bias, call.stride, call.padding, call.output_padding, call.groups, call.dilation
    )
    conv, sides = convolution_of(call, weight, bias)
    found = conv(spread(x, call.stride, sides))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [0, 7])
def test_codes_are_spread_with_the_code_for_zero(value: int) -> None:
    x = torch.tensor([[[1, 2, 3]]], dtype=torch.uint8)
    assert spread(x, [2], [1, 2], value).tolist() == [[[value, 1, value, 2, value, 3, value, value]]]
    assert spread(x, [3], [-1, 0], value).tolist() == [[[value, value, 2, value, value, 3]]]
    assert spread(x, [2], [0, -3], value).tolist() == [[[1, value]]]


class Decoder(nn.Module):
    """A small network of the kind that transposed convolutions stand in: down, up, and a sum across."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8))
        self.last = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        return self.last(torch.relu(self.up(self.down(skip)) + skip))


def quantized(model: nn.Module, data: Tensor) -> Any:
    return mono_quant.quantize(model, calibration_data=data)


@pytest.mark.usefixtures("backend")
class TestDecoder:
    def test_it_stays_in_eight_bits_and_close_to_float(self) -> None:
        model, images = Decoder().eval(), torch.randn(16, 3, 16, 16)
        result = quantized(model, images)
        assert result.info.cuts == []
        assert result.info.not_captured is None
        assert {"up.0", "last"} <= set(result.info.selected_layers)
        assert result.info.output_sqnr_db > 25

    @pytest.mark.parametrize("batch", [0, 1, 5])
    def test_other_batches_and_sizes_work(self, batch: int) -> None:
        model = Decoder().eval()
        result = quantized(model, torch.randn(16, 3, 16, 16))
        images = torch.randn(batch, 3, 24, 12)
        expected, found = model(images), result.model(images)
        assert found.shape == expected.shape
        if batch:
            noise = (expected - found).square().sum()
            assert 10 * torch.log10(expected.square().sum() / noise) > 20

    def test_saving_keeps_every_bit(self, tmp_path: Path) -> None:
        images = torch.randn(8, 3, 16, 16)
        result = quantized(Decoder().eval(), images)
        result.save(tmp_path / "decoder.safetensors")
        loaded = mono_quant.load_model(tmp_path / "decoder.safetensors")
        assert torch.equal(loaded(images), result.model(images))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_number_of_dimensions_stays_in_eight_bits(dims: int) -> None:
    sizes = (9, 8, 5)[:dims]
    model = nn.Sequential(KINDS[dims - 1](4, 6, 3, stride=2, padding=1, output_padding=1, dilation=1), nn.ReLU()).eval()
    data = torch.randn(32, 4, *sizes)
    result = quantized(model, data)
    assert result.info.cuts == []
    assert result.info.output_sqnr_db > 25


def test_a_transposed_layer_named_in_skip_stays_in_float() -> None:
    model, images = Decoder().eval(), torch.randn(8, 3, 16, 16)
    result = mono_quant.quantize(model, calibration_data=images, skip=["last"])
    assert "last" in result.info.skip_reasons
    assert result.model(images).shape == model(images).shape


def test_a_damaged_description_is_refused() -> None:
    result = quantized(Decoder().eval(), torch.randn(8, 3, 16, 16))
    description = describe_static(result.model)
    steps = [step for step in description["graph"]["steps"] if step["layer"]["kind"] == "spread"]
    assert steps
    steps[0]["layer"]["spec"]["pad"] = [0, 0]
    with pytest.raises(CheckpointError, match="pad has 2 entries"):
        restore_static(description)
