"""``sensitivity``: what it measures is what happens, and it leaves no trace."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mono_quant
from mono_quant.api.formats import FORMATS
from mono_quant.errors import ConfigurationError, InputError, InputTypeError
from mono_quant.report import SensitivityReport, cosine_similarity, sqnr_db


class Encoder(nn.Module):
    """Tokens to logits, with a residual connection, a layer of its own width and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.wide = nn.Linear(32, 64)
        self.act = nn.ReLU(inplace=True)
        self.narrow = nn.Linear(64, 32)
        self.again = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 12)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(tokens)
        hidden = hidden + self.narrow(self.act(self.wide(hidden)))
        hidden = self.norm(self.again(torch.tanh(self.again(hidden))) + hidden)
        return {"logits": self.head(hidden)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(40, (96, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def report(model: nn.Module, tokens: Tensor) -> SensitivityReport:
    return mono_quant.sensitivity(model, tokens, group_size=32)


def only(model: nn.Module, layer: str, **options: Any) -> nn.Module:
    quantized: nn.Module = mono_quant.quantize(model, include=[layer], sqnr_error_threshold=-999, **options).model
    return quantized


OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 32},
    "int8": {},
    "int8_weights": {"group_size": 32},
}


def test_every_layer_has_its_formats(report: SensitivityReport) -> None:
    assert [layer.name for layer in report.layers] == ["embed", "wide", "narrow", "again", "head"]
    by_name = {layer.name: layer for layer in report.layers}
    assert set(by_name["wide"].formats) == {*FORMATS, "float"}
    assert set(by_name["embed"].formats) == {"int8", "float16", "float"}
    assert report.samples == 96
    assert report.logits == "logits"


def test_the_estimates_rank_layers_as_runs_of_the_model_do(
    model: nn.Module, tokens: Tensor, report: SensitivityReport
) -> None:
    exact = model(tokens)["logits"]
    estimated, measured = [], []
    for layer in report.layers:
        for name, options in OPTIONS.items():
            if name in layer.formats:
                effect = layer.formats[name].model
                assert effect is not None
                estimated.append(effect.sqnr_db)
                measured.append(sqnr_db(exact, only(model, layer.name, **options)(tokens)["logits"]))
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (estimated, measured)]
    assert cosine_similarity(*(rank - rank.mean() for rank in ranks)) > 0.95
    assert max(abs(a - b) for a, b in zip(estimated, measured, strict=True)) < 3


def test_the_estimated_divergence_is_near_the_measured_one(
    model: nn.Module, tokens: Tensor, report: SensitivityReport
) -> None:
    exact = model(tokens)["logits"].detach().double().log_softmax(-1)
    for layer in report.layers:
        other = only(model, layer.name)(tokens)["logits"].detach().double().log_softmax(-1)
        measured = float((exact.exp() * (exact - other)).sum(-1).mean())
        estimated = layer.formats["int8"].model_kl
        assert estimated is not None
        assert measured / 2.5 < estimated < measured * 2.5


def test_a_layers_own_error_is_that_of_its_output(model: nn.Module, tokens: Tensor, report: SensitivityReport) -> None:
    hidden = model.get_submodule("embed")(tokens)
    exact = model.get_submodule("wide")(hidden)
    quantized = mono_quant.quantize(model, fuse_activations=False).model
    alone = sqnr_db(exact, quantized.wide(hidden))
    company = sqnr_db(exact, quantized.wide(quantized.embed(tokens)))
    effect = report.layers[1].formats["int8"]
    assert effect.alone is not None
    assert effect.company is not None
    assert effect.alone.sqnr_db == pytest.approx(alone, abs=0.01)
    assert effect.company.sqnr_db == pytest.approx(company, abs=0.01)
    assert effect.company.sqnr_db < effect.alone.sqnr_db
    assert effect.alone.cosine == pytest.approx(cosine_similarity(exact, quantized.wide(hidden)), abs=1e-6)


@pytest.mark.parametrize("name", ["int4", "int8", "int8_weights"])
def test_the_whole_model_in_one_format(model: nn.Module, tokens: Tensor, report: SensitivityReport, name: str) -> None:
    quantized = mono_quant.quantize(model, sqnr_error_threshold=-999, **OPTIONS[name])
    effect = report.uniform[name]
    assert effect.bytes == quantized.info.bytes_after
    expected = sqnr_db(model(tokens)["logits"], quantized.model(tokens)["logits"])
    assert effect.output.sqnr_db == pytest.approx(expected, abs=0.01)
    assert effect.kl is not None
    assert effect.kl > 0


def test_worst_puts_what_hurts_most_first(report: SensitivityReport) -> None:
    errors = [layer.formats["int4"].model for layer in report.worst("int4")]
    values = [error.sqnr_db for error in errors if error is not None]
    assert values == sorted(values)
    assert "embed" not in [layer.name for layer in report.worst("int4")]


def test_the_same_seed_answers_the_same(model: nn.Module, tokens: Tensor) -> None:
    def numbers(seed: int) -> list[Any]:
        found = mono_quant.sensitivity(model, tokens, seed=seed, formats=["int8"], num_calibration_samples=32)
        return [(layer.formats["int8"].model, layer.formats["int8"].alone) for layer in found.layers]

    assert numbers(3) == numbers(3)
    assert numbers(3) != numbers(4)


def test_nothing_is_left_behind(model: nn.Module, tokens: Tensor) -> None:
    mine = copy.deepcopy(model).train()
    mine.get_submodule("wide").requires_grad_(False)
    before = copy.deepcopy(mine.state_dict())
    state = torch.random.get_rng_state()
    mono_quant.sensitivity(mine, tokens, formats=["int8"], num_calibration_samples=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in mine.modules())
    assert [p.requires_grad for p in mine.parameters()] == [
        not name.startswith("wide") for name, _ in mine.named_parameters()
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in mine.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in mine.modules())
    assert all(p.grad is None for p in mine.parameters())


def test_samples_are_limited_and_an_iterator_is_read_once(model: nn.Module, tokens: Tensor) -> None:
    found = mono_quant.sensitivity(model, iter(tokens.split(16)), num_calibration_samples=24, formats=["int8"])
    assert found.samples == 24


def test_bare_outputs_hold_logits_only_if_that_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(32, 8)
    silent = mono_quant.sensitivity(model, x, formats=["int8"])
    said = mono_quant.sensitivity(model, x, formats=["int8"], logits="output")
    assert silent.logits is None
    assert silent.layers[0].formats["int8"].model_kl is None
    assert said.uniform["int8"].kl is not None
    with pytest.raises(InputError, match="no output of floating-point numbers named 'scores'"):
        mono_quant.sensitivity(model, x, logits="scores")


class Halting(nn.Module):
    """Gradients stop in the middle, and one layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.first(x).relu()
        answer: Tensor = self.second(hidden)
        return answer


def test_where_no_gradient_arrives_the_model_is_run() -> None:
    torch.manual_seed(0)
    model, x = Halting().eval(), torch.randn(32, 16)
    found = mono_quant.sensitivity(model, x, formats=["int8"])
    first, second, unused = found.layers
    assert first.formats["int8"].model is not None
    exact = sqnr_db(model(x), only(model, "first")(x))
    assert first.formats["int8"].model.sqnr_db == pytest.approx(exact, abs=0.01)
    assert second.formats["int8"].model is not None
    assert unused.formats["int8"].model is None
    assert unused.formats["int8"].alone is None
    assert any("no gradient" in note and "first" in note for note in found.notes)
    assert any("no calibration data" in note and "unused" in note for note in found.notes)


def test_tied_layers_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            answer: Tensor = self.head(self.embed(tokens))
            return answer

    model = Tied().eval()
    embed, head = mono_quant.sensitivity(model, torch.randint(20, (8, 5))).layers
    assert embed.shares_with == ("head",)
    assert set(embed.formats) == set(head.formats) == {"int8", "float16", "float"}
    assert embed.formats["float"].bytes == 20 * 16 * 4
    assert head.formats["float"].bytes == head.formats["int8"].bytes == 0
    assert embed.formats["int8"].model == head.formats["int8"].model


def test_the_report_is_plain_values(report: SensitivityReport) -> None:
    assert json.loads(json.dumps(report.to_dict()))["samples"] == 96


def test_mistakes_are_named(model: nn.Module, tokens: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="format 'int3' is not one of int4"):
        mono_quant.sensitivity(model, tokens, formats=["int3"])
    with pytest.raises(ConfigurationError, match="names no format to quantize to"):
        mono_quant.sensitivity(model, tokens, formats="float")
    with pytest.raises(InputTypeError, match="Dict cannot be run"):
        mono_quant.sensitivity(model.state_dict(), tokens)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="calibration batch 0"):
        mono_quant.sensitivity(model, torch.full((4, 6), 99))
