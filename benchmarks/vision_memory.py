"""What running a prepared network takes in memory, measured in a process of its own.

    python -m benchmarks.vision_memory ENGINE MODEL BATCH DIRECTORY

``peak_bytes`` is the highest resident size while the model runs on a batch, less the resident size of the process just
before the model was loaded; libraries are imported and a small convolution has run by then. So it counts weights,
activations, the batch itself, what the engine allocates for its threads, and what preparing the first call takes. What
loading alone needs (a file and its copy) is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.process_memory import reset_peak, status_bytes
from benchmarks.vision_engines import ADAPTERS, load_engine
from benchmarks.vision_models import load_model

_CALLS = 4


def measure_memory(engine: str, model: str, batch: int, directory: Path) -> int | None:
    """Answer ``peak_bytes`` of a new process; ``None`` where the system does not tell (anything but Linux).

    Raises:
        RuntimeError: The process failed.
    """
    command = [sys.executable, "-m", "benchmarks.vision_memory", engine, model, str(batch), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    peak: int | None = json.loads(done.stdout)["peak_bytes"]
    return peak


def _measure_here(engine: str, model: str, batch: int, directory: Path) -> int | None:
    with torch.inference_mode():
        nn.Conv2d(8, 8, 3)(torch.randn(1, 8, 16, 16))
        gc.collect()
        before = reset_peak()
        if before is None:
            return None
        classify = load_engine(engine, partial(load_model, model, directory), directory)
        gc.collect()
        reset_peak()
        images = torch.randn(batch, 3, 224, 224)
        for _ in range(_CALLS):
            classify(images)
        return status_bytes("VmHWM") - before


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what running a network takes in memory; prints JSON.")
    parser.add_argument("engine", choices=ADAPTERS)
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("directory", type=Path)
    options: Any = parser.parse_args(arguments)
    peak = _measure_here(options.engine, options.model, options.batch, options.directory)
    print(json.dumps({"peak_bytes": peak}))


if __name__ == "__main__":
    main()
