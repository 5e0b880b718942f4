"""Outputs of models: run in every form of inputs, taken apart into named tensors, compared."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant.errors import InputError, InputTypeError
from mono_quant.report.outputs import compare_outputs, inference, named_tensors, run_model


@dataclass
class Answer:
    logits: Tensor
    text: str = ""


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return a if b is None else a + b


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (torch.ones(2), ["output"]),
        ((torch.ones(2), torch.ones(3)), ["[0]", "[1]"]),
        ({"a": torch.ones(2), "b": (torch.ones(3), None)}, ["a", "b[0]"]),
        (OrderedDict(last=torch.ones(2), past=[(torch.ones(1), torch.ones(1))]), ["last", "past[0][0]", "past[0][1]"]),
        ([{"x": torch.ones(2)}], ["[0].x"]),
        (Answer(torch.ones(2)), ["logits"]),
        ("nothing", []),
    ],
)
def test_every_tensor_in_an_output_has_a_name(output: Any, names: list[str]) -> None:
    assert list(named_tensors(output)) == names


def test_outputs_of_transformers_are_looked_into() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutputWithPooling(last_hidden_state=torch.ones(1, 2), pooler_output=torch.ones(3))
    assert list(named_tensors(output)) == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize(
    "inputs",
    [
        torch.ones(2) * 3,
        (torch.ones(2), torch.ones(2) * 2),
        {"a": torch.ones(2), "b": torch.ones(2) * 2},
        lambda model: model(torch.ones(2), b=torch.ones(2) * 2),
    ],
)
def test_models_run_on_every_form_of_inputs(inputs: Any) -> None:
    assert run_model(Sum(), inputs).tolist() == [3.0, 3.0]


def test_other_inputs_are_refused() -> None:
    with pytest.raises(InputTypeError, match="list"):
        run_model(Sum(), [torch.ones(2)])  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_the_model_are_an_input_error_with_its_cause() -> None:
    with pytest.raises(InputError, match=r"Linear cannot run on these inputs: .*3x5 and 4x2") as caught:
        run_model(nn.Linear(4, 2), torch.ones(3, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_inference_means_evaluation_mode_and_no_gradients_and_ends_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False]
    assert torch.is_grad_enabled()


def test_each_output_is_compared_by_its_name() -> None:
    first = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    second = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.3]])}
    a, b = compare_outputs(first, second)
    assert (a.name, a.shape, a.sqnr_db, a.cosine, a.max_abs_error) == ("a", (2,), math.inf, pytest.approx(1), 0.0)
    assert (b.name, b.shape) == ("b", (1, 1))
    assert b.sqnr_db == pytest.approx(20, abs=1e-4)
    assert b.max_abs_error == pytest.approx(0.3, abs=1e-6)


def test_an_output_is_finite_if_it_is_wherever_the_original_is() -> None:
    masked = torch.tensor([-math.inf, 1.0])
    assert compare_outputs(masked, masked)[0].finite
    assert not compare_outputs(torch.zeros(2), masked)[0].finite


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("text", "text", "no tensor"),
        ((torch.ones(1),), torch.ones(1), "different tensors"),
        (torch.ones(1), torch.ones(2), "shape"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(first: Any, second: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare_outputs(first, second)
