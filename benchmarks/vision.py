"""Convolutional networks in float32 against static int8, ours and others': latency, accuracy, memory, calibration.

    python -m benchmarks.vision [--quick] [--json] [--engines a,b]

Latency is that of 224x224 images, batch 1 and 16. Accuracy is measured on crops of photographs, EfficientNet-Lite0's
answers against float32's: how often the first class is the same, and the logits' signal-to-noise ratio; calibration
sees other photographs. Memory is measured in a process of its own for each engine, see vision_memory.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import results
from benchmarks.engines import Unavailable
from benchmarks.environment import describe_environment
from benchmarks.photographs import CALIBRATION, JUDGED, calibration_crops, judged_crops
from benchmarks.report import vision_table
from benchmarks.timing import QUICK, Schedule, take_turns
from benchmarks.vision_engines import ADAPTERS, BASELINES, Classifier, VisionEngine, load_engine, prepare_engine
from benchmarks.vision_engines.mono_quant_static import CALIBRATION_SECONDS
from benchmarks.vision_memory import measure_memory
from benchmarks.vision_models import NETWORKS, keep_model

BATCHES = (1, 16)
#: How many images the float model runs at a time where its time is compared with that of calibrating.
_CALIBRATION_BATCH = 10


def measure(keys: tuple[str, ...], schedule: Schedule, images: int, log: Console) -> results.Document:
    """Measure the engines named by ``keys`` on every network, in one run.

    Args:
        keys: Adapters; the baselines must be among them.
        schedule: How engines take turns.
        images: How many crops accuracy is measured on.
        log: Where progress goes.
    """
    calibration = calibration_crops()
    networks, skipped = {}, dict[str, str]()
    engines: dict[str, VisionEngine] = {}
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            networks[name] = _measure_network(
                name, keys, schedule, images, calibration, Path(folder), engines, skipped, log
            )
    distributions = sorted({name for engine in engines.values() for name in engine.versions})
    return {
        "format": results.FORMAT,
        "benchmark": "vision",
        "environment": describe_environment(tuple(distributions)).to_dict(),
        "schedule": asdict(schedule),
        "images": images,
        "calibration_images": len(calibration),
        "photographs": {"judged": list(JUDGED), "calibration": list(CALIBRATION)},
        "engines": {key: {"name": engine.name, "versions": engine.versions} for key, engine in engines.items()},
        "networks": networks,
        "skipped": skipped,
    }


def _measure_network(
    name: str,
    keys: tuple[str, ...],
    schedule: Schedule,
    images: int,
    calibration: Tensor,
    folder: Path,
    engines: dict[str, VisionEngine],
    skipped: dict[str, str],
    log: Console,
) -> dict[str, Any]:
    log.print(f"making {name}")
    network = NETWORKS[name]
    model = network.make()
    keep_model(model, folder)
    float_seconds = _run_seconds(model, calibration)
    classifiers: dict[str, Classifier] = {}
    seconds: dict[str, float | None] = {}
    for key in keys:
        log.print(f"preparing {key}")
        prepared = prepare_engine(key, model, calibration, folder)
        if isinstance(prepared, Unavailable):
            skipped[key] = prepared.reason
            log.print(f"left out: {key} {prepared.reason}", markup=False)
            continue
        engines.setdefault(key, prepared)
        seconds[key] = prepared.seconds
        classifiers[key] = load_engine(key, partial(copy.deepcopy, model), folder)
    missing = [key for key in BASELINES if key not in classifiers]
    if missing:
        raise SystemExit(f"the baseline {missing[0]} {skipped[missing[0]]}")
    log.print("measuring memory")
    memory = {key: {str(batch): measure_memory(key, name, batch, folder) for batch in BATCHES} for key in classifiers}
    accuracy = _accuracies(model, classifiers, judged_crops(images)) if network.labelled else {}
    latency = _latencies(classifiers, schedule, log)
    calibrated = folder / CALIBRATION_SECONDS
    return {
        "float32_seconds": float_seconds,
        "calibration_seconds": json.loads(calibrated.read_text(encoding="utf-8")) if calibrated.exists() else None,
        "engines": {
            key: {
                "latency": latency[key],
                "accuracy": accuracy.get(key),
                "peak_bytes": memory[key],
                "prepare_seconds": seconds[key],
            }
            for key in classifiers
        },
    }


def _run_seconds(model: nn.Module, images: Tensor) -> float:
    """Answer the seconds that the float model takes for ``images`` in its default memory format."""
    with torch.inference_mode():
        model(images[:_CALIBRATION_BATCH])
        start = time.perf_counter()
        for batch in images.split(_CALIBRATION_BATCH):
            model(batch)
        return time.perf_counter() - start


def _accuracies(model: nn.Module, classifiers: dict[str, Classifier], images: Tensor) -> dict[str, dict[str, float]]:
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in images.split(16)]).double()
        answers = {
            key: torch.cat([classify(batch).clone() for batch in images.split(16)]).double()
            for key, classify in classifiers.items()
        }
    return {
        key: {
            "agreement": float((answer.argmax(1) == expected.argmax(1)).double().mean()),
            "snr_db": 10 * math.log10(float(expected.square().sum() / _noise(expected, answer))),
        }
        for key, answer in answers.items()
    }


def _noise(expected: Tensor, answer: Tensor) -> Tensor:
    # JSON has no infinity: an exact answer reads as 300 dB.
    return (expected - answer).square().sum().clamp(min=1e-30 * float(expected.square().sum()))


def _latencies(classifiers: dict[str, Classifier], schedule: Schedule, log: Console) -> dict[str, dict[str, Any]]:
    measured: dict[str, dict[str, Any]] = {key: {} for key in classifiers}
    for batch in BATCHES:
        log.print(f"timing batch {batch}")
        images = judged_crops(batch)
        calls: dict[str, Callable[[], object]] = {
            key: partial(classify, images) for key, classify in classifiers.items()
        }
        with torch.inference_mode():
            timings = take_turns(calls, schedule)
        best = min(timings[key].median for key in BASELINES)
        for key, timing in timings.items():
            measured[key][str(batch)] = {**timing.to_dict(), "ratio": timing.median / best}
    return measured


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare ways to run convolutional networks in one run.")
    parser.add_argument("--engines", default=",".join(ADAPTERS), help=f"comma-separated, of {', '.join(ADAPTERS)}")
    parser.add_argument("--quick", action="store_true", help="a quick look; the results are not kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="where to keep the results (benchmarks/results/vision.json)")
    options: Any = parser.parse_args(arguments)
    keys = tuple(options.engines.split(","))
    unknown = [key for key in keys if key not in ADAPTERS]
    if unknown:
        parser.error(f"unknown engines {', '.join(unknown)}")
    # What others are divided by always runs, and first.
    keys = (*BASELINES, *(key for key in keys if key not in BASELINES))
    schedule, images = (QUICK, 64) if options.quick else (Schedule(rounds=3), 512)
    document = measure(keys, schedule, images, Console(file=sys.stderr))
    if options.output is not None or not options.quick:
        results.write(document, options.output or results.result_path("vision"))
    print(results.dump(document) if options.json else vision_table(document))


if __name__ == "__main__":
    main()
