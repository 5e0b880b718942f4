"""The run over calibration data: what is watched, what is restored, and what an error says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mono_quant.calibration import MinMaxObserver, evaluating, iterate_batches, run_batches, run_calibration, watching
from mono_quant.errors import ConfigurationError, InputError, QuantizationError


def small_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    model.train()
    model[1].eval()  # a frozen layer inside a model in training
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_observers_see_what_their_modules_answer() -> None:
    model, data = small_model(), torch.randn(70, 4)
    observers = run_calibration(model, data, {"0": MinMaxObserver()}, num_samples=None)
    with evaluating(model):
        expected = model[0](data)
    torch.testing.assert_close(observers["0"].min_val, expected.min())
    torch.testing.assert_close(observers["0"].max_val, expected.max())


def test_observers_can_watch_inputs() -> None:
    data = torch.randn(70, 4)
    observers = run_calibration(
        small_model(), data, {"0": MinMaxObserver(), "2": MinMaxObserver()}, 50, observe="input"
    )
    torch.testing.assert_close(observers["0"].max_val, data[:50].max())


def test_the_run_is_in_evaluation_mode_without_gradients() -> None:
    seen: list[tuple[bool, bool]] = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    run_batches(Probe(), torch.zeros(40, 2))
    assert seen == [(False, False)] * 2


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_modes_and_hooks_are_restored_whatever_happens(failure: type[BaseException]) -> None:
    model = small_model()
    before = modes(model)

    def fail(x: Tensor) -> None:
        raise failure

    with pytest.raises((failure, InputError)):
        run_calibration(model, torch.randn(8, 4), {"2": fail})
    assert modes(model) == before
    assert hooks(model) == 0
    assert torch.is_grad_enabled()


def test_modes_and_hooks_are_restored_when_the_data_fails() -> None:
    model = small_model()
    before = modes(model)

    def broken() -> Iterator[Tensor]:
        yield torch.zeros(2, 4)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        run_calibration(model, broken(), {"0": MinMaxObserver()})
    assert modes(model) == before
    assert hooks(model) == 0


def test_the_model_is_left_as_it_was() -> None:
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run_batches(model, torch.randn(64, 4))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.zeros(3, 5), torch.zeros(3, 4, 1), torch.zeros(3, 4, dtype=torch.float64)])
def test_a_batch_that_the_model_cannot_run_is_named(bad: Tensor) -> None:
    with pytest.raises(InputError, match=r"batch 1 .*\[3, ") as caught:
        run_batches(small_model(), [torch.zeros(3, 4), bad])
    assert "float32 on cpu" in (caught.value.suggestion or "")
    assert caught.value.__cause__ is not None


def test_progress_counts_samples() -> None:
    calls: list[tuple[int, int | None, str]] = []

    def note(done: int, total: int | None, label: str) -> None:
        calls.append((done, total, label))

    assert run_batches(small_model(), torch.randn(70, 4), 40, note, "looking") == 40
    assert calls == [(32, 40, "looking"), (40, 40, "looking")]
    calls.clear()
    run_batches(small_model(), iter([torch.randn(3, 4)]), progress=note)
    assert calls == [(3, None, "calibrating")]


def test_a_name_that_is_no_module_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigurationError, match=r"encoder\.3"):
        run_calibration(small_model(), torch.zeros(2, 4), {"0": MinMaxObserver(), "encoder.3": MinMaxObserver()})


def test_only_input_and_output_can_be_observed() -> None:
    with pytest.raises(ConfigurationError, match="observe"):
        run_calibration(small_model(), torch.zeros(2, 4), {}, observe="weights")


def test_a_module_that_was_never_reached_is_named() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    observers = run_calibration(Skips(), torch.zeros(2, 2), {"used": MinMaxObserver(), "unused": MinMaxObserver()})
    observers["used"].calculate_qparams()
    with pytest.raises(QuantizationError, match="'unused'"):
        observers["unused"].calculate_qparams()


def test_nan_inside_the_model_names_the_module() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    with pytest.raises(QuantizationError, match="'1'"):
        run_calibration(nn.Sequential(nn.Identity(), Breaks()), torch.zeros(2, 2), {"1": MinMaxObserver()})


def test_watchers_find_the_tensor_in_nested_answers_and_keywords() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"none": None, "out": (x + 1, x)}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Nested()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x=x)

    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: seen.__setitem__(name, tensor)

    model = Outer()
    with watching(model, inputs={"inner": keep("in")}, outputs={"inner": keep("out")}):
        run_batches(model, torch.ones(2, 3))
    torch.testing.assert_close(seen["out"], seen["in"] + 1)
    assert hooks(model) == 0


def test_tuples_are_bound_by_the_models_signature() -> None:
    pairs = [(torch.ones(2, 4), torch.zeros(2))]
    assert run_batches(small_model(), pairs) == 2
    assert len(next(iter(iterate_batches(pairs, model=small_model()))).args) == 1
