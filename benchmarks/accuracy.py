"""What bits and algorithms cost in accuracy: the perplexity of SmolLM2, and the neighbours of MiniLM's embeddings.

    python -m benchmarks.accuracy [--json] [--only PATTERN ...] [--output FILE]

Perplexity is that of the first 8,192 tokens in windows of 512; calibration text lies behind them, or is written by
the model itself. Neighbours: agreement of the ten nearest neighbours of 512 sentences with float32's. A row that is
measured again replaces the one that was kept.

Each row quantizes in a process of its own. Seconds are those of ``quantize()`` without loading. ``peak_ratio`` is
``(bytes of the float32 model + highest resident size - resident size just before) / bytes of the float32 model``.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import mono_quant
from benchmarks import results
from benchmarks.accuracy_table import accuracy_table
from benchmarks.environment import describe_environment
from benchmarks.process_memory import reset_peak, status_bytes
from mono_quant.calibration import sample_tokens
from mono_quant.report import model_bytes, nearest_neighbour_agreement

#: Where calibration data comes from.
NO_DATA: Final = "none"
OWN_TEXT: Final = "its own text"
TEXT: Final = "text"


@dataclass(frozen=True)
class Row:
    """A way to quantize.

    Attributes:
        key: Its name in the results, starting with the model.
        title: Its name in the table.
        options: What ``quantize`` is called with; ``None`` leaves the model as it is.
        data: Where calibration data comes from.
    """

    key: str
    title: str
    options: dict[str, Any] | None
    data: str = NO_DATA
    model: str = field(init=False, default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.key.partition("/")[0])


_G64: Final = {"bits": 4, "group_size": 64, "scheme": "asymmetric"}
_HALF_HEAD: Final = {"bits": {"lm_head": 16}}
_G64_SYMMETRIC: Final = {"bits": 4, "group_size": 64}
# 128 does not divide the 576 inputs of most layers: they get groups of 64.
_WIDEST: Final = {"bits": 4, "scheme": "asymmetric"}

#: What is measured, in the order of the table.
ROWS: Final = (
    Row("smollm2/float32", "float32", None),
    Row("smollm2/int8", "int8", {}),
    Row("smollm2/int8-hqq", "int8, HQQ", {"algorithm": "hqq"}),
    Row("smollm2/int8-gptq", "int8, GPTQ", {"algorithm": "gptq"}, TEXT),
    Row("smollm2/int8-head16", "int8, output layer float16", _HALF_HEAD),
    Row("smollm2/int8-head16-gptq", "int8, output layer float16, GPTQ", {**_HALF_HEAD, "algorithm": "gptq"}, TEXT),
    Row("smollm2/int8-weights", "int8 weights, groups of 64", {"group_size": 64}),
    Row("smollm2/int4-symmetric", "int4, groups of 64, symmetric", _G64_SYMMETRIC),
    Row("smollm2/int4", "int4, groups of 64", _G64),
    Row("smollm2/int4-symmetric-hqq", "int4, groups of 64, symmetric, HQQ", {**_G64_SYMMETRIC, "algorithm": "hqq"}),
    Row("smollm2/int4-hqq", "int4, groups of 64, HQQ", {**_G64, "algorithm": "hqq"}),
    Row("smollm2/int4-own", "int4, groups of 64, GPTQ", {**_G64, "algorithm": "gptq"}, OWN_TEXT),
    Row("smollm2/int4-gptq", "int4, groups of 64, GPTQ", {**_G64, "algorithm": "gptq"}, TEXT),
    Row("smollm2/int4-widest-gptq", "int4, groups of 128 or 64, GPTQ", {**_WIDEST, "algorithm": "gptq"}, TEXT),
    Row("minilm/float32", "float32", None),
    Row("minilm/int8", "int8", {}),
    Row("minilm/int8-hqq", "int8, HQQ", {"algorithm": "hqq"}),
    Row("minilm/int8-gptq", "int8, GPTQ", {"algorithm": "gptq"}, TEXT),
    Row("minilm/int8-smoothquant-gptq", "int8, SmoothQuant and GPTQ", {"algorithm": "smoothquant+gptq"}, TEXT),
)  # fmt: skip


def measure_row(row: Row) -> dict[str, Any]:
    """Measure one row in this process."""
    load, evaluate, data = _SMOLLM2 if row.model == "smollm2" else _MINILM
    model = load()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    size = model_bytes(model)
    figures: dict[str, Any] = {"bytes": size}
    if row.options is not None:
        given: dict[str, Any] = dict(row.options)
        if row.data != NO_DATA:
            given["calibration_data"] = data(model, row.data)
        gc.collect()
        before = reset_peak()
        started, cpu = time.perf_counter(), time.process_time()
        result = mono_quant.quantize(model, **given, accuracy_warning="ignore")
        figures["seconds"] = time.perf_counter() - started
        figures["cpu_seconds"] = time.process_time() - cpu
        figures["bytes"] = result.info.bytes_after
        if before is not None:
            figures["peak_ratio"] = (size + status_bytes("VmHWM") - before) / size
        quantized: nn.Module = result.model
    else:
        quantized = model
    figures["figure"] = evaluate(model, quantized)
    return figures


def _perplexity(model: nn.Module, quantized: nn.Module) -> float:
    from benchmarks import smollm2

    return smollm2.perplexity(quantized, smollm2.evaluation_windows())


def _load_smollm2() -> nn.Module:
    from benchmarks import smollm2

    return smollm2.load_model()


def _smollm2_data(model: nn.Module, source: str) -> list[Any]:
    from benchmarks import smollm2

    return sample_tokens(model) if source == OWN_TEXT else [batch.kwargs for batch in smollm2.calibration_batches()]


def _neighbours(model: nn.Module, quantized: nn.Module) -> float:
    from benchmarks import minilm

    sentences = minilm.evaluation_sentences()
    pair = [minilm.embed(minilm.encoder(each), sentences) for each in (model, quantized)]
    return nearest_neighbour_agreement(pair[0], pair[1], k=10)


def _load_minilm() -> nn.Module:
    from benchmarks import minilm

    return minilm.load_model()


def _minilm_data(model: nn.Module, source: str) -> list[Any]:
    from benchmarks import minilm

    sentences = minilm.calibration_sentences(128)
    return [{"input_ids": ids, "attention_mask": mask} for _, ids, mask in minilm.batches(sentences)]


_Subject = tuple[
    Callable[[], nn.Module], Callable[[nn.Module, nn.Module], float], Callable[[nn.Module, str], list[Any]]
]
_SMOLLM2: Final[_Subject] = (_load_smollm2, _perplexity, _smollm2_data)
_MINILM: Final[_Subject] = (_load_minilm, _neighbours, _minilm_data)


def measure_apart(row: Row) -> dict[str, Any]:
    """Measure one row in a new process.

    Raises:
        RuntimeError: The process failed.
    """
    command = [sys.executable, "-m", "benchmarks.accuracy", "--row", row.key]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def merge(kept: results.Document | None, measured: dict[str, dict[str, Any]]) -> results.Document:
    """Answer the document with the rows that were measured now in the place of those kept."""
    environment = describe_environment(("transformers", "gguf")).to_dict()
    before = {} if kept is None else {row["key"]: row for row in kept["rows"]}
    rows = []
    for row in ROWS:
        if row.key in measured:
            described = {"key": row.key, "title": row.title, "data": row.data, "date": environment["date"]}
            rows.append({**described, **measured[row.key]})
        elif row.key in before:
            rows.append(before[row.key])
    return {"format": results.FORMAT, "benchmark": "accuracy", "environment": environment, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what bits and algorithms cost in accuracy.")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help=f"rows, globs over {', '.join(r.key for r in ROWS)}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="where to keep the results (benchmarks/results/accuracy.json)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options: Any = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.row is not None:
        print(json.dumps(measure_row(next(row for row in ROWS if row.key == options.row))))
        return
    patterns = options.only or ["*"]
    chosen = [row for row in ROWS if any(fnmatchcase(row.key, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"no row matches {' '.join(patterns)}")
    path = options.output or results.result_path("accuracy")
    document = results.read(path)
    for row in chosen:
        print(f"measuring {row.key}", file=sys.stderr)
        # Kept after each row: the next may take minutes.
        document = merge(document, {row.key: measure_apart(row)})
        results.write(document, path)
    assert document is not None
    print(results.dump(document) if options.json else accuracy_table(document))


if __name__ == "__main__":
    main()
