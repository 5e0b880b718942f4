"""Static graphs as programs of torch.export: before and after they have run, on every backend."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from mono_quant import ops
from mono_quant.errors import InputError
from mono_quant.modules import notices
from tests.graph.conftest import GRAPHS, decibels, example_of, leaves

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")


def program_of(model: Any, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    return export(model, inputs, dynamic_shapes=(tuple({0: Dim.DYNAMIC} for _ in inputs),))


def operators(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_has_not_run_is_exported_step_by_step(name: str) -> None:
    example = example_of(name)
    model, inputs, others = copy.deepcopy(example.quantized), example.inputs(2), example.inputs(5)
    program = program_of(model, inputs)
    with ops.use_backend("reference"):
        expected = copy.deepcopy(model)(*others)
    for found, exact in zip(leaves(program.module()(*others)), leaves(expected), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)  # linear layers on rows are those of the backend
    # Nothing of the export stays in the model.
    assert all(type(buffer) is Tensor for buffer in model.buffers())
    for found, exact in zip(leaves(model(*others)), leaves(copy.deepcopy(model)(*others)), strict=True):
        assert torch.equal(found, exact)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["residuals", "inverted", "branches"])
def test_a_graph_that_has_run_is_exported_as_it_runs(name: str) -> None:
    example = example_of(name)
    model, inputs, others = copy.deepcopy(example.quantized), example.inputs(2), example.inputs(5)
    expected = model(*others)
    program = program_of(model, inputs)
    assert ("mono_quant.run_codes.default" in operators(program)) == (ops.get_backend() == "native")
    for found, exact in zip(leaves(program.module()(*others)), leaves(expected), strict=True):
        assert torch.equal(found, exact)


def test_a_graph_that_has_run_is_exported_on_another_backend() -> None:
    example = example_of("residuals")
    model, inputs = copy.deepcopy(example.quantized), example.inputs(2)
    expected = model(*inputs)
    for backend in ops.available_backends():
        with ops.use_backend(backend):
            program = program_of(model, inputs)
        assert decibels(expected, program.module()(*inputs)) > 35
    assert torch.equal(model(*inputs), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("runs_first", [False, True])
def test_a_program_refuses_nan(runs_first: bool) -> None:
    example = example_of("residuals")
    model, (x,) = copy.deepcopy(example.quantized), example.inputs(2)
    if runs_first:
        model(x)
    program = program_of(model, (x,))
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="met NaN"):
        program.module()(x)


@pytest.mark.skipif("native" not in ops.available_backends(), reason="the native kernels do not run here")
def test_the_logger_says_how_to_get_a_program_with_native_kernels(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_reported", set())
    example = example_of("residuals")
    model, inputs = copy.deepcopy(example.quantized), example.inputs(2)
    with caplog.at_level(logging.WARNING, logger="mono_quant"):
        program_of(model, inputs)
        assert "call it once before" in caplog.text
        caplog.clear()
        model(*inputs)
        program_of(model, inputs)
    assert not caplog.records


def test_what_has_run_in_a_layout_that_cannot_be_exported_is_refused() -> None:
    if "torch" not in ops.available_backends():
        pytest.skip("there is no oneDNN here")
    example = example_of("signals")
    model, inputs = copy.deepcopy(example.quantized), example.inputs(2)
    with ops.use_backend("torch"):
        expected = model(*inputs)
        if not any(buffer.is_mkldnn for buffer in model.buffers()):
            pytest.skip("oneDNN does not multiply integers here")
        with pytest.raises(InputError, match=r"kernel of \[5\]"):
            program_of(model, inputs)
        program_of(copy.deepcopy(model), inputs)
        assert torch.equal(model(*inputs)[0], expected[0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["residuals", "signals"])
def test_programs_of_graphs_that_have_not_run_are_saved(name: str) -> None:
    example = example_of(name)
    used, inputs = copy.deepcopy(example.quantized), example.inputs(2)
    used(*inputs)
    program = program_of(copy.deepcopy(used), inputs)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for found, wanted in zip(leaves(loaded(*inputs)), leaves(program.module()(*inputs)), strict=True):
        assert torch.equal(found, wanted)
