"""The search under a budget: what it promises holds, whatever happens on the way."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mono_quant
from mono_quant.api.search import run as searching
from mono_quant.api.search.path import Option, UnitCosts, build_path, hull, settled
from mono_quant.errors import (
    BudgetError,
    CheckpointError,
    ConfigurationError,
    InputError,
    InputTypeError,
    MonoQuantError,
)
from mono_quant.report import SearchReport, sqnr_db

BYTES: dict[str, Any] = {"objective": "bytes"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Embedding(50, 64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(50, (64, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measure(model: nn.Module, tokens: Tensor) -> Callable[[nn.Module], float]:
    exact = model(tokens).detach()

    def negative_error(candidate: nn.Module) -> float:
        return -float((candidate(tokens).detach() - exact).square().mean().sqrt())

    return negative_error


@pytest.fixture(autouse=True)
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever a test does, the original stays as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    yield
    assert [type(module) for module in model.modules()] == types
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def search(result: Any) -> SearchReport:
    found: SearchReport = result.search
    return found


# What is promised


@pytest.mark.parametrize("max_drop", [0.0005, 0.002, 0.006, 0.012, 1.0])
@pytest.mark.parametrize("objective", ["bytes", "latency"])
def test_the_drop_is_kept_by_the_model_that_is_answered(
    model: nn.Module, tokens: Tensor, measure: Any, max_drop: float, objective: str
) -> None:
    result = mono_quant.quantize(
        model, calibration_data=tokens, eval_fn=measure, max_drop=max_drop, objective=objective
    )
    found = search(result)
    assert found.met
    # Layers this small can be measured as fastest in float; then bytes decide, and a warning says so.
    assert found.objective == objective or any("faster than float" in warning for warning in result.warnings)
    value = measure(result.model)
    assert found.float_value is not None
    assert found.float_value - value <= max_drop
    assert found.best.value == value
    assert found.best.bytes == result.info.bytes_after
    assert result.info.calibration_samples_used == 64
    # Everything that is cheaper was seen to fail, or would have been answered.
    if objective == "bytes":
        assert all(point.bytes >= found.best.bytes for point in found.points if point.within_budget)


def test_all_formats_are_as_reported(model: nn.Module, tokens: Tensor, measure: Any) -> None:
    result = mono_quant.quantize(model, calibration_data=tokens, eval_fn=measure, max_drop=0.003, **BYTES)
    stored = {"float": None, "int8": "int8_dynamic", "int4": "weight_only", "int8_weights": "weight_only"}
    for layer, name in search(result).best.formats.items():
        kind = stored.get(name, name)
        if kind is None:
            assert "the search left it in float" in result.info.skip_reasons[layer]
        else:
            assert result.info.layers[layer].scheme.kind == kind


def test_a_wide_budget_answers_the_cheapest_model(model: nn.Module, tokens: Tensor, measure: Any) -> None:
    result = mono_quant.quantize(model, calibration_data=tokens, eval_fn=measure, max_drop=100.0, **BYTES)
    assert search(result).best.label == "cheapest"
    assert result.info.bytes_after == mono_quant.quantize(model, bits=4, sqnr_error_threshold=0).info.bytes_after


@pytest.mark.parametrize("decibels", [18.0, 30.0, 38.0, 50.0])
def test_the_ratio_of_the_outputs_is_kept(model: nn.Module, tokens: Tensor, decibels: float) -> None:
    result = mono_quant.quantize(model, calibration_data=tokens, min_sqnr_db=decibels, **BYTES)
    measured = sqnr_db(model(tokens), result.model(tokens))
    assert measured >= decibels - 0.01
    assert search(result).best.sqnr_db == pytest.approx(measured, abs=0.01)


@pytest.mark.parametrize("limit", [16_000, 20_000, 26_520, 40_000, 60_000, 500_000])
@pytest.mark.parametrize("with_measure", [True, False])
def test_the_bytes_are_kept_and_plain_int8_is_no_better(
    model: nn.Module, tokens: Tensor, measure: Any, limit: int, with_measure: bool
) -> None:
    eval_fn = measure if with_measure else None
    result = mono_quant.quantize(model, calibration_data=tokens, eval_fn=eval_fn, max_bytes=limit)
    assert result.info.bytes_after <= limit
    plain = mono_quant.quantize(model)
    if plain.info.bytes_after <= limit:
        exact = model(tokens)
        assert measure(result.model) >= measure(plain.model) if with_measure else True
        assert sqnr_db(exact, result.model(tokens)) >= sqnr_db(exact, plain.model(tokens)) - 0.01 or with_measure


@pytest.mark.parametrize("max_drop", [0.001, 0.002, 0.01])
@pytest.mark.parametrize("objective", ["bytes", "latency"])
def test_no_larger_and_less_accurate_than_plain_int8(
    model: nn.Module, tokens: Tensor, measure: Any, max_drop: float, objective: str
) -> None:
    result = mono_quant.quantize(
        model, calibration_data=tokens, eval_fn=measure, max_drop=max_drop, objective=objective
    )
    plain = mono_quant.quantize(model)
    assert "uniform int8" in [point.label for point in search(result).points]
    assert result.info.bytes_after < plain.info.bytes_after or measure(result.model) >= measure(plain.model)


def test_two_targets_at_once(model: nn.Module, tokens: Tensor, measure: Any) -> None:
    result = mono_quant.quantize(
        model, calibration_data=tokens, eval_fn=measure, max_drop=0.012, max_bytes=25_000, min_sqnr_db=15.0
    )
    best = search(result).best
    assert best.drop is not None
    assert best.sqnr_db is not None
    assert best.drop <= 0.012
    assert best.sqnr_db >= 15
    assert best.bytes <= 25_000
    assert search(result).objective == "bytes"


def test_few_evaluations(model: nn.Module, tokens: Tensor, measure: Any) -> None:
    calls = 0

    def counted(candidate: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return float(measure(candidate))

    found = search(mono_quant.quantize(model, calibration_data=tokens, eval_fn=counted, max_drop=0.001, **BYTES))
    assert calls == found.evaluations
    # The float model, plain int8, the cheapest model, a bisection of the steps, and six to take back.
    assert calls <= 9 + found.steps.bit_length()


def test_the_frontier_gets_better_as_it_gets_larger(model: nn.Module, tokens: Tensor, measure: Any) -> None:
    found = search(mono_quant.quantize(model, calibration_data=tokens, eval_fn=measure, max_drop=0.001, **BYTES))
    sizes = [point.bytes for point in found.frontier]
    values = [point.value for point in found.frontier]
    assert sizes == sorted(sizes)
    assert values == sorted(values)  # type: ignore[type-var]
    assert all(point in found.points for point in found.frontier)
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == found.chosen


def test_the_same_seed_answers_the_same(model: nn.Module, tokens: Tensor, measure: Any) -> None:
    def run() -> Any:
        result = mono_quant.quantize(
            model,
            calibration_data=tokens,
            eval_fn=measure,
            max_drop=0.002,
            seed=7,
            formats=["int8", "float16"],
            **BYTES,
        )
        return [(p.label, p.formats, p.value, p.bytes) for p in search(result).points], result.model.state_dict()

    (first, state), (second, other) = run(), run()
    assert first == second
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_measure_that_draws_numbers_draws_the_same_each_time(model: nn.Module, tokens: Tensor) -> None:
    drawn: set[tuple[float, ...]] = set()

    def sampling(candidate: nn.Module) -> float:
        drawn.add((torch.rand(()).item(), random.random(), float(np.random.rand())))
        return -float(len(drawn))

    state = torch.random.get_rng_state(), random.getstate()
    mono_quant.quantize(model, calibration_data=tokens, eval_fn=sampling, max_drop=0.5, formats="int8", seed=5)
    assert len(drawn) == 1
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def test_the_measure_sees_a_model_in_evaluation(model: nn.Module, tokens: Tensor) -> None:
    seen: list[bool] = []

    def look(candidate: nn.Module) -> float:
        seen.extend(module.training for module in candidate.modules())
        candidate.train()  # is taken back
        return 1.0

    mono_quant.quantize(model, calibration_data=tokens, eval_fn=look, max_drop=0.1)
    assert seen
    assert not any(seen)


def test_progress_tells_what_is_left(model: nn.Module, tokens: Tensor, measure: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    mono_quant.quantize(
        model, calibration_data=tokens, eval_fn=measure, max_drop=0.001,
        progress=lambda done, total, what: seen.append((done, total, what)),
    )  # fmt: skip
    dones = [done for done, _, _ in seen]
    assert dones == sorted(dones)
    assert all(done <= total for done, total, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert any("s left" in what for _, _, what in seen)


def test_tied_layers_get_one_format() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.head(torch.relu(self.mid(self.embed(x))))
            return answer

    model, x = Tied().eval(), torch.randint(40, (16, 4))
    for decibels in (20.0, 45.0, 60.0):
        result = mono_quant.quantize(model, calibration_data=x, min_sqnr_db=decibels, **BYTES)
        formats = search(result).best.formats
        assert formats["embed"] == formats["head"]
        assert search(result).best.bytes == result.info.bytes_after


def test_layers_without_data_are_int8_and_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.used(x) if float(x.sum()) < 1e9 else self.unused(x)
            return answer

    result = mono_quant.quantize(Gated().eval(), calibration_data=torch.randn(8, 32), min_sqnr_db=50.0, **BYTES)
    assert search(result).best.formats["unused"] == "int8"
    assert any("unused" in warning for warning in result.warnings)


# When it cannot be done


def test_an_unreachable_drop_says_what_the_best_was(
    model: nn.Module, tokens: Tensor, measure: Any, tmp_path: Path
) -> None:
    file = tmp_path / "search.json"
    with pytest.raises(BudgetError, match="no choice of formats keeps to max_drop=0: the best of") as caught:
        mono_quant.quantize(model, calibration_data=tokens, eval_fn=measure, max_drop=0.0, resume=file, **BYTES)
    found = caught.value.search
    assert not found.met
    assert found.best.drop == min(point.drop for point in found.points)
    assert caught.value.suggestion is not None
    relaxed = float(caught.value.suggestion.split("max_drop=")[1].split(" ")[0])
    assert relaxed >= found.best.drop
    # Nothing is lost: with the target that was proposed the measurements in the file serve.
    again = mono_quant.quantize(model, calibration_data=tokens, eval_fn=measure, max_drop=relaxed, resume=file, **BYTES)
    assert search(again).met
    assert search(again).evaluations <= 6  # the steps to take back


def test_unreachable_bytes_are_refused_before_any_evaluation(model: nn.Module, tokens: Tensor) -> None:
    def never(candidate: nn.Module) -> float:
        raise AssertionError("was called")

    with pytest.raises(BudgetError, match=r"max_bytes=1000 cannot be reached: .* 15936 bytes"):
        mono_quant.quantize(model, calibration_data=tokens, eval_fn=never, max_bytes=1000)


def test_targets_that_exclude_each_other(model: nn.Module, tokens: Tensor) -> None:
    with pytest.raises(BudgetError, match="min_sqnr_db=60 and max_bytes=20000") as caught:
        mono_quant.quantize(model, calibration_data=tokens, min_sqnr_db=60.0, max_bytes=20_000)
    assert caught.value.search.best.bytes <= 20_000


ANSWERS: list[tuple[Any, type[Exception], str]] = [
    (torch.tensor(0.5), InputTypeError, r"a tensor of shape \[\].*\.item\(\)"),
    (True, InputTypeError, "True of type bool"),
    (np.bool_(True), InputTypeError, ".*of type bool"),
    (None, InputTypeError, "None of type NoneType"),
    ("0.5", InputTypeError, "'0.5' of type str"),
    (float("nan"), InputError, "nan for the float model"),
    (float("-inf"), InputError, "-inf for the float model"),
]


@pytest.mark.parametrize(("answer", "error", "text"), ANSWERS)
def test_answers_that_are_no_numbers(
    model: nn.Module, tokens: Tensor, answer: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"(?s)eval_fn answered {text}"):
        mono_quant.quantize(model, calibration_data=tokens, eval_fn=lambda _: answer, max_drop=0.1)


@pytest.mark.parametrize("answer", [1, 0.5, np.float32(0.5), np.int64(3)])
def test_numbers_of_all_kinds_are_taken(model: nn.Module, tokens: Tensor, answer: Any) -> None:
    result = mono_quant.quantize(model, calibration_data=tokens, eval_fn=lambda _: answer, max_drop=0.0)
    assert search(result).float_value == float(answer)


def test_a_measure_that_raises_is_named_with_its_cause(model: nn.Module, tokens: Tensor) -> None:
    def broken(candidate: nn.Module) -> float:
        if any(type(module) is not nn.Linear and "Linear" in type(module).__name__ for module in candidate.modules()):
            raise ZeroDivisionError("nothing to divide by")
        return 1.0

    with pytest.raises(InputError, match="eval_fn raised ZeroDivisionError on a quantized model") as caught:
        mono_quant.quantize(model, calibration_data=tokens, eval_fn=broken, max_drop=0.1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_measure_that_trains_is_refused(model: nn.Module, tokens: Tensor) -> None:
    def careless(candidate: nn.Module) -> float:
        with torch.no_grad():
            next(candidate.parameters()).add_(1.0)
        return 1.0

    with pytest.raises(InputError, match=r"eval_fn changed '0\.weight' of the float model"):
        mono_quant.quantize(model, calibration_data=tokens, eval_fn=careless, max_drop=0.1)


def test_running_statistics_that_a_measure_changes_are_restored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()
    x = torch.randn(32, 32)
    exact = model(x).detach()

    def careless(candidate: nn.Module) -> float:
        value = -float((candidate(x) - exact).abs().mean())
        candidate.train()
        candidate(x + 5)
        return value

    result = mono_quant.quantize(model, calibration_data=x, eval_fn=careless, max_drop=0.001, **BYTES)
    assert -float((result.model(x).detach() - exact).abs().mean()) == search(result).best.value


IMPOSSIBLE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_drop": -0.1}, ConfigurationError, "max_drop=-0.1 is not a finite number of at least 0"),
    ({"max_drop": float("nan")}, ConfigurationError, "max_drop=nan"),
    ({"max_drop": True}, ConfigurationError, "max_drop=True"),
    ({"max_drop": 0.1}, ConfigurationError, "there is no eval_fn"),
    ({"eval_fn": len}, ConfigurationError, "has no target"),
    ({"eval_fn": len, "min_sqnr_db": 20}, ConfigurationError, "nothing asks what it measures"),
    ({"eval_fn": 3, "max_drop": 0.1}, InputTypeError, "eval_fn is a int"),
    ({"min_sqnr_db": "20"}, ConfigurationError, "min_sqnr_db='20'"),
    ({"max_bytes": 0}, ConfigurationError, "max_bytes=0"),
    ({"max_bytes": 1e6}, ConfigurationError, "max_bytes=1000000.0"),
    ({"max_bytes": 10**6, "objective": "latency"}, ConfigurationError, "contradict each other"),
    ({"min_sqnr_db": 20, "objective": "speed"}, ConfigurationError, "objective='speed'"),
    ({"min_sqnr_db": 20, "seed": -1}, ConfigurationError, "seed=-1"),
    ({"min_sqnr_db": 20, "resume": 5}, InputTypeError, "resume is a int"),
    ({"seed": 1}, ConfigurationError, "seed= is an option of a search"),
    ({"min_sqnr_db": 20, "formats": ["int2"]}, ConfigurationError, "format 'int2'"),
    ({"min_sqnr_db": 20, "bits": 4}, ConfigurationError, "the search chooses the bits"),
    ({"min_sqnr_db": 20, "bits": {"*": 4}}, ConfigurationError, "the search chooses the bits"),
    ({"min_sqnr_db": 20, "inplace": True}, ConfigurationError, "inplace=True and a search"),
    ({"min_sqnr_db": 20, "algorithm": "gptq"}, ConfigurationError, "algorithm='gptq' and a search"),
    ({"min_sqnr_db": 20, "compute_dtype": torch.bfloat16}, ConfigurationError, "compute_dtype=torch.bfloat16 and"),
    ({"min_sqnr_db": 20, "dynamic": False}, ConfigurationError, "dynamic=False and a search"),
    ({"min_sqnr_db": 20, "skip": ["nothing"]}, ConfigurationError, "nothing"),
]


@pytest.mark.parametrize(("options", "error", "text"), IMPOSSIBLE)
def test_impossible_options_are_named(
    model: nn.Module, tokens: Tensor, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text.replace("{", r"\{")):
        mono_quant.quantize(model, calibration_data=tokens, **options)


def test_data_is_needed(model: nn.Module) -> None:
    with pytest.raises(InputError, match="needs calibration_data"):
        mono_quant.quantize(model, min_sqnr_db=20.0)
    with pytest.raises(InputTypeError, match="cannot be run"):
        mono_quant.quantize(model.state_dict(), calibration_data=torch.ones(1), min_sqnr_db=20.0)


# Interruption and going on


class Interrupting:
    """A measure that is interrupted at a call, by name the same as the one that is not."""

    def __init__(self, measure: Callable[[nn.Module], float], at: int | None = None) -> None:
        self.measure, self.at, self.calls = measure, at, 0

    def __call__(self, candidate: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.measure(candidate)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_going_on_after_an_interruption_answers_the_same(
    model: nn.Module, tokens: Tensor, measure: Any, tmp_path: Path, at: int
) -> None:
    options: dict[str, Any] = {"calibration_data": tokens, "max_drop": 0.001, **BYTES}
    whole = mono_quant.quantize(model, eval_fn=Interrupting(measure), **options)
    file = tmp_path / "search.json"
    interrupted = Interrupting(measure, at)
    with pytest.raises(KeyboardInterrupt):
        mono_quant.quantize(model, eval_fn=interrupted, resume=file, **options)
    json.loads(file.read_text())
    assert list(tmp_path.iterdir()) == [file]
    rest = Interrupting(measure)
    resumed = mono_quant.quantize(model, eval_fn=rest, resume=file, **options)
    assert rest.calls == search(whole).evaluations - (at - 1)
    assert [(p.label, p.formats, p.value) for p in search(resumed).points] == [
        (p.label, p.formats, p.value) for p in search(whole).points
    ]
    state, other = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in other)


def finished(model: nn.Module, tokens: Tensor, file: Path, **options: Any) -> Any:
    return mono_quant.quantize(
        model, **{"calibration_data": tokens, "min_sqnr_db": 30.0, "resume": file, **BYTES, **options}
    )


def half(text: str) -> str:
    return text[: len(text) // 2]


def other_number(text: str) -> str:
    document = json.loads(text)
    document["content"]["measured"][0]["sqnr_db"] += 1
    return json.dumps(document)


def other_version(text: str) -> str:
    return json.dumps({**json.loads(text), "version": 99})


DAMAGE: list[tuple[Callable[[str], str], str]] = [
    (half, "damaged or not the file of a search"),
    (lambda _: "", "damaged or not the file of a search"),
    (lambda _: "\x00\x01", "damaged or not the file of a search"),
    (lambda _: '{"weights": 3}', "is not the file of a search"),
    (lambda _: "[]", "is not the file of a search"),
    (other_number, "checksum"),
    (other_version, "version 99"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGE)
def test_an_unfit_file_is_refused_and_left_as_it_is(
    model: nn.Module, tokens: Tensor, tmp_path: Path, damage: Callable[[str], str], text: str
) -> None:
    file = tmp_path / "search.json"
    finished(model, tokens, file)
    file.write_text(damage(file.read_text()))
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=rf"(?s)search\.json.*{text}"):
        finished(model, tokens, file)
    assert file.read_bytes() == before


def test_the_file_of_another_search_is_refused(model: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    finished(model, tokens, file)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("1.weight")[0, 0] += 1
    before = file.read_bytes()
    for foreign, data, options, text in (
        (other, tokens, {}, "it differs in the model"),
        (model, tokens.flip(0), {}, "it differs in the calibration data"),
        (model, tokens, {"formats": ["int8"]}, "the layers or their formats"),
        (model, tokens, {"seed": 9}, "the seed"),
    ):
        with pytest.raises(CheckpointError, match=text):
            finished(foreign, data, file, **options)
        assert file.read_bytes() == before


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    model: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    calls: list[int] = []
    with pytest.raises(CheckpointError, match="cannot write"):
        finished(model, tokens, tmp_path / "absent" / "search.json", progress=lambda *_: calls.append(1))
    assert not calls


# The path


COSTS = st.floats(1e-6, 1e6)


@given(st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=8))
def test_the_hull_is_what_no_mixture_beats(pairs: list[tuple[float, float]]) -> None:
    options = [Option(str(index), cost, error) for index, (cost, error) in enumerate(pairs)]
    kept = hull(options)
    assert kept[0].cost == min(option.cost for option in options)
    assert kept[-1].error == min(option.error for option in options)
    slopes = [(b.error - a.error) / (b.cost - a.cost) for a, b in pairwise(kept)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)
    for option in options:
        for a, b in pairwise(kept):
            if a.cost <= option.cost <= b.cost:
                share = (option.cost - a.cost) / (b.cost - a.cost)
                assert option.error >= a.error + share * (b.error - a.error) - 1e-9 * a.error


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(COSTS, COSTS, COSTS, COSTS), min_size=1))
def test_each_step_costs_more_and_errs_less(units: dict[str, tuple[float, float, float, float]]) -> None:
    costs = {
        name: UnitCosts(
            {"int8": int(a) + 1, "float16": int(b) + 1, "float": int(a + b) + 2}, {}, {"int8": c, "float16": d}
        )
        for name, (a, b, c, d) in units.items()
    }
    path = build_path(costs, "bytes", {})
    totals = []
    for position in range(len(path.steps) + 1):
        formats = path.at(position)
        size = sum(costs[name].bytes[chosen] for name, chosen in formats.items())
        error = sum(costs[name].noise.get(chosen, 0.0) for name, chosen in formats.items())
        totals.append((size, error))
    assert [size for size, _ in totals] == sorted({size for size, _ in totals})
    assert all(b <= a * (1 + 1e-12) for (_, a), (_, b) in pairwise(totals))
    assert totals[-1][1] == 0


@given(st.dictionaries(st.sampled_from(["int4", "int8", "float16", "float"]), st.floats(1e-7, 1.0), min_size=1))
def test_times_that_cannot_be_told_apart_are_equal(seconds: dict[str, float]) -> None:
    found = settled(seconds)
    for first in seconds:
        assert found[first] <= seconds[first]
        for second in seconds:
            if seconds[first] <= seconds[second]:
                assert found[first] <= found[second]
    if max(seconds.values()) <= 2e-5:
        assert len(set(found.values())) == 1


def test_every_failure_is_one_of_ours(model: nn.Module, tokens: Tensor) -> None:
    with pytest.raises(MonoQuantError):
        mono_quant.quantize(model, calibration_data=torch.full((2, 8), 99), min_sqnr_db=20.0)


def test_where_float_is_the_fastest_bytes_are_made_small(
    model: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def float_is_fastest(*arguments: Any) -> UnitCosts:
        costs = unit_costs(*arguments)
        return UnitCosts(costs.bytes, {name: 0.0 if name == "float" else 1.0 for name in costs.bytes}, costs.noise)

    unit_costs = searching._unit_costs
    monkeypatch.setattr(searching, "_unit_costs", float_is_fastest)
    result = mono_quant.quantize(model, calibration_data=tokens, min_sqnr_db=35.0, objective="latency")
    assert search(result).objective == "bytes"
    assert any("faster than float" in warning for warning in result.warnings)
