"""Choosing a backend: by call, for a block, by the environment; and what cannot be chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mono_quant import ops
from mono_quant.errors import BackendError
from mono_quant.ops import native, torch_cpu
from tests.ops.operands import LinearWeight


def test_the_pure_python_backends_are_always_there() -> None:
    available = ops.available_backends()
    assert available[-2:] == ("torch", "reference")
    assert ("native" in available) == native.is_loaded()


@pytest.mark.parametrize("name", ops.available_backends())
def test_a_backend_holds_for_its_block(name: str) -> None:
    before = ops.get_backend()
    with ops.use_backend(name):
        assert ops.get_backend() == name
        with ops.use_backend("reference"):
            assert ops.get_backend() == "reference"
        assert ops.get_backend() == name
    assert ops.get_backend() == before


def test_a_block_that_fails_gives_its_backend_back() -> None:
    before = ops.get_backend()
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert ops.get_backend() == before


@pytest.mark.parametrize("name", ["", "cuda", "Native", "NATIVE ", None])
def test_an_unknown_backend_is_refused_and_changes_nothing(name: str) -> None:
    before = ops.get_backend()
    with pytest.raises(BackendError, match="not one of native, torch, reference"):
        ops.set_backend(name)
    assert ops.get_backend() == before


def test_an_absent_native_library_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    monkeypatch.setattr(native, "reason_not_loaded", lambda: "it was left at home")
    assert ops.available_backends() == ("torch", "reference")
    before = ops.get_backend()
    with pytest.raises(BackendError, match="it was left at home") as caught:
        ops.set_backend("native")
    assert caught.value.suggestion
    assert ops.get_backend() == before


@pytest.mark.parametrize("name", ops.available_backends())
def test_a_backend_runs_its_own_arithmetic_whatever_ran_before(name: str) -> None:
    weight, x = LinearWeight.random(5, 12), torch.randn(3, 12)
    for before in ops.available_backends():
        with ops.use_backend(before):
            weight.linear(x)
        with ops.use_backend(name), torch.profiler.profile() as profile:
            weight.linear(x)
        called = {event.key for event in profile.key_averages()}
        integer_product = torch_cpu.integer_products_are_exact() and name == "torch"
        assert ("aten::_int_mm" in called) == integer_product
        assert ("aten::matmul" in called) == (name != "native" and not integer_product)


def test_backends_that_were_changed_often_still_work() -> None:
    weight, x = LinearWeight.random(5, 12), torch.randn(3, 12)
    answers = []
    for _ in range(5):
        for name in ops.available_backends():
            with ops.use_backend(name):
                answers.append(weight.linear(x))
    for answer in answers:
        torch.testing.assert_close(answer, answers[0], rtol=1e-6, atol=1e-6)


def test_all_that_may_have_kept_the_library_from_being_built_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    reason = native._state.__wrapped__().reason
    assert all(cause in reason for cause in ("C++ compiler", "torch", "MONO_QUANT_BUILD=off"))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_environment_chooses() -> None:
    finished = run_python("import mono_quant.ops as ops; print(ops.get_backend())", MONO_QUANT_BACKEND="reference")
    assert finished.stdout.split() == ["reference"], finished.stderr


WHAT_RUNS = """
import sys
from pathlib import Path
import torch
from mono_quant import ops, show_config
from mono_quant.ops import native

show_config()
ops.available_backends()
called = set()
sys.setprofile(lambda frame, event, _: called.add(Path(frame.f_code.co_filename).stem) if event == "call" else None)
torch.ops.mono_quant.quantize_rows(torch.randn(3, 12))
sys.setprofile(None)
print("runs", *sorted(called & {"reference", "torch_cpu"}), "as", ops.get_backend(), native.is_loaded())
"""


@pytest.mark.parametrize(("name", "module"), [("torch", "torch_cpu"), ("reference", "reference")])
@pytest.mark.parametrize("switch", ["0", ""])
def test_what_the_environment_chooses_still_runs_once_other_backends_were_asked_for(
    name: str, module: str, switch: str
) -> None:
    finished = run_python(WHAT_RUNS, MONO_QUANT_BACKEND=name, MONO_QUANT_NATIVE=switch)
    assert finished.stderr == ""
    loaded = native.LIBRARY.exists() and switch != "0"
    assert finished.stdout.splitlines()[-1] == f"runs {module} as {name} {loaded}"


REFUSALS = """
import torch
import mono_quant
from mono_quant import ops

operators = torch.ops.mono_quant
layer = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
uses = {
    "get_backend": ops.get_backend,
    "show_config": mono_quant.show_config,
    "operator": lambda: operators.quantize_rows(torch.randn(3, 12)),
    "layer": lambda: mono_quant.quantize(layer).model(torch.randn(2, 8)),
    "block": lambda: ops.use_backend("reference").__enter__(),
}
for name, use in uses.items():
    try:
        use()
    except mono_quant.BackendError as error:
        print(f"{name}: {error.message} | {error.suggestion}")
    else:
        print(f"{name}: ran")
"""


@pytest.mark.parametrize(
    ("environment", "message", "suggestion"),
    [
        ({"MONO_QUANT_BACKEND": "fastest"}, "'fastest' is not one of native, torch, reference", "MONO_QUANT_BACKEND"),
        (
            {"MONO_QUANT_BACKEND": "native", "MONO_QUANT_NATIVE": "0"},
            "switched off by MONO_QUANT_NATIVE=0",
            "Unset MONO_QUANT_NATIVE",
        ),
        pytest.param(
            {"MONO_QUANT_BACKEND": "", "MONO_QUANT_ISA": "sse9"},
            "'sse9' is not available on this machine",
            "MONO_QUANT_ISA",
            marks=pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded()),
        ),
    ],
)
def test_an_environment_that_asks_for_what_is_not_there_is_an_error_of_every_use_but_not_of_the_import(
    environment: dict[str, str], message: str, suggestion: str
) -> None:
    finished = run_python(REFUSALS, **environment)
    assert finished.stderr == ""
    lines = finished.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["get_backend", "show_config", "operator", "layer", "block"]
    for line in lines:
        assert message in line
        assert suggestion in line.partition(" | ")[2]


def test_a_call_may_choose_what_the_environment_did_not() -> None:
    code = "from mono_quant import ops; ops.set_backend('reference'); print(ops.get_backend())"
    assert run_python(code, MONO_QUANT_BACKEND="fastest").stdout.split() == ["reference"]
    code = (
        "from mono_quant import ops; ops.set_backend('torch'); ops.choose_default_backend(); print(ops.get_backend())"
    )
    finished = run_python(code, MONO_QUANT_BACKEND="fastest")
    assert finished.stdout == ""
    assert "'fastest' is not one of" in finished.stderr


def test_the_native_library_can_be_switched_off() -> None:
    code = "import mono_quant.ops as ops; print(*ops.available_backends(), ops.get_backend())"
    finished = run_python(code, MONO_QUANT_NATIVE="0", MONO_QUANT_BACKEND="")
    assert finished.stdout.split() == ["torch", "reference", "torch"], finished.stderr
