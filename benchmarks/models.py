"""MiniLM float32 against int8, ours and others': latency, size on disk, accuracy, and the cost of quantizing.

    python -m benchmarks.models [--quick] [--json] [--engines a,b]

Latency is that of the encoder on real text without padding. Accuracy compares embeddings (mean pooling, length 1) of
512 sentences with those of float32: the mean and the lowest cosine, and how many of each sentence's ten nearest
neighbours stay the same. The last is measured on further sets of 512 sentences too, since it depends on the choice.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import minilm, results
from benchmarks.engines import ADAPTERS, BASELINE, BuiltEngine, Unavailable, build_engine
from benchmarks.environment import describe_environment
from benchmarks.quantization_cost import measure_quantization
from benchmarks.report import models_table
from benchmarks.timing import QUICK, Schedule, take_turns
from mono_quant.report import nearest_neighbour_agreement


def measure(keys: tuple[str, ...], schedule: Schedule, sets: list[list[str]], log: Console) -> results.Document:
    """Measure the engines named by ``keys`` in one run.

    Args:
        keys: Adapters; the baseline must be among them.
        schedule: How engines take turns.
        sets: Sentences that accuracy is measured on; the first set gives the figures, all of them the range.
        log: Where progress goes.
    """
    engines, skipped = _build(keys, log)
    # Before the engines of others ran: they start threads that never stop.
    quantization = {name: measure_quantization(inplace=name == "inplace") for name in ("copy", "inplace")}
    embeddings = {}
    for built in engines:
        log.print(f"embedding {sum(map(len, sets))} sentences with {built.name}")
        embeddings[built.key] = [minilm.embed(built.engine.encode, sentences) for sentences in sets]
    latency = _latencies(engines, schedule, log)
    distributions = sorted({name for built in engines for name in built.versions})
    return {
        "format": results.FORMAT,
        "benchmark": "models",
        "environment": describe_environment(tuple(distributions)).to_dict(),
        "schedule": asdict(schedule),
        "sentences": len(sets[0]),
        "engines": [
            {
                "key": built.key,
                "name": built.name,
                "versions": built.versions,
                "disk_bytes": built.engine.disk_bytes,
                "accuracy": _accuracy(embeddings[BASELINE], embeddings[built.key]),
                "latency": latency[built.key],
            }
            for built in engines
        ],
        "skipped": skipped,
        "quantization": quantization,
    }


def _build(keys: tuple[str, ...], log: Console) -> tuple[list[BuiltEngine], dict[str, str]]:
    engines: list[BuiltEngine] = []
    skipped: dict[str, str] = {}
    for key in keys:
        with tempfile.TemporaryDirectory() as directory:
            log.print(f"building {key}")
            built = build_engine(key, Path(directory))
        if isinstance(built, Unavailable):
            skipped[key] = built.reason
            log.print(f"left out: {key} {built.reason}", markup=False)
        else:
            engines.append(built)
    if BASELINE in skipped:
        raise SystemExit(f"the baseline {BASELINE} {skipped[BASELINE]}")
    return engines, skipped


def _accuracy(references: list[Tensor], embeddings: list[Tensor]) -> dict[str, Any]:
    cosine = (references[0] * embeddings[0]).sum(dim=1)
    neighbours = [nearest_neighbour_agreement(*pair, k=10) for pair in zip(references, embeddings, strict=True)]
    return {
        "mean_cosine": float(cosine.mean()),
        "lowest_cosine": float(cosine.min()),
        "neighbours": neighbours[0],
        "neighbours_of_sets": neighbours,
    }


def _latencies(engines: list[BuiltEngine], schedule: Schedule, log: Console) -> dict[str, dict[str, Any]]:
    measured: dict[str, dict[str, Any]] = {built.key: {} for built in engines}
    for batch, length in minilm.SHAPES:
        log.print(f"timing {batch}x{length}")
        ids, mask = minilm.full_batch(batch, length)
        calls: dict[str, Callable[[], object]] = {
            built.key: partial(built.engine.encode, ids, mask) for built in engines
        }
        with torch.inference_mode():
            timings = take_turns(calls, schedule)
        for key, timing in timings.items():
            ratio = timing.median / timings[BASELINE].median
            measured[key][f"{batch}x{length}"] = {**timing.to_dict(), "ratio": ratio}
    return measured


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare ways to run MiniLM in one run.")
    parser.add_argument("--engines", default=",".join(ADAPTERS), help=f"comma-separated, of {', '.join(ADAPTERS)}")
    parser.add_argument("--quick", action="store_true", help="a quick look; the results are not kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="where to keep the results (benchmarks/results/models.json)")
    options: Any = parser.parse_args(arguments)
    keys = tuple(options.engines.split(","))
    unknown = [key for key in keys if key not in ADAPTERS]
    if unknown:
        parser.error(f"unknown engines {', '.join(unknown)}")
    # What others are divided by always runs, and first.
    keys = (BASELINE, *(key for key in keys if key != BASELINE))
    sets = [minilm.evaluation_sentences()[:64]] if options.quick else minilm.evaluation_sets()
    document = measure(keys, QUICK if options.quick else Schedule(), sets, Console(file=sys.stderr))
    if options.output is not None or not options.quick:
        results.write(document, options.output or results.result_path("models"))
    print(results.dump(document) if options.json else models_table(document))


if __name__ == "__main__":
    main()
