"""The search under a budget on MiniLM: what it reaches, what it costs, and how fast the result is.

    python -m benchmarks.search [--quick] [--json]

The measure is the agreement of the ten nearest neighbours of 512 sentences with float32's. The search may lose at most
:data:`MAX_DROP` of it, and looks for the fastest model. A second search looks for the most accurate model that is no
larger than plain int8. The further sets of sentences were seen by neither. Each search runs in full, without a file to
go on from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import mono_quant
from benchmarks import minilm, results
from benchmarks.environment import describe_environment
from benchmarks.report import search_table
from benchmarks.timing import QUICK, Schedule, take_turns
from mono_quant.report import model_bytes, nearest_neighbour_agreement

MAX_DROP = 0.015
CALIBRATION_SENTENCES = 64
SHAPES = ((1, 32), (8, 64))
SCHEDULE = Schedule(rounds=5)
SETS = 3


@dataclass(frozen=True)
class Candidate:
    """A model to compare, and the search that found it."""

    key: str
    name: str
    model: nn.Module
    search: mono_quant.SearchReport | None = None


def calibration_batches(count: int) -> list[dict[str, Tensor]]:
    """Answer sentences that are in no set, as the model's keyword arguments, in batches of eight.

    Layers are timed on the first batch, which should look like what the model is served with.
    """
    sentences = minilm.calibration_sentences(count)
    return [{"input_ids": ids, "attention_mask": mask} for _, ids, mask in minilm.batches(sentences, size=8)]


def build(sentences: list[str], log: Console) -> list[Candidate]:
    """Answer the float models, plain int8, and what the searches find."""
    model = minilm.load_model()
    reference = minilm.embed(minilm.encoder(model), sentences)
    data = calibration_batches(CALIBRATION_SENTENCES)

    def neighbours(candidate: nn.Module) -> float:
        return nearest_neighbour_agreement(reference, minilm.embed(minilm.encoder(candidate), sentences), k=10)

    def progress(_done: int, _total: int, what: str) -> None:
        log.print(f"  {what}", markup=False)

    plain = mono_quant.quantize(model)
    log.print(f"searching: max_drop={MAX_DROP}")
    fast = mono_quant.quantize(model, calibration_data=data, eval_fn=neighbours, max_drop=MAX_DROP, progress=progress)
    log.print("searching: max_bytes of plain int8")
    small = mono_quant.quantize(
        model, calibration_data=data, eval_fn=neighbours, max_bytes=plain.info.bytes_after, progress=progress
    )
    return [
        Candidate("torch_float32", "torch float32", model),
        Candidate("torch_bfloat16", "torch bfloat16", minilm.load_model().to(torch.bfloat16)),
        Candidate("int8", "mono_quant int8", plain.model),
        Candidate("max_drop", f"search, max_drop={MAX_DROP}", fast.model, fast.search),
        Candidate("max_bytes", "search, max_bytes of int8", small.model, small.search),
    ]


def measure(schedule: Schedule, sets: list[list[str]], log: Console) -> results.Document:
    """Search and compare.

    Args:
        schedule: How the models take turns.
        sets: Sentences that accuracy is measured on; the searches see the first set.
        log: Where progress goes.
    """
    started = time.perf_counter()
    candidates = build(sets[0], log)
    latency = _latencies(candidates, schedule, log)
    references: list[Tensor] = []
    models = []
    for candidate in candidates:
        log.print(f"embedding with {candidate.name}")
        embeddings = [minilm.embed(minilm.encoder(candidate.model), sentences) for sentences in sets]
        references = references or embeddings
        agreement = [nearest_neighbour_agreement(*pair, k=10) for pair in zip(references, embeddings, strict=True)]
        models.append(
            {
                "key": candidate.key,
                "name": candidate.name,
                "bytes": model_bytes(candidate.model),
                "neighbours_of_sets": agreement,
                "latency": latency[candidate.key],
                "search": None if candidate.search is None else candidate.search.to_dict(),
            }
        )
    return {
        "format": results.FORMAT,
        "benchmark": "search",
        "environment": describe_environment(()).to_dict(),
        "schedule": asdict(schedule),
        "sentences": len(sets[0]),
        "calibration_sentences": CALIBRATION_SENTENCES,
        "max_drop": MAX_DROP,
        "models": models,
        "seconds": time.perf_counter() - started,
    }


def _latencies(candidates: list[Candidate], schedule: Schedule, log: Console) -> dict[str, dict[str, Any]]:
    measured: dict[str, dict[str, Any]] = {candidate.key: {} for candidate in candidates}
    for batch, length in SHAPES:
        log.print(f"timing {batch}x{length}")
        ids, mask = minilm.full_batch(batch, length)
        calls: dict[str, Callable[[], object]] = {
            candidate.key: partial(minilm.encoder(candidate.model), ids, mask) for candidate in candidates
        }
        with torch.inference_mode():
            timings = take_turns(calls, schedule)
        for key, timing in timings.items():
            ratio = timing.median / timings["torch_float32"].median
            measured[key][f"{batch}x{length}"] = {**timing.to_dict(), "ratio": ratio}
    return measured


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Search precision for MiniLM under a budget.")
    parser.add_argument("--quick", action="store_true", help="a quick look; the results are not kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="where to keep the results (benchmarks/results/search.json)")
    options: Any = parser.parse_args(arguments)
    sets = [minilm.evaluation_sentences()[:96]] if options.quick else minilm.evaluation_sets()[:SETS]
    document = measure(QUICK if options.quick else SCHEDULE, sets, Console(file=sys.stderr))
    if options.output is not None or not options.quick:
        results.write(document, options.output or results.result_path("search"))
    print(results.dump(document) if options.json else search_table(document))


if __name__ == "__main__":
    main()
