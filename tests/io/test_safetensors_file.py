"""The writer agrees with the safetensors library, and the reader reads lazily."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import Tensor

from mono_quant import CheckpointError
from mono_quant.io.safetensors_file import SafetensorsFile, write_safetensors
from tests.io.models import same_bits

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.bool,
]  # fmt: skip


def tensor_of(dtype: torch.dtype, shape: list[int]) -> Tensor:
    size = torch.empty(shape, dtype=dtype).nbytes
    octets = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return octets.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def written(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    write_safetensors(stream, tensors, metadata or {})
    return stream.getvalue()


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_the_library_reads_what_is_written_to_the_bit(kinds: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: tensor_of(dtype, shape) for name, (dtype, shape) in kinds.items()}
    loaded = load(written(tensors))
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_strided_tensors_are_written_by_their_values() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "sliced": base[::2, 1::2],
        "expanded": base[:1].expand(3, 6),
        "conjugate": torch.complex(base, base).conj(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    loaded = load(written(tensors))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(written({"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2), "c": torch.ones(1).double()}))
    file = SafetensorsFile(path)
    assert all(file.read(name).data_ptr() % file.read(name).element_size() == 0 for name in file.names)
    file.close()


def test_metadata_and_descriptions_are_read_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2, 3, dtype=torch.bfloat16)}, path, metadata={"key": "value"})
    file = SafetensorsFile(path)
    assert file.names == {"a"}
    assert file.metadata == {"key": "value"}
    assert file.describe("a") == ((2, 3), torch.bfloat16)
    file.close()


def test_writing_to_a_tensor_that_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    file = SafetensorsFile(path)
    file.read("a").fill_(7)
    file.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("tensors", [{"a": torch.ones(2, dtype=torch.complex128)}, {"__metadata__": torch.ones(2)}])
def test_what_the_format_cannot_hold_is_refused_by_name(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=f"tensor '{next(iter(tensors))}' cannot be stored"):
        written(tensors)
