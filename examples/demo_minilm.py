"""Quantizes a sentence encoder with one call and shows what that changes.

    make demo        (or: python -m examples.demo_minilm)

The model, all-MiniLM-L6-v2, comes inside an installed package; nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mono_quant
from benchmarks import minilm
from benchmarks.timing import Schedule, Timing, take_turns
from mono_quant.ops import system_config
from mono_quant.report import nearest_neighbour_agreement

# Shorter than the benchmarks' schedule: the demo is for a first look.
SCHEDULE = Schedule(rounds=5, pause=0.2, warmup=2, burst=0.3)


def saved_sizes(result: mono_quant.QuantizationResult) -> tuple[int, int]:
    """Answer the bytes of the published float32 file and of the quantized model's file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        result.save(path)
        return minilm.weights_file().stat().st_size, path.stat().st_size


def latencies(model: nn.Module, quantized: nn.Module) -> dict[str, tuple[Timing, Timing]]:
    """Time both models at each batch x length, taking turns."""
    measured = {}
    for batch, length in minilm.SHAPES:
        ids, mask = minilm.full_batch(batch, length)
        calls = {
            "float32": partial(minilm.encoder(model), ids, mask),
            "int8": partial(minilm.encoder(quantized), ids, mask),
        }
        with torch.inference_mode():
            timings = take_turns(calls, SCHEDULE)
        measured[f"{batch}x{length}"] = (timings["float32"], timings["int8"])
    return measured


def accuracy(model: nn.Module, quantized: nn.Module) -> tuple[float, float, float]:
    """Answer mean cosine, lowest cosine and ten-nearest-neighbour agreement of the sentences' embeddings."""
    sentences = minilm.evaluation_sentences()
    reference = minilm.embed(minilm.encoder(model), sentences)
    embeddings = minilm.embed(minilm.encoder(quantized), sentences)
    cosine = (reference * embeddings).sum(dim=1)
    return float(cosine.mean()), float(cosine.min()), nearest_neighbour_agreement(reference, embeddings, k=10)


def main() -> None:
    console = Console()
    model = minilm.load_model()
    result = mono_quant.quantize(model)
    assert isinstance(result.model, nn.Module)

    console.print(str(system_config()), highlight=False, markup=False)
    info = result.info
    console.print(
        f"\nquantize(model): {len(info.selected_layers)} layers to int8, {len(info.skipped_layers)} left in float, "
        f"in {info.seconds:.2f} s\n",
        highlight=False,
    )

    table = Table(title="all-MiniLM-L6-v2")
    table.add_column("")
    for column in ("float32", "int8", "int8 / float32"):
        table.add_column(column, justify="right")
    before, after = saved_sizes(result)
    table.add_row("saved file", f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", f"{after / before:.3f}")
    for shape, (slow, fast) in latencies(model, result.model).items():
        milliseconds = [f"{timing.median * 1e3:.1f} ms" for timing in (slow, fast)]
        table.add_row(f"latency at {shape}", *milliseconds, f"{fast.median / slow.median:.2f}")
    mean, lowest, neighbours = accuracy(model, result.model)
    table.add_section()
    table.add_row("cosine, mean (lowest)", "1", f"{mean:.4f} ({lowest:.4f})", "")
    table.add_row("ten nearest neighbours", "1", f"{neighbours:.3f}", "")
    console.print(table)
    console.print(
        "Latency at batch x length: median of calls in bursts that take turns. Accuracy on "
        f"{minilm.SENTENCES} sentences: cosine with float32's embedding; share of the ten nearest that stay the same.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
