"""The safetensors file format: written tensor by tensor, read lazily through the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mono_quant.errors import CheckpointError

_CODES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES: Final = {code: dtype for dtype, code in _CODES.items()}


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; only one tensor at a time is copied, if it is not contiguous or not on the CPU.

    The format is a header of JSON (names, dtypes, shapes, byte ranges) after its length in 8 little-endian bytes,
    then the tensors' bytes without gaps: https://github.com/huggingface/safetensors.

    Args:
        stream: A binary file.
        tensors: What to store; tensors that share memory are each written out.
        metadata: Strings for the header.

    Raises:
        CheckpointError: A dtype has no counterpart in the format.
        OSError: The stream cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # The widest first: every tensor then begins at a multiple of its element size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES or name in header:
            what = f"its dtype is {tensor.dtype}" if tensor.dtype not in _CODES else "the name is reserved"
            raise CheckpointError(
                f"tensor {name!r} cannot be stored in a safetensors file: {what}",
                suggestion="Save to a .pt file, or convert the tensor.",
            )
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    stream.write(len(encoded).to_bytes(8, "little"))
    stream.write(encoded)
    for name in order:
        # Elements of every dtype as bytes, which numpy can hand to the file without a copy.
        flat = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            stream.write(flat.view(torch.uint8).numpy().data)


class SafetensorsFile:
    """An open safetensors file: names and shapes at once, tensors when they are read.

    Raises:
        CheckpointError: The file is not readable as such.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]
            self._names = frozenset(self._file.keys())
        except (SafetensorError, OSError, UnicodeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file, or is truncated or damaged ({error})",
                suggestion="Copy or download it again, and check that its suffix fits its contents.",
            ) from error

    @property
    def names(self) -> frozenset[str]:
        return self._names

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self._file.metadata() or {})

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Answer shape and dtype of a tensor without reading it.

        Raises:
            CheckpointError: Its dtype is none of PyTorch's.
        """
        piece = self._file.get_slice(name)
        code = str(piece.get_dtype())
        if code not in _DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} has the dtype {code}, which is not supported")
        return tuple(piece.get_shape()), _DTYPES[code]

    def read(self, name: str) -> Tensor:
        """Answer a tensor that is mapped from the file; writing to it does not change the file."""
        self.describe(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def close(self) -> None:
        self._file.__exit__(None, None, None)
