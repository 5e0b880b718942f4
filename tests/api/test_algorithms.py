"""Algorithms through ``quantize``: what they need, what they leave alone, and what they report."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mono_quant
from mono_quant.algorithms import AlgorithmOptions, GPTQOptions
from mono_quant.api.algorithm import DEFAULT_SAMPLES, plan_algorithm
from mono_quant.api.layers import quantize_by_schemes
from mono_quant.api.method import Calibration, Request
from mono_quant.api.options import Options
from mono_quant.config import QuantizationConfig
from mono_quant.core import LayerScheme
from mono_quant.errors import ConfigurationError, InputError, QuantizationError
from tests.algorithms.cases import LanguageModel, language_model, token_batches


def tokens(count: int = 6) -> list[Tensor]:
    return [batch.args[0] for batch in token_batches(count)]


def loss(model: nn.Module, quantized: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((model(ids) - quantized(ids)).square().mean()) for ids in tokens())


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("algorithm", ["hqq", "gptq", "awq+gptq", "smoothquant", "smoothquant+gptq+bias_correction"])
def test_every_algorithm_answers_a_model_of_its_own(algorithm: str, bits: int) -> None:
    model = language_model()
    before = state(model)
    data = None if algorithm == "hqq" else tokens()
    result = mono_quant.quantize(
        model, bits=bits, group_size=16 if bits == 4 else None, algorithm=algorithm, calibration_data=data
    )
    assert_same_state(model, before)
    assert not storages(model) & storages(result.model)
    assert result.model(tokens()[0]).isfinite().all()
    assert result.info.calibration_samples_used == (0 if data is None else sum(map(len, data)))


def test_data_lower_the_error() -> None:
    model = language_model()
    plain = mono_quant.quantize(model, bits=4, group_size=16)
    with_data = mono_quant.quantize(model, bits=4, group_size=16, calibration_data=tokens(12))
    assert loss(model, with_data.model) < 0.7 * loss(model, plain.model)


def test_packed_weights_with_data_mean_gptq() -> None:
    model, data = language_model(), tokens()
    named = mono_quant.quantize(model, bits=4, group_size=16, calibration_data=data, algorithm="gptq")
    unnamed = mono_quant.quantize(model, bits=4, group_size=16, calibration_data=data)
    by_config = mono_quant.quantize(model, config=QuantizationConfig(bits=4), group_size=16, calibration_data=data)
    assert_same_state(unnamed.model, state(named.model))
    assert_same_state(by_config.model, state(named.model))


def test_data_may_be_an_iterator_that_is_read_once() -> None:
    model, data = language_model(), tokens()
    once = mono_quant.quantize(model, algorithm="smoothquant+gptq", calibration_data=iter(data))
    often = mono_quant.quantize(model, algorithm="smoothquant+gptq", calibration_data=data)
    assert_same_state(once.model, state(often.model))


def test_no_more_data_is_read_than_asked_for() -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for ids in tokens(100):
            read.append(len(ids))
            yield ids

    size = len(tokens(1)[0])
    result = mono_quant.quantize(
        language_model(), algorithm="gptq", calibration_data=batches(), num_calibration_samples=size + 1
    )
    assert result.info.calibration_samples_used == size + 1
    assert len(read) == 2


def test_at_most_the_default_number_of_samples_is_used() -> None:
    request = Request(calibration=Calibration(torch.zeros(DEFAULT_SAMPLES + 50, 4)), algorithm="gptq")
    assert sum(batch.samples for batch in plan_algorithm(request, nn.Linear(4, 4)).batches) == DEFAULT_SAMPLES


@pytest.mark.parametrize("algorithm", ["smoothquant+gptq", "awq+gptq+bias_correction"])
def test_in_place_is_the_same_model_and_the_same_numbers(algorithm: str) -> None:
    model = language_model()
    changed = copy.deepcopy(model)
    kept = mono_quant.quantize(model, algorithm=algorithm, calibration_data=tokens())
    result = mono_quant.quantize(changed, algorithm=algorithm, calibration_data=tokens(), inplace=True)
    assert result.model is changed
    assert_same_state(changed, state(kept.model))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_interruption_leaves_the_model_as_it_was(inplace: bool) -> None:
    model = language_model()
    before, modules = state(model), list(model.modules())

    def stop(done: int, total: int, name: str) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mono_quant.quantize(
            model, algorithm="smoothquant+gptq", calibration_data=tokens(), inplace=inplace, progress=stop
        )
    assert_same_state(model, before)
    assert list(model.modules()) == modules
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in modules)


def test_progress_counts_every_layer_once() -> None:
    seen: list[tuple[int, int]] = []
    result = mono_quant.quantize(
        language_model(), algorithm="gptq", calibration_data=tokens(), progress=lambda d, t, n: seen.append((d, t))
    )
    total = len(result.info.layers)
    assert seen == [(done, total) for done in range(1, total + 1)]


class Experts(nn.Module):
    """Chooses an expert by the sign of the mean; one of them never sees anything."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[int(x.mean() > 0)](x)
        return out


@pytest.mark.parametrize("algorithm", ["gptq", "smoothquant+gptq", "awq+gptq", "bias_correction"])
def test_a_layer_without_data_falls_back_and_is_named(algorithm: str) -> None:
    model = Experts().eval()
    data = [torch.rand(16, 32) for _ in range(3)]
    result = mono_quant.quantize(model, bits=4, algorithm=algorithm, calibration_data=data)
    assert list(result.info.layers) == ["experts.0", "experts.1"]
    assert any("no calibration batch reached it" in w and "experts.0" in w for w in result.warnings)
    assert not any("experts.1" in w and "reached" in w for w in result.warnings)


def test_inputs_that_are_all_zero_fall_back_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    result = mono_quant.quantize(model, bits=4, algorithm="gptq", calibration_data=[torch.zeros(8, 32)])
    assert any("all zero" in warning for warning in result.warnings)
    assert_same_state(result.model, state(mono_quant.quantize(model, bits=4, algorithm="hqq").model))


def test_few_inputs_are_enough() -> None:
    # One row leaves second moments of rank one.
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    x = torch.randn(1, 64)
    result = mono_quant.quantize(model, bits=4, algorithm="gptq", calibration_data=[x])
    assert torch.allclose(result.model(x), model(x), atol=0.05)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_data_are_refused_with_their_batch(broken: float) -> None:
    data = [torch.randn(4, 32), torch.full((4, 32), broken)]
    with pytest.raises(InputError, match="calibration batch 1 holds"):
        mono_quant.quantize(nn.Sequential(nn.Linear(32, 8)), algorithm="gptq", calibration_data=data)


def test_data_that_do_not_fit_the_model_are_refused() -> None:
    data = [torch.randn(4, 31)]
    with pytest.raises(InputError, match=r"layer .0.: .* 31 features, its weight has 32"):
        mono_quant.quantize(nn.Sequential(nn.Linear(32, 8)), algorithm="gptq", calibration_data=data)
    with pytest.raises(InputError, match="failed on calibration batch 0"):
        mono_quant.quantize(nn.Sequential(nn.Linear(32, 8)), algorithm="awq", calibration_data=data)


def test_names_and_data_that_contradict_each_other_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(ConfigurationError, match="'gptqq' is not one of"):
        mono_quant.quantize(model, algorithm="gptqq")
    with pytest.raises(ConfigurationError, match="'gptq' needs calibration_data"):
        mono_quant.quantize(model, algorithm="gptq")
    with pytest.raises(ConfigurationError, match="uses no data"):
        mono_quant.quantize(model, algorithm="hqq", calibration_data=[torch.randn(4, 32)])
    with pytest.raises(ConfigurationError, match="every layer is stored as float16"):
        mono_quant.quantize(model, bits=16, algorithm="hqq")
    with pytest.raises(ConfigurationError, match="algorithm_options was given without algorithm"):
        mono_quant.quantize(model, algorithm_options=AlgorithmOptions())


def test_state_dicts_take_the_algorithm_that_needs_no_data() -> None:
    model = language_model()
    module = mono_quant.quantize(model, bits=4, group_size=16, skip=nn.Embedding, algorithm="hqq").model.state_dict()
    tensors = mono_quant.quantize(model.state_dict(), bits=4, group_size=16, algorithm="hqq", skip="embedding").model
    for name in ("blocks.0.q.weight_packed", "blocks.0.q.weight_scale"):
        assert torch.equal(tensors[name], module[name])
    with pytest.raises(ConfigurationError, match="a state dict cannot be run"):
        mono_quant.quantize(model.state_dict(), algorithm="gptq", calibration_data=tokens())


def test_options_reach_the_algorithm() -> None:
    model, data = language_model(), tokens()
    scales = [
        mono_quant.quantize(
            model, bits=4, algorithm="gptq", calibration_data=data,
            algorithm_options=AlgorithmOptions(gptq=GPTQOptions(revisions=revisions)),
        ).model.blocks[0].up.weight_scale
        for revisions in (0, 2)
    ]  # fmt: skip
    assert not torch.equal(*scales)


def test_algorithms_and_bits_for_single_layers_go_together() -> None:
    model = language_model()
    result = mono_quant.quantize(
        model, bits={"*.up": 4, "blocks.0.up": 32, "head": 16, "*": 8}, algorithm="smoothquant+gptq",
        calibration_data=tokens(),
    )  # fmt: skip
    kinds = {name: layer.scheme.kind for name, layer in result.info.layers.items()}
    assert "blocks.0.up" not in kinds
    assert kinds["head"] == "float16"
    assert kinds["blocks.1.up"] == "weight_only"
    assert loss(model, result.model) < loss(model, mono_quant.quantize(model, bits=4).model)


def test_a_mapping_of_schemes_takes_an_algorithm_too() -> None:
    model = language_model()
    request = Request(calibration=Calibration(tokens()), algorithm="gptq")
    schemes = {"blocks.0.up": LayerScheme("weight_only", bits=4, group_size=16), "head": None}
    result = quantize_by_schemes(model, schemes, Options(), plan=plan_algorithm(request, model))
    assert result.info.layers["blocks.0.up"].scheme.bits == 4
    assert result.info.calibration_samples_used == sum(map(len, tokens()))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.depthwise(self.first(x).relu()).relu().mean((2, 3)))
        return out


def test_convolutions() -> None:
    model = Convolutions().eval()
    images = torch.randn(16, 3, 8, 8)
    result = mono_quant.quantize(model, algorithm="gptq+bias_correction", calibration_data=images)
    assert list(result.info.layers) == ["first", "depthwise", "head"]
    assert any("depthwise" in warning and "grouped" in warning for warning in result.warnings)
    with torch.no_grad():
        assert (result.model(images) - model(images)).abs().max() < 0.05


def test_transformers_layers_with_transposed_weights() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(48, 32), nn.GELU(), pytorch_utils.Conv1D(32, 48)).eval()
    x = torch.randn(64, 32)
    result = mono_quant.quantize(model, algorithm="gptq+bias_correction", calibration_data=x)
    with torch.no_grad():
        assert (result.model(x) - model(x)).abs().max() < 0.02 * model(x).abs().max()


def test_compute_dtype_casts_what_is_left() -> None:
    result = mono_quant.quantize(
        language_model(), bits=4, algorithm="awq+gptq", calibration_data=tokens(), compute_dtype=torch.bfloat16
    )
    assert result.model.norm.weight.dtype == torch.bfloat16
    assert result.model(tokens()[0]).dtype == torch.bfloat16


def test_tied_weights_stay_tied() -> None:
    model: LanguageModel = language_model()
    assert model.head.weight is model.embedding.weight
    result = mono_quant.quantize(model, algorithm="smoothquant+gptq", calibration_data=tokens())
    assert result.model.head.codes is result.model.embedding.codes
    assert any("shares its weight" in warning for warning in result.warnings)


def test_models_that_cannot_be_copied_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match="cannot be copied"):
        mono_quant.quantize(model, algorithm="hqq")


def test_a_broken_weight_is_named() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="layer '1'"):
        mono_quant.quantize(model, algorithm="gptq", calibration_data=torch.randn(4, 32))


def test_a_directory_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "float")
    data = [{"input_ids": torch.randint(0, 64, (2, 12)), "use_cache": False} for _ in range(3)]
    bits = {"*.mlp.*": 4, "lm_head": 16, "*": 8}
    result = mono_quant.quantize(tmp_path / "float", bits=bits, algorithm="awq+gptq", calibration_data=data)
    assert result.info.calibration_samples_used == 6
    result.save(tmp_path / "mixed")
    loaded = mono_quant.load_model(tmp_path / "mixed")
    with torch.no_grad():
        assert torch.equal(loaded(**data[0]).logits, result.model(**data[0]).logits)
