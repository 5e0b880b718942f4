"""What a file of tensors holds, and whether a checkpoint is sound by itself."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mono_quant.errors import CheckpointError
from mono_quant.graph import described_ranges
from mono_quant.io import load_model
from mono_quant.io.checkpoint import checkpoint_path, open_checkpoint
from mono_quant.io.header import CheckpointHeader
from mono_quant.io.static_record import StaticRecord
from mono_quant.report.round_trip import round_trip_faults
from mono_quant.report.validation import ValidationResult, check_weights, report_failures, require_on_failure
from mono_quant.report.weights import quantized_layers


@dataclass(frozen=True)
class DtypeUse:
    """Tensors of one dtype: how many, their elements, their bytes."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class FileSummary:
    """What a file of tensors holds.

    Attributes:
        path: The file (in a directory of transformers, the one with the weights).
        file_bytes: Its size.
        dtypes: The use of each dtype, the one with most bytes first; tied tensors count once.
        header: What mono_quant wrote about it; ``None`` in a file of another program.
    """

    path: Path
    file_bytes: int
    dtypes: dict[str, DtypeUse]
    header: CheckpointHeader | None

    @property
    def tensors(self) -> int:
        return sum(use.tensors for use in self.dtypes.values())

    @property
    def tensor_bytes(self) -> int:
        return sum(use.bytes for use in self.dtypes.values())

    def to_dict(self) -> dict[str, Any]:
        """Answer the summary as plain values."""
        values: dict[str, Any] = {
            "path": str(self.path),
            "file_bytes": self.file_bytes,
            "tensors": self.tensors,
            "tensor_bytes": self.tensor_bytes,
            "dtypes": {name: vars(use) for name, use in self.dtypes.items()},
            "format_version": None,
            "library_version": None,
            "layers": {},
            "skipped": {},
            "tied": {},
            "measurements": {},
            "static": None,
        }
        if self.header is not None:
            header = self.header
            values |= {
                "format_version": header.format_version,
                "library_version": header.library_version,
                "layers": {name: _record(record) for name, record in header.layers.items()},
                "skipped": dict(header.skipped),
                "tied": dict(header.tied),
                "measurements": dict(header.measurements),
                "static": None if header.static is None else _static(header.static),
            }
        return values


def _static(record: StaticRecord) -> dict[str, Any]:
    return {
        "kind": record.model["kind"],
        "samples": record.samples,
        "output_sqnr_db": record.output_sqnr_db,
        "not_captured": record.not_captured,
        "cuts": [asdict(cut) for cut in record.cuts],
        "ranges": {name: asdict(found) for name, found in described_ranges(record.model).items()},
    }


def _record(record: Any) -> dict[str, Any]:
    dtype = None if record.float_dtype is None else str(record.float_dtype).removeprefix("torch.")
    return {"scheme": record.scheme.to_dict(), "float_type": record.float_type, "float_dtype": dtype}


def inspect_file(path: str | Path, allow_pickle: bool = False) -> FileSummary:
    """Answer what a file of tensors holds; of a safetensors file only the header is read.

    Args:
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file, or a directory with ``model.safetensors``.
        allow_pickle: Whether a ``.pt`` file may be unpickled, which can run code.

    Raises:
        CheckpointError: The file cannot be read.
    """
    with open_checkpoint(checkpoint_path(path), allow_pickle) as checkpoint:
        uses: dict[torch.dtype, list[int]] = {}
        for name in checkpoint.file.names:
            shape, dtype = checkpoint.file.describe(name)
            elements = math.prod(shape)
            use = uses.setdefault(dtype, [0, 0, 0])
            for position, amount in enumerate((1, elements, elements * dtype.itemsize)):
                use[position] += amount
        ordered = sorted(uses.items(), key=lambda item: (-item[1][2], str(item[0])))
        dtypes = {str(dtype).removeprefix("torch."): DtypeUse(*use) for dtype, use in ordered}
        return FileSummary(checkpoint.path, checkpoint.path.stat().st_size, dtypes, checkpoint.header)


def validate_checkpoint(path: str | Path, on_failure: str = "error", allow_pickle: bool = False) -> ValidationResult:
    """Check a checkpoint without its original.

    The checks: the file is whole and has a header; every layer of the header has its tensors in the right dtypes and
    shapes, and every quantized tensor its layer; scales positive and finite, codes in range, weights finite; saved and
    loaded again, all tensors have the same bits.

    Args:
        path: The checkpoint.
        on_failure: ``"error"`` raises, ``"warn"`` warns, ``"ignore"`` only answers.
        allow_pickle: Whether a ``.pt`` file may be unpickled, which can run code.

    Raises:
        ValidationError: A check failed and ``on_failure`` is ``"error"``.
        ConfigurationError: ``on_failure`` is none of the three.
        FileNotFoundError: There is no such file.
    """
    require_on_failure(on_failure)
    if not checkpoint_path(path).exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    result = ValidationResult(load_test_passed=None, weight_range_valid=None)
    try:
        summary = inspect_file(path, allow_pickle)
        tensors = load_model(path, allow_pickle=allow_pickle)
    except CheckpointError as error:
        result.errors.append(error.message)
        report_failures(result, on_failure)
        return result
    result.quantized_size_mb = summary.tensor_bytes / 2**20
    if summary.header is None:
        result.errors.append(f"{summary.path} has no header: it is not a checkpoint of this library")
    records = {} if summary.header is None else summary.header.layers
    unknown = [
        layer for layer in quantized_layers(tensors, records) if summary.header is not None and layer not in records
    ]
    result.errors += [f"layer {layer!r} has scales but the header does not know it" for layer in unknown]
    check_weights(result, tensors, records)
    header = None if summary.header is None or summary.header.static is None else summary.header
    if not result.errors:
        faults = round_trip_faults(tensors, tensors, records, header=header)
        result.load_test_passed = not faults
        result.errors += faults
    report_failures(result, on_failure)
    return result


__all__ = ["DtypeUse", "FileSummary", "inspect_file", "validate_checkpoint"]
