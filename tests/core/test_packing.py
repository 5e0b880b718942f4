"""Packed words are those of compressed-tensors, tiles are those of the kernels, and both can be undone."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import pack_int32, pack_tiles, unpack_int32, unpack_tiles
from mono_quant.errors import ConfigurationError, InputError


@st.composite
def codes(draw: st.DrawFn, bits: int, min_dims: int = 1, max_dims: int = 3) -> Tensor:
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=0, max_side=20))
    limit = 1 << (bits - 1)
    return torch.from_numpy(draw(hnp.arrays("int8", shape, elements=st.integers(-limit, limit - 1))))


def as_unsigned(words: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.tolist()]


class TestWords:
    @pytest.mark.parametrize(
        ("bits", "values", "word"),
        [
            (4, [1, 2, 3, 4, 5, 6, 7, 0], 0x8FEDCBA9),
            (4, [-1, -2, -3, -4, -5, -6, -7, -8], 0x01234567),
            (8, [0, 1, -1, -128], 0x007F8180),
        ],
    )
    def test_published_vectors(self, bits: int, values: list[int], word: int) -> None:
        packed = pack_int32(torch.tensor(values, dtype=torch.int8), bits)
        assert packed.dtype == torch.int32
        assert as_unsigned(packed) == [word]
        assert unpack_int32(packed, bits, len(values)).tolist() == values

    @pytest.mark.parametrize("bits", [4, 8])
    @given(data=st.data())
    def test_each_code_stands_at_its_bit(self, bits: int, data: st.DataObject) -> None:
        row = data.draw(codes(bits, max_dims=1))
        words = as_unsigned(pack_int32(row, bits))
        expected = [0] * -(-len(row) * bits // 32)
        for index, code in enumerate(row.tolist()):
            expected[index // (32 // bits)] |= (code + 2 ** (bits - 1)) << bits * (index % (32 // bits))
        assert words == expected

    @pytest.mark.parametrize("bits", [4, 8])
    @given(data=st.data())
    def test_round_trip_of_any_shape(self, bits: int, data: st.DataObject) -> None:
        array = data.draw(codes(bits))
        packed = pack_int32(array, bits)
        assert packed.shape == (*array.shape[:-1], -(-array.shape[-1] * bits // 32))
        restored = unpack_int32(packed, bits, array.shape[-1])
        assert restored.dtype == torch.int8
        assert torch.equal(restored, array)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_transposed_array_packs_like_its_copy(self, bits: int) -> None:
        array = torch.randint(-8, 8, (16, 24), dtype=torch.int8).t()
        assert torch.equal(pack_int32(array, bits), pack_int32(array.contiguous(), bits))

    @pytest.mark.parametrize("code", [-9, 8, 127, -128])
    def test_a_code_that_does_not_fit_is_refused(self, code: int) -> None:
        with pytest.raises(InputError, match="4 bits"):
            pack_int32(torch.tensor([0, code], dtype=torch.int8), 4)

    @pytest.mark.parametrize("bits", [0, 2, 3, 16])
    def test_other_widths_are_refused(self, bits: int) -> None:
        with pytest.raises(ConfigurationError, match=f"bits={bits}"):
            pack_int32(torch.zeros(8, dtype=torch.int8), bits)
        with pytest.raises(ConfigurationError, match=f"bits={bits}"):
            unpack_int32(torch.zeros(1, dtype=torch.int32), bits, 8)

    @pytest.mark.parametrize("length", [0, 8, 17])
    def test_a_length_that_does_not_fit_the_words_is_refused(self, length: int) -> None:
        with pytest.raises(InputError, match=f"{length} codes"):
            unpack_int32(torch.zeros(3, 2, dtype=torch.int32), 4, length)

    def test_packing_does_not_modify_the_codes(self) -> None:
        array = torch.randint(-8, 8, (5, 16), dtype=torch.int8)
        before = array.clone()
        for bits in (4, 8):
            unpack_int32(pack_int32(array, bits).clone(), bits, 16).zero_()
        assert torch.equal(array, before)


class TestTiles:
    @given(array=codes(8, min_dims=2, max_dims=2))
    def test_round_trip(self, array: Tensor) -> None:
        tiles = pack_tiles(array)
        assert tiles.dtype == torch.int8
        assert tiles.is_contiguous()
        assert torch.equal(unpack_tiles(tiles, *array.shape), array)

    @pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (33, 128), (5, 200)])
    def test_layout(self, shape: tuple[int, int]) -> None:
        array = torch.randint(-128, 128, shape, dtype=torch.int8)
        tiles = pack_tiles(array)
        blocks_out, blocks_in = -(-shape[0] // 16), -(-shape[1] // 64)
        assert tiles.shape == (blocks_out, blocks_in, 16, 16, 4)
        padded = torch.zeros(blocks_out * 16, blocks_in * 64, dtype=torch.int8)
        padded[: shape[0], : shape[1]] = array
        nb, kb, kq, n, j = torch.meshgrid(*[torch.arange(size) for size in tiles.shape], indexing="ij")
        assert torch.equal(tiles, padded[nb * 16 + n, kb * 64 + kq * 4 + j])

    @pytest.mark.parametrize("shape", [(0, 0), (0, 70), (20, 0)])
    def test_nothing_has_no_tiles(self, shape: tuple[int, int]) -> None:
        tiles = pack_tiles(torch.zeros(shape, dtype=torch.int8))
        assert tiles.numel() == 0
        assert unpack_tiles(tiles, *shape).shape == shape

    @pytest.mark.parametrize("size", [(16, 65), (17, 64), (0, 64), (1000, 1000)])
    def test_tiles_of_another_size_are_refused(self, size: tuple[int, int]) -> None:
        with pytest.raises(InputError, match=f"{size[0]} x {size[1]}"):
            unpack_tiles(pack_tiles(torch.zeros(16, 64, dtype=torch.int8)), *size)

    def test_tiles_are_a_copy_even_where_nothing_moves(self) -> None:
        array = torch.zeros(16, 4, dtype=torch.int8)
        pack_tiles(array).fill_(1)
        assert int(array.abs().max()) == 0
