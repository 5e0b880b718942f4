"""Algorithms on whole models: any module, in a copy, layer by layer, and nothing in silence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from mono_quant.algorithms import (
    ALGORITHMS,
    AlgorithmOptions,
    AlgorithmOutcome,
    GPTQOptions,
    apply_algorithm,
    needs_data,
    parse_algorithm,
)
from mono_quant.calibration import Batch
from mono_quant.core import LayerScheme
from mono_quant.errors import ConfigurationError, InputError, QuantizationError
from mono_quant.modules import QuantizedModule, counterpart_for_scheme
from tests.algorithms.cases import INT8, LanguageModel, language_model, token_batches

INT4 = LayerScheme("weight_only", bits=4, symmetric=False, group_size=16)
COMBINATIONS = ("hqq", "gptq", "awq", "smoothquant", "bias_correction", "awq+gptq", "smoothquant+gptq+bias_correction")


def _schemes(model: nn.Module, scheme: LayerScheme) -> dict[str, LayerScheme]:
    return {
        name: scheme if type(module) is nn.Linear and name != "head" else INT8
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
    }


def _quantized(outcome: AlgorithmOutcome, schemes: dict[str, LayerScheme]) -> nn.Module:
    model = outcome.model
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        layer_type = counterpart_for_scheme(module, scheme)
        assert layer_type is not None
        parent, _, child = name.rpartition(".")
        layer: QuantizedModule = layer_type.from_float(module, scheme, outcome.quantized[name])
        setattr(model.get_submodule(parent), child, layer)
    return model


def _loss(model: nn.Module, quantized: nn.Module, batches: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float((model(*b.args) - quantized(*b.args)).square().mean()) for b in batches) / len(batches)


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=str)
@pytest.mark.parametrize("algorithm", COMBINATIONS)
def test_every_combination_quantizes_every_layer_and_leaves_the_original(algorithm: str, scheme: LayerScheme) -> None:
    model = language_model()
    parameters = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    schemes = _schemes(model, scheme)
    seen: list[tuple[int, int, str]] = []
    outcome = apply_algorithm(
        model, schemes, algorithm, token_batches(), progress=lambda done, total, name: seen.append((done, total, name))
    )
    assert outcome.quantized.keys() == schemes.keys()
    assert [done for done, _, _ in seen] == list(range(1, len(schemes) + 1))
    assert {name for _, _, name in seen} == schemes.keys()
    quantized = _quantized(outcome, schemes)
    assert quantized(token_batches()[0].args[0]).isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all("forward" not in module.__dict__ for module in itertools.chain(model.modules(), quantized.modules()))


def test_more_is_known_the_smaller_the_error() -> None:
    model, calibration = language_model(), token_batches(24)
    test = token_batches(30)[24:]
    schemes = _schemes(model, INT4)
    losses = {}
    for algorithm in ("hqq", "gptq", "awq+gptq"):
        losses[algorithm] = _loss(
            model, _quantized(apply_algorithm(model, schemes, algorithm, calibration), schemes), test
        )
    assert losses["gptq"] < 0.6 * losses["hqq"]
    assert losses["awq+gptq"] < 0.6 * losses["hqq"]


def test_smoothing_helps_where_inputs_have_outliers() -> None:
    model, calibration = language_model(), token_batches(12)
    schemes = _schemes(model, INT8)
    plain = _quantized(apply_algorithm(model, schemes, "hqq"), schemes)
    outcome = apply_algorithm(model, schemes, "smoothquant", calibration)
    assert {"blocks.0.q", "blocks.0.gate", "blocks.0.down"} <= set(outcome.scaled)
    assert _loss(model, _quantized(outcome, schemes), calibration) < 0.8 * _loss(model, plain, calibration)


def test_scaling_alone_leaves_the_float_function_unchanged() -> None:
    model, batches = language_model(), token_batches()
    for algorithm in ("smoothquant", "awq"):
        outcome = apply_algorithm(model, _schemes(model, INT4), algorithm, batches)
        assert outcome.scaled
        for batch in batches:
            with torch.no_grad():
                expected = model(*batch.args)
                assert torch.allclose(outcome.model(*batch.args), expected, atol=1e-4 * float(expected.abs().max()))


def test_scaling_names_the_layers_it_leaves_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    outcome = apply_algorithm(model, {"0": INT4, "2": INT4}, "awq", [Batch((torch.randn(8, 16),), {})])
    assert outcome.scaled == []
    assert any("0, 2" in note for note in outcome.notes)


def test_bias_correction_restores_the_mean_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16)).eval()
    batches = [Batch((torch.randn(50, 16) + 2,), {}) for _ in range(4)]
    schemes = {"0": INT4, "2": INT4}
    data = torch.cat([batch.args[0] for batch in batches])
    with torch.no_grad():
        expected = model(data).mean(dim=0)
        plain = _quantized(apply_algorithm(model, schemes, "hqq"), schemes)(data).mean(dim=0)
        fixed = _quantized(apply_algorithm(model, schemes, "hqq+bias_correction", batches), schemes)(data).mean(dim=0)
    assert (fixed - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-3
    assert model[0].bias is None


def test_layers_that_share_a_weight_share_its_codes() -> None:
    model = language_model()
    for algorithm in ("hqq", "gptq"):
        outcome = apply_algorithm(model, _schemes(model, INT8), algorithm, token_batches())
        assert outcome.quantized["head"] is outcome.quantized["embedding"]


def test_an_expert_without_data_falls_back_and_is_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[1](self.experts[0](x))

    torch.manual_seed(0)
    model = Experts()
    schemes = {f"experts.{i}": INT4 for i in range(3)}
    outcome = apply_algorithm(model, schemes, "gptq", [Batch((torch.randn(40, 16),), {})])
    assert outcome.fallbacks == {"experts.2": "no calibration batch reached it"}
    data_free = apply_algorithm(model, schemes, "hqq")
    assert torch.equal(outcome.quantized["experts.2"].codes, data_free.quantized["experts.2"].codes)
    assert not torch.equal(outcome.quantized["experts.1"].codes, data_free.quantized["experts.1"].codes)


def test_inputs_that_are_all_zero_fall_back_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    outcome = apply_algorithm(model, {"0": INT4}, "gptq", [Batch((torch.zeros(4, 16),), {})])
    assert "all zero" in outcome.fallbacks["0"]
    assert "0" in outcome.quantized


def test_convolutions_embeddings_and_other_modules_take_part() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
            self.conv1d, self.linear = nn.Conv1d(8, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(self.conv(x).relu()).flatten(2)
            return self.linear(self.conv1d(x).mean(dim=2))

    torch.manual_seed(0)
    model = Mixed().eval()
    schemes = dict.fromkeys(("conv", "depthwise", "conv1d", "linear"), INT8)
    batches = [Batch((torch.randn(4, 3, 8, 8),), {}) for _ in range(5)]
    outcome = apply_algorithm(model, schemes, "gptq+bias_correction", batches)
    assert outcome.fallbacks == {"depthwise": "its channels are grouped"}
    assert outcome.quantized["conv"].shape == model.conv.weight.shape
    assert _loss(model, _quantized(outcome, schemes), batches) < 1e-3


def test_pytorchs_fused_transformer_layers_are_reached() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    schemes = {"linear1": INT4, "linear2": INT4}
    outcome = apply_algorithm(model, schemes, "gptq", [Batch((torch.randn(4, 10, 16),), {})])
    assert outcome.fallbacks == {}
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_in_training_mode_is_run_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(16, 16)).train()
    batches = [Batch((torch.randn(40, 16),), {})]
    found = apply_algorithm(model, {"1": INT4}, "gptq", batches)
    again = apply_algorithm(model.eval(), {"1": INT4}, "gptq", batches)
    assert torch.equal(found.quantized["1"].codes, again.quantized["1"].codes)
    assert all(module.training for module in found.model.modules())


def test_the_same_data_gives_the_same_codes() -> None:
    model, batches = language_model(), token_batches()
    schemes = _schemes(model, INT4)
    first, second = (apply_algorithm(model, schemes, "awq+gptq+bias_correction", batches) for _ in range(2))
    assert all(torch.equal(q.codes, second.quantized[name].codes) for name, q in first.quantized.items())
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_bfloat16_models_are_quantized_too() -> None:
    model = language_model().to(torch.bfloat16)
    schemes = _schemes(model, INT4)
    outcome = apply_algorithm(model, schemes, "smoothquant+gptq+bias_correction", token_batches())
    assert outcome.model.blocks[0].up.weight.dtype == torch.bfloat16
    assert outcome.quantized.keys() == schemes.keys()


def test_float16_layers_are_left_to_the_caller() -> None:
    model = language_model()
    schemes = {"blocks.0.q": LayerScheme("float16", bits=16), "blocks.0.k": INT4}
    assert apply_algorithm(model, schemes, "gptq", token_batches()).quantized.keys() == {"blocks.0.k"}


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    model = language_model()
    expected = model(token_batches()[0].args[0])

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_algorithm(model, _schemes(model, INT4), "awq+gptq", token_batches(), progress=interrupt)
    assert torch.equal(model(token_batches()[0].args[0]), expected)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("gptq", ("gptq",)),
        ("GPTQ+SmoothQuant", ("smoothquant", "gptq")),
        (["bias-correction", "hqq"], ("hqq", "bias_correction")),
    ],
)
def test_algorithms_run_in_their_own_order(algorithm: str | list[str], expected: tuple[str, ...]) -> None:
    assert parse_algorithm(algorithm) == expected


@pytest.mark.parametrize("algorithm", ["gtpq", "gptq+gptq", "awq+smoothquant", "hqq+gptq", ""])
def test_contradictory_algorithms_are_refused(algorithm: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_algorithm(algorithm)


def test_missing_data_is_an_error() -> None:
    assert [name for name in ALGORITHMS if not needs_data(name)] == ["hqq"]
    with pytest.raises(ConfigurationError, match="needs calibration data"):
        apply_algorithm(LanguageModel(), {}, "gptq")


def test_a_name_that_is_not_in_the_model_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="blocks\\.9"):
        apply_algorithm(language_model(), {"blocks.9": INT4}, "hqq")
    with pytest.raises(ConfigurationError, match="norm"):
        apply_algorithm(language_model(), {"norm": INT4}, "hqq")


def test_a_broken_weight_is_named() -> None:
    model = language_model()
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = float("inf")
    for algorithm in ("hqq", "gptq"):
        with pytest.raises(QuantizationError, match="blocks\\.1\\.up"):
            apply_algorithm(model, _schemes(model, INT4), algorithm, token_batches())


def test_a_batch_that_the_model_cannot_take_is_named() -> None:
    batches = [*token_batches(1), Batch((torch.full((1, 24), 99),), {})]
    with pytest.raises(InputError, match="batch"):
        apply_algorithm(language_model(), _schemes(language_model(), INT4), "gptq", batches)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="hqq_norm"):
        AlgorithmOptions(hqq_norm=3)
    with pytest.raises(ConfigurationError, match="sampled_rows"):
        AlgorithmOptions(sampled_rows=0)
    outcome = apply_algorithm(
        language_model(), {"blocks.0.q": INT4}, "gptq", token_batches(),
        AlgorithmOptions(gptq=GPTQOptions(damping=0.1, activation_order=False, revisions=0)),
    )  # fmt: skip
    assert outcome.samples == 6
