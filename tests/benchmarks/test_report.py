"""The README shows the kept results and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report, results

ENVIRONMENT = {
    "processor": "A Processor",
    "features": ["avx2"],
    "cores": 2,
    "threads": 2,
    "system": "Linux x86_64",
    "python": "3.11.0",
    "versions": {"torch": "2.13.0"},
    "backend": "native",
    "kernels": "avx2",
    "date": "2026-01-02",
}
TIMING = {"median": 0.002, "low": 0.001, "high": 0.003, "calls": 9, "ratio": 0.5}
MODELS = {
    "format": results.FORMAT,
    "environment": ENVIRONMENT,
    "sentences": 512,
    "engines": [
        {
            "name": "some engine",
            "disk_bytes": 23_000_000,
            "accuracy": {
                "mean_cosine": 0.99,
                "lowest_cosine": 0.9,
                "neighbours": 0.96,
                "neighbours_of_sets": [0.96, 0.95, 0.97],
            },
            "latency": {"8x64": TIMING},
        }
    ],
    "skipped": {"other": "cannot be imported: no module"},
    "quantization": {"copy": {"cpu_seconds": 0.5}, "inplace": {"cpu_seconds": 0.4, "peak_ratio": 1.05}},
}
LINEAR = {
    "format": results.FORMAT,
    "environment": ENVIRONMENT,
    "shapes": [{"rows": 1, "inputs": 2, "outputs": 3, "engines": {"torch float32": TIMING}}],
}
DECODING = {
    "format": results.FORMAT,
    "environment": ENVIRONMENT,
    "prompt": 64,
    "window": 512,
    "engines": [
        {"name": "eager", "weight_bytes": 135_000_000, "step": TIMING, "prefill": {**TIMING, "median": 0.25}},
        {"name": "compiled", "weight_bytes": 135_000_000, "step": TIMING, "prefill": None},
    ],
    "skipped": {"other": "is not there: ModuleNotFoundError: no module"},
}
_VISION_ENGINE = {
    "latency": {"1": TIMING},
    "accuracy": {"agreement": 0.91, "snr_db": 18.04},
    "peak_bytes": {"1": 60_000_000},
    "prepare_seconds": 3.0,
}
VISION = {
    "format": results.FORMAT,
    "environment": ENVIRONMENT,
    "images": 512,
    "calibration_images": 100,
    "engines": {
        "torch_float32": {"name": "torch float32"},
        "mono_quant_static": {"name": "ours"},
        "gone": {"name": "failed on one network"},
    },
    "networks": {
        "A": {
            "float32_seconds": 2.0,
            "engines": {
                "torch_float32": {**_VISION_ENGINE, "peak_bytes": {"1": 100_000_000}},
                "mono_quant_static": _VISION_ENGINE,
            },
        },
    },
    "skipped": {"gone": "failed to build"},
}


def test_the_readme_shows_the_kept_results() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert report.fill(text) == text, "run python -m benchmarks.report"


def test_a_table_names_processor_date_and_versions() -> None:
    for table in (
        report.models_table(MODELS),
        report.linear_table(LINEAR),
        report.decoding_table(DECODING),
        report.vision_table(VISION),
    ):
        assert "Measured on 2026-01-02: A Processor, 2 cores (avx2)" in table
        assert "torch 2.13.0" in table


def test_the_models_table_has_latency_ratio_accuracy_size_and_what_was_left_out() -> None:
    table = report.models_table(MODELS)
    assert "| some engine | 2.0 (0.50) | 0.960 | 0.950 to 0.970 | 0.9900 | 23.0 |" in table
    assert "Left out: other cannot be imported: no module." in table
    assert "Quantizing in place takes 0.40 s of CPU time, at most 1.05 times the model's bytes resident." in table
    assert "Quantizing a copy takes 0.50 s of CPU time." in table


def test_the_linear_table_has_a_row_for_each_shape() -> None:
    assert "| 1, 2, 3 | 2000 (0.50) |" in report.linear_table(LINEAR)


def test_the_decoding_table_has_speed_and_size_and_what_was_left_out() -> None:
    table = report.decoding_table(DECODING)
    assert "| eager | 500 (2.00) | 250 (2.00) | 135 |" in table
    assert "| compiled | 500 (2.00) |  | 135 |" in table
    assert "reading 512 tokens, ms" in table
    assert "Left out: other is not there: ModuleNotFoundError: no module." in table


def test_the_vision_tables_have_latency_accuracy_memory_and_calibration() -> None:
    table = report.vision_table(VISION)
    assert "| ours | 2.0 (0.50) |" in table
    assert "| ours | 0.910 | 18.0 | 60 (0.60) |" in table
    assert "| failed on one network |  |" in table
    assert "Quantizing A with 100 images takes 3.0 s, 1.50 times as long as running them in float32." in table


def test_the_table_of_the_search_names_its_course() -> None:
    point = {"formats": {"a": "int8", "b": "int8", "c": "bfloat16"}}
    course = {"points": [point], "chosen": 0, "target": "max_drop=0.01", "seconds": 31.4, "evaluations": 14}
    models = [
        {
            "name": name,
            "bytes": 41_000_000,
            "neighbours_of_sets": [0.98, 0.97],
            "latency": {"8x64": TIMING},
            "search": s,
        }
        for name, s in (("plain", None), ("searched", course))
    ]
    document = {
        "format": results.FORMAT, "environment": ENVIRONMENT, "sentences": 512, "calibration_sentences": 64,
        "models": models,
    }  # fmt: skip
    table = report.search_table(document)
    assert "| searched | 2.0 (0.50) | 0.980 | 0.970 | 41.0 |" in table
    assert "With max_drop=0.01 the search takes 31 s and 14 evaluations; its layers: 2 int8, 1 bfloat16." in table


def test_filling_replaces_only_the_blocks(tmp_path: Path) -> None:
    results.write(MODELS, tmp_path / "models.json")
    text = "before\n<!-- results:models -->\nold\n<!-- /results:models -->\nbetween\n"
    text += "<!-- results:linear -->\n<!-- /results:linear -->\n"
    text += "<!-- results:decoding -->\n<!-- /results:decoding -->\n"
    text += "<!-- results:accuracy -->\n<!-- /results:accuracy -->\n"
    text += "<!-- results:vision -->\n<!-- /results:vision -->\n"
    text += "<!-- results:search -->\n<!-- /results:search -->\nafter\n"
    filled = report.fill(text, tmp_path)
    assert filled.startswith("before\n<!-- results:models -->\n| all-MiniLM-L6-v2 |")
    assert filled.endswith(
        f"between\n<!-- results:linear -->\n{report.NOT_MEASURED}\n<!-- /results:linear -->\n"
        f"<!-- results:decoding -->\n{report.NOT_MEASURED}\n<!-- /results:decoding -->\n"
        f"<!-- results:accuracy -->\n{report.NOT_MEASURED}\n<!-- /results:accuracy -->\n"
        f"<!-- results:vision -->\n{report.NOT_MEASURED}\n<!-- /results:vision -->\n"
        f"<!-- results:search -->\n{report.NOT_MEASURED}\n<!-- /results:search -->\nafter\n"
    )
    assert report.fill(filled, tmp_path) == filled


def test_a_missing_block_is_named() -> None:
    with pytest.raises(ValueError, match="results:models"):
        report.fill("a text without blocks")


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    results.write({"format": results.FORMAT + 1}, path)
    with pytest.raises(ValueError, match="measure again"):
        results.read(path)
