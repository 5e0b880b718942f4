"""SmolLM2-135M token by token: tokens per second of decoding, and the time to read a prompt of 512 tokens.

    python -m benchmarks.decoding [--quick] [--json] [--engines a,b]

Decoding is greedy, of one sequence, behind a prompt of 64 tokens. Compiled models have a cache of fixed size;
everything else is eager. llama.cpp takes part where ``llama-cpp-python`` is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import results, smollm2
from benchmarks.decoders import BASELINE, PROMPT, RECIPES, Decoder
from benchmarks.environment import describe_environment, installed_version
from benchmarks.report import decoding_table
from benchmarks.timing import QUICK, Schedule, Timing, take_turns


def measure(keys: tuple[str, ...], schedule: Schedule, log: Console) -> results.Document:
    """Measure the decoders named by ``keys`` in one run; the baseline must be among them."""
    window = smollm2.evaluation_windows(1)[0]
    decoders, sizes, skipped = _build(keys, smollm2.load_model(), log)
    if BASELINE in skipped:
        raise SystemExit(f"the baseline {BASELINE} {skipped[BASELINE]}")
    log.print("timing prefill")
    prefills: dict[str, Callable[[], object]] = {
        key: partial(decoder.prefill, window) for key, decoder in decoders.items() if RECIPES[key].prefills
    }
    # Calls of a second each: few make a burst.
    prefill = take_turns(prefills, replace(schedule, warmup=1))
    log.print("timing decoding")
    step = take_turns({key: decoder.step for key, decoder in decoders.items()}, schedule)
    return {
        "format": results.FORMAT,
        "benchmark": "decoding",
        "environment": describe_environment(_distributions(decoders)).to_dict(),
        "schedule": asdict(schedule),
        "prompt": PROMPT,
        "window": len(window),
        "engines": [
            {
                "key": key,
                "name": RECIPES[key].title,
                "weight_bytes": sizes[key],
                "step": _figures(step, key),
                "prefill": _figures(prefill, key),
            }
            for key in decoders
        ],
        "skipped": skipped,
    }


def _build(
    keys: tuple[str, ...], model: nn.Module, log: Console
) -> tuple[dict[str, Decoder], dict[str, int], dict[str, str]]:
    prompt = smollm2.evaluation_windows(1)[0][:PROMPT]
    decoders: dict[str, Decoder] = {}
    sizes: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for key in keys:
        log.print(f"building {key}")
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                decoders[key], sizes[key] = RECIPES[key].build(model, prompt)
                decoders[key].step()  # compiles
            except Exception as error:  # a peer's failure must not lose the other measurements
                skipped[key] = f"is not there: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                decoders.pop(key, None)
                log.print(f"left out: {key} {skipped[key]}", markup=False)
    return decoders, sizes, skipped


def _figures(timings: dict[str, Timing], key: str) -> dict[str, Any] | None:
    if key not in timings:
        return None
    return {**timings[key].to_dict(), "ratio": timings[key].median / timings[BASELINE].median}


def _distributions(decoders: dict[str, Decoder]) -> tuple[str, ...]:
    names = {name for key in decoders for name in RECIPES[key].distributions}
    return tuple(sorted(name for name in names if installed_version(name) is not None))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare ways to run SmolLM2 in one run.")
    parser.add_argument("--engines", default=",".join(RECIPES), help=f"comma-separated, of {', '.join(RECIPES)}")
    parser.add_argument("--quick", action="store_true", help="a quick look; the results are not kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="where to keep the results (benchmarks/results/decoding.json)")
    options: Any = parser.parse_args(arguments)
    keys = tuple(options.engines.split(","))
    unknown = [key for key in keys if key not in RECIPES]
    if unknown:
        parser.error(f"unknown engines {', '.join(unknown)}")
    # What others are divided by always runs, and first.
    keys = (BASELINE, *(key for key in keys if key != BASELINE))
    torch.manual_seed(0)
    document = measure(keys, QUICK if options.quick else Schedule(rounds=5), Console(file=sys.stderr))
    if options.output is not None or not options.quick:
        results.write(document, options.output or results.result_path("decoding"))
    print(results.dump(document) if options.json else decoding_table(document))


if __name__ == "__main__":
    main()
