"""Layouts of integer codes: the packed int32 words of checkpoints and the tiles that the kernels read."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_quant.errors import ConfigurationError, InputError

# The kernels' tile: 16 output channels by 64 inputs, four consecutive inputs of one channel side by side. It is the
# operand order of VNNI's four-way dot product and, with 16 rows of 64 bytes, the B tile of AMX.
TILE_OUT: Final = 16
TILE_IN: Final = 64


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes into 32-bit words along the last axis, as compressed-tensors' ``pack-quantized`` does.

    Element ``i`` becomes the unsigned number ``code + 2**(bits - 1)`` in word ``i // (32 / bits)`` at bit
    ``bits * (i mod 32 / bits)``, lowest bits first. The last word is padded with zero bits.

    Args:
        codes: int8 ``[..., n]`` within the range of ``bits``.
        bits: 4 or 8.

    Returns:
        int32 ``[..., ceil(n * bits / 32)]``.

    Raises:
        ConfigurationError: ``bits`` is neither 4 nor 8.
        InputError: A code does not fit.
    """
    per_word = _codes_per_word(bits)
    offset = 1 << (bits - 1)
    if codes.numel() and (int(codes.min()) < -offset or int(codes.max()) >= offset):
        raise InputError(f"codes outside [{-offset}, {offset - 1}] do not fit into {bits} bits")
    unsigned = (codes.to(torch.int16) + offset).to(torch.uint8)
    unsigned = F.pad(unsigned, (0, -codes.shape[-1] % per_word))
    if bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    # Bytes in ascending order are the little-endian word; reading them as such needs no 64-bit intermediate.
    quads = torch.unflatten(unsigned.to(torch.int32), -1, (-1, 4))
    low = quads[..., 0] | (quads[..., 1] << 8) | (quads[..., 2] << 16)
    # The top byte carries the sign; bringing it into [-128, 127] first keeps the shift within int32.
    top = torch.where(quads[..., 3] > 127, quads[..., 3] - 256, quads[..., 3]) << 24
    return low | top


def unpack_int32(words: Tensor, bits: int, length: int) -> Tensor:
    """Undo :func:`pack_int32`.

    Args:
        words: int32 ``[..., ceil(length * bits / 32)]``.
        bits: 4 or 8.
        length: Codes in a row, ``n``.

    Returns:
        int8 ``[..., length]``.

    Raises:
        ConfigurationError: ``bits`` is neither 4 nor 8.
        InputError: There are too few or too many words for ``length``.
    """
    per_word = _codes_per_word(bits)
    expected = -(-length // per_word)
    if words.shape[-1] != expected:
        raise InputError(f"{length} codes of {bits} bits fill {expected} words a row, found {words.shape[-1]}")
    offset = 1 << (bits - 1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    # The shift is arithmetic; the mask drops the copies of the sign bit again.
    fields = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    codes: Tensor = (fields - offset).to(torch.int8).flatten(-2)[..., :length]
    return codes


def _codes_per_word(bits: int) -> int:
    if bits not in (4, 8):
        raise ConfigurationError(f"bits={bits} cannot be packed; expected 4 or 8")
    return 32 // bits


def pack_tiles(codes: Tensor) -> Tensor:
    """Reorder int8 ``[out, in]`` into the kernels' tiles ``[ceil(out/16), ceil(in/64), 16, 16, 4]``, padded with 0.

    ``tiles[nb, kb, kq, n, j] == codes[16 * nb + n, 64 * kb + 4 * kq + j]``.
    """
    out_features, in_features = codes.shape
    padded = F.pad(codes, (0, -in_features % TILE_IN, 0, -out_features % TILE_OUT))
    blocks = padded.reshape(padded.shape[0] // TILE_OUT, TILE_OUT, padded.shape[1] // TILE_IN, TILE_IN // 4, 4)
    return blocks.permute(0, 2, 3, 1, 4).contiguous()


def unpack_tiles(tiles: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo :func:`pack_tiles`: answer int8 ``[out_features, in_features]``.

    Raises:
        InputError: The tiles are not those of a matrix of this size.
    """
    expected = (-(-out_features // TILE_OUT), -(-in_features // TILE_IN), TILE_IN // 4, TILE_OUT, 4)
    if tuple(tiles.shape) != expected:
        raise InputError(
            f"tiles of a {out_features} x {in_features} matrix have shape {expected}, found {tuple(tiles.shape)}"
        )
    rows = tiles.permute(0, 3, 1, 2, 4).reshape(expected[0] * TILE_OUT, expected[1] * TILE_IN)
    return rows[:out_features, :in_features].contiguous()
