"""One linear layer at a time: float32, bfloat16, PyTorch's bare int8 products, and ours.

    python -m benchmarks.linear [--quick] [--json]

Ours starts from float input and ends with float output: quantizing the rows is part of its time. The two integer
products of PyTorch get operands that are already quantized, so that they are a bound for what its kernels can reach
rather than something one could use in place of the layer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks import results
from benchmarks.environment import describe_environment
from benchmarks.report import linear_table
from benchmarks.timing import QUICK, Schedule, take_turns
from mono_quant.modules import quantize_linear_module

#: Rows, inputs, outputs.
SHAPES = (
    (1, 768, 768),
    (1, 4096, 4096),
    (128, 768, 3072),
    (512, 1024, 4096),
    (2048, 1024, 1024),
    (4096, 384, 1536),
)
BASELINE = "torch float32"


def engines(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], Tensor]]:
    """Answer the calls to compare for one shape, all with operands made from the same float layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
        layer.bias.copy_(torch.randn(outputs, generator=generator))
    weight, bias = layer.weight.detach(), layer.bias.detach()
    half_x, half_weight, half_bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    ours = quantize_linear_module(layer, symmetric=True)
    codes, _, _ = torch.ops.mono_quant.quantize_rows(x)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    transposed = ours.codes.t()
    onednn = _onednn_product(codes, ours.codes, rows)
    return {
        BASELINE: lambda: F.linear(x, weight, bias),
        "torch bfloat16": lambda: F.linear(half_x, half_weight, half_bias),
        "torch._int_mm alone": lambda: torch._int_mm(signed, transposed),
        "onednn qlinear alone": onednn,
        "mono_quant int8": lambda: ours(x),
        "mono_quant int8, bfloat16 in and out": lambda: ours(half_x),
    }


def _onednn_product(codes: Tensor, weight: Tensor, rows: int) -> Callable[[], Tensor]:
    """Answer oneDNN's int8 product of quantized operands, with a float32 result."""
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, weight.shape[1]])
    scales, zero_points = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int64)

    def product() -> Tensor:
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out

    return product


def measure(shapes: tuple[tuple[int, int, int], ...], schedule: Schedule, log: Console) -> results.Document:
    """Measure all engines at each of ``shapes``."""
    measured = []
    for rows, inputs, outputs in shapes:
        log.print(f"timing {rows}x{inputs}x{outputs}")
        with torch.inference_mode():
            timings = take_turns(engines(rows, inputs, outputs), schedule)
        baseline = timings[BASELINE].median
        figures = {name: {**timing.to_dict(), "ratio": timing.median / baseline} for name, timing in timings.items()}
        measured.append({"rows": rows, "inputs": inputs, "outputs": outputs, "engines": figures})
    return {
        "format": results.FORMAT,
        "benchmark": "linear",
        "environment": describe_environment().to_dict(),
        "schedule": asdict(schedule),
        "shapes": measured,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare single linear layers in one run.")
    parser.add_argument("--quick", action="store_true", help="a quick look; the results are not kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="where to keep the results (benchmarks/results/linear.json)")
    options: Any = parser.parse_args(arguments)
    document = measure(SHAPES, QUICK if options.quick else Schedule(), Console(file=sys.stderr))
    if options.output is not None or not options.quick:
        results.write(document, options.output or results.result_path("linear"))
    print(results.dump(document) if options.json else linear_table(document))


if __name__ == "__main__":
    main()
