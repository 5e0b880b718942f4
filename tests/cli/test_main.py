"""The command as a whole: help, version, exit codes, and how a process of its own behaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mono_quant
from mono_quant.cli import cli
from mono_quant.cli import compare as compare_command
from mono_quant.ops import backend, native
from tests.cli.conftest import Run, document

ROOT = Path(__file__).parents[2]


def test_help_names_commands_model_arguments_and_exit_codes(run: Run) -> None:
    text = run("--help").stdout
    for part in ("quantize", "info", "compare", "validate", "package.module:factory", "transformers directory"):
        assert part in text
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert {"0", "1", "2", "3", "4", "130"} <= {line[0] for line in lines if len(line) == 2}


def test_version_is_the_packages(run: Run) -> None:
    assert run("--version").stdout.strip() == f"monoquant, version {mono_quant.__version__}"


def test_debug_shows_the_traceback_and_keeps_the_exit_code(here: Path) -> None:
    del here
    result = CliRunner().invoke(cli, ["--debug", "quantize", "nets:broken"])
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert 'raise KeyError("no such weight")' in result.stderr


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def compare(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(compare_command, "compare_models", compare)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("a bug"), 1, "Error: unexpected RuntimeError: a bug"),
        (MemoryError(), 1, "Error: there is not enough memory"),
        (PermissionError(13, "Permission denied", "x.pt"), 3, "Error: [Errno 13] Permission denied: 'x.pt'"),
        (mono_quant.ValidationError("wrong", "mend it"), 4, "Error: wrong\nSuggestion: mend it"),
        (mono_quant.QuantizationError("wrong"), 3, "Error: wrong"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    fail_with(monkeypatch, error)
    result = run("compare", "m.pt", "m.pt", "--metrics", "size", code=code)
    assert message in result.stderr
    assert result.stdout == ""


def test_an_unexpected_error_is_a_document_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, RuntimeError("a bug"))
    found = document(run("compare", "m.pt", "m.pt", "--metrics", "size", "--json", code=1))
    assert found["error"]["type"] == "RuntimeError"


def test_options_of_the_library_are_spelled_as_those_of_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, mono_quant.InputError("group_size=7 and bits=8", "Use skip=, or allow_pickle=True."))
    result = run("compare", "m.pt", "m.pt", "--metrics", "size", code=3)
    assert "Error: --group-size 7 and --bits 8\nSuggestion: Use --skip, or --allow-pickle.\n" in result.stderr


def test_warnings_are_lines_without_places_in_the_source(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*arguments: Any, **options: Any) -> Any:
        warnings.warn("mind the gap", stacklevel=1)
        return mono_quant.report.compare_models(*arguments, **options)

    monkeypatch.setattr(compare_command, "compare_models", compare)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("compare", "m.pt", "m.pt", "--metrics", "size")
    assert "Warning: mind the gap" in result.stderr.splitlines()


def start(*arguments: str, environment: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])} | (environment or {})
    # Who is started in the background ignores Ctrl-C, and so do its children, unless they ask for the default again.
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "os.execv(sys.executable, sys.orig_argv[3:])"
    )
    command = [sys.executable, "-c", code, sys.executable, "-W", "error", "-m", "mono_quant", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_a_process_of_its_own_prints_one_document_and_everything_else_beside_it(here: Path) -> None:
    process = start("quantize", "nets:build", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (here / json.loads(out)["output"]).is_file()
    assert err.splitlines() == ["Loading nets:build", "Quantizing: 3/3", "Saving build_quantized.safetensors"]


def test_a_process_of_its_own_ends_with_the_exit_code_and_no_traceback(here: Path) -> None:
    del here
    process = start("quantize", "unimportable:build")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (3, "")
    assert "Error: cannot import 'unimportable'" in err
    assert "Traceback" not in err


WRONG_ENVIRONMENTS = [
    ({"MONO_QUANT_BACKEND": "fastest"}, "'fastest' is not one of native, torch, reference"),
    ({"MONO_QUANT_BACKEND": "native", "MONO_QUANT_NATIVE": "0"}, "switched off by MONO_QUANT_NATIVE=0"),
    pytest.param(
        {"MONO_QUANT_BACKEND": "", "MONO_QUANT_ISA": "sse9"},
        "'sse9' is not available on this machine",
        marks=pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded()),
    ),
]


@pytest.mark.parametrize(("environment", "message"), WRONG_ENVIRONMENTS)
def test_an_environment_that_asks_for_what_is_not_there_is_an_error_of_the_command(
    here: Path, environment: dict[str, str], message: str
) -> None:
    del here
    process = start("--help", environment=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (3, "")
    error, suggestion = err.splitlines()
    assert error.startswith("Error: ")
    assert message in error
    assert suggestion.startswith("Suggestion: ")


def test_such_an_error_can_be_a_document_or_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_refusal", mono_quant.BackendError("no such kernels", "Unset it."))
    found = document(run("info", "m.pt", "--json", code=3))
    assert found["error"] == {"type": "BackendError", "message": "no such kernels", "suggestion": "Unset it."}
    result = CliRunner().invoke(cli, ["--debug", "info", "m.pt"])
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "Error: no such kernels\nSuggestion: Unset it.\n" in result.stderr


SLOW = """
import time
from pathlib import Path
from nets import build as fast
from mono_quant.modules import QuantizedLinear

def build():
    quantize = QuantizedLinear.quantize_weight.__func__

    def slowly(cls, module, scheme):
        Path("started").touch()
        time.sleep(60)
        return quantize(cls, module, scheme)

    QuantizedLinear.quantize_weight = classmethod(slowly)
    return fast()
"""


def test_ctrl_c_while_quantizing_prints_one_line_and_leaves_no_file(here: Path) -> None:
    (here / "slow.py").write_text(SLOW)
    process = start("quantize", "slow:build", "-o", "out.safetensors")
    deadline = time.monotonic() + 120
    while not (here / "started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == ["Loading slow:build", "Interrupted"]
    assert not [path.name for path in here.iterdir() if "out.safetensors" in path.name]


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(here: Path) -> None:
    del here
    process = start("info", "m.safetensors", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    process.wait(timeout=120)
    assert "Traceback" not in err
    assert "Error" not in err
