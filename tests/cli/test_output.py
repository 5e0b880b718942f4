"""What is printed: bars and tables on a terminal, plain whole lines elsewhere."""

from __future__ import annotations

import io
import math
import sys

import pytest

from mono_quant.cli.output import (
    Output,
    decibels_text,
    grouped,
    layer_facts,
    names_text,
    seconds_text,
    size_text,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make both streams one terminal of 80 columns; in the test itself, for pytest sets them between its phases."""
    stream = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with Output().progress("Quantizing") as report:
        report(1, 2, "layer[0]")
        report(2, 2, "layer[1]")
    drawn = terminal.getvalue()
    assert "Quantizing" in drawn
    assert "layer[1]" in drawn
    # It goes when it is done, and the cursor comes back.
    assert drawn.rstrip().endswith("\x1b[2K")
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1


def test_a_bar_that_fails_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)

    def fail() -> None:
        with Output().progress("Quantizing") as report:
            report(1, 2, "")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_nothing_is_drawn_before_anything_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with Output().progress("Timing"):
        pass
    assert terminal.getvalue() == ""


def test_progress_is_a_line_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("Quantizing") as report:
        for done in range(1, 6):
            report(done, 5, "")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Quantizing: 5/5\n"


def test_tables_align_and_stay_whole_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("layer", "bytes"), [("a" * 100, "1"), ("[b]", "1000")], numbers=("bytes",))
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [108, 108, 108]
    assert lines[2].split() == ["[b]", "1000"]


def test_tables_fit_the_terminal_and_keep_the_first_column(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    Output().table(("layer", "why"), [("a" * 40, "word " * 20)])
    lines = terminal.getvalue().splitlines()
    assert any(line.startswith("a" * 40) for line in lines)
    assert len(lines) > 2


def test_facts_keep_brackets_and_long_values_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Output().facts("[title]", [("path", "x" * 300), ("long name", "[1]")])
    assert capsys.readouterr().out.splitlines() == ["[title]", f"  path       {'x' * 300}", "  long name  [1]"]


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).document({"a": [math.inf, math.nan, (1.5, -math.inf)], "b": {"c": True}})
    expected = '{"a": [null, null, [1.5, null]], "b": {"c": true}}'
    assert "".join(capsys.readouterr().out.split()) == expected.replace(" ", "")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (90_000_000, "85.8 MiB"), (2**31, "2.00 GiB"),
        (2**42, "4096.00 GiB"),
    ],
)  # fmt: skip
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(61.5, "61.5 s"), (100.4, "100 s"), (1.234, "1.23 s"), (0.9488, "949 ms"), (0.00731, "7.31 ms"), (3e-6, "3 us")],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_ratios_are_readable() -> None:
    assert [decibels_text(value) for value in (41.06, math.inf, None)] == ["41.1 dB", "exact", "not measured"]


def test_many_names_are_cut_and_the_model_itself_has_a_name() -> None:
    assert names_text(["", "a"]) == "(the model itself), a"
    assert names_text(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_layers_are_grouped_by_what_happened_to_them() -> None:
    assert grouped({"a": "x", "b": "y", "c": "y"}) == {"y": ["b", "c"], "x": ["a"]}
    assert layer_facts({"a": "int8", "b": "int8"}, {"c": "norm"}) == [
        ("quantized", "2 layers: int8"), ("skipped", "1 layer: norm"), ("", "(c)"),
    ]  # fmt: skip
