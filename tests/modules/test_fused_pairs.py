"""Linear layers compute the activations behind them where their parent's ``forward`` calls them, and only there."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mono_quant
from mono_quant.modules import FusedActivation, fuse_pair, restore_activations

WIDTH = 24


class Pair(nn.Module):
    """A linear layer and its activation in a ``forward`` of their own."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(WIDTH, WIDTH), activation or nn.GELU()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.linear(x)))  # type: ignore[no-any-return]

    def before(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class Taps(nn.Module):
    """Keeps what each layer of a sequence answers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequence()

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for layer in self.body:
            x = layer(x)
            taps.append(x)
        return torch.cat(taps, 1)


class Beside(nn.Module):
    """Calls a sequence, and a layer of it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequence()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.body[0](x)  # type: ignore[no-any-return]


class Lora(nn.Module):
    """A layer and what adds to it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH)


def quantized(model: nn.Module, fuse: bool = True) -> Any:
    return mono_quant.quantize(model.eval(), fuse_activations=fuse).model


def both(model: nn.Module) -> tuple[Any, Any]:
    """Answer the model quantized with its activations fused and apart."""
    return quantized(model), quantized(model, fuse=False)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Taps, Beside])
def test_a_layer_that_others_read_too_answers_what_is_its_own(make: type[nn.Module], x: Tensor) -> None:
    fused, apart = both(make())
    assert isinstance(fused.body[1], FusedActivation)
    assert close(fused(x), apart(x))


def test_the_activation_is_not_called_where_the_layer_computes_it(x: Tensor) -> None:
    for model, place in ((sequence(), "1"), (Pair(), "activation")):
        fused, apart = both(model)
        calls: list[Tensor] = []
        placed = fused.get_submodule(place)
        placed.activation.register_forward_hook(lambda _, args, out, calls=calls: calls.append(out))
        assert close(fused(x), apart(x))
        assert not calls
        assert torch.equal(placed(x), placed.activation(x))
        assert calls


def test_pairs_may_be_called_in_any_order(x: Tensor) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.silu, self.gelu = nn.SiLU(), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x), self.second(x)
            return self.silu(a) * self.gelu(b)  # type: ignore[no-any-return]

    fused, apart = both(Gated())
    assert fused.first.activation == "silu"
    assert fused.second.activation == "gelu"
    assert close(fused(x), apart(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_inputs_of_other_dtypes_are_activated_once(dtype: torch.dtype, x: Tensor) -> None:
    for source in (Pair(), sequence()):
        fused, apart = both(source)
        assert torch.allclose(fused(x.to(dtype)).float(), apart(x.to(dtype)).float(), atol=0.05)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_they_answer_the_same(x: Tensor) -> None:
    for source in (Pair(), sequence()):
        fused, apart = both(source)
        assert close(torch.jit.trace(fused, x)(x), apart(x))


def test_another_method_gets_the_layers_own_answer(x: Tensor) -> None:
    fused, apart = both(Pair())
    assert close(fused.before(x), apart.before(x))


def test_in_training_mode_both_are_what_they_were(x: Tensor) -> None:
    fused, apart = both(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    calls: list[Tensor] = []
    fused[1].activation.register_forward_hook(lambda _, args, out: calls.append(out))
    assert close(fused.train()(x), apart.train()(x))
    assert len(calls) == 1
    assert close(fused.eval()(x), apart.eval()(x))
    assert len(calls) == 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "wrapped": lambda m: setattr(m, "linear", Lora(m.linear)),
    "float layer": lambda m: setattr(m, "linear", nn.Linear(WIDTH, WIDTH)),
    "other activation": lambda m: setattr(m, "activation", nn.Tanh()),
    "hook": lambda m: m.linear.register_forward_hook(lambda _, args, out: out - 1),
    "pre-hook": lambda m: m.activation.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "own forward": lambda m: setattr(m.activation, "forward", torch.sigmoid),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_pair_that_is_changed_later_is_one_no_longer(change: Callable[[Any], object], x: Tensor) -> None:
    models = both(Pair())
    for model in models:
        model(x)
        torch.manual_seed(1)
        change(model)
    assert close(models[0](x), models[1](x))


def test_a_hook_sees_the_layers_own_answer(x: Tensor) -> None:
    seen: list[Tensor] = []
    models = both(sequence())
    for model in models:
        model[0].register_forward_hook(lambda _, args, out: seen.append(out))
        model(x)
    assert close(*seen)
    assert seen[0].min() < 0


def test_activations_are_put_back(x: Tensor) -> None:
    model = quantized(nn.Sequential(Pair(), sequence()))
    expected = model(x)
    restore_activations(model)
    assert isinstance(model[0].activation, nn.GELU)
    assert isinstance(model[1][1], nn.ReLU)
    assert close(model(x), expected)


def test_copies_and_pickles_are_pairs_of_their_own(x: Tensor) -> None:
    model = quantized(Pair())
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert twin.activation.linear is twin.linear
        twin.linear.weight = torch.zeros_like(twin.linear.codes)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", [Taps, Pair, sequence])
def test_loaded_from_a_file_a_pair_is_what_it_was(make: Callable[[], nn.Module], x: Tensor, tmp_path: Path) -> None:
    source = make()
    result = mono_quant.quantize(source.eval())
    result.save(tmp_path / "model.safetensors")
    loaded = mono_quant.load_model(tmp_path / "model.safetensors", copy.deepcopy(source))
    assert any(isinstance(module, FusedActivation) for module in loaded.modules())
    assert torch.equal(loaded(x), result.model(x))


def test_a_pair_that_was_asked_for_is_one_everywhere(x: Tensor, tmp_path: Path) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.functions = nn.ModuleList([nn.Linear(WIDTH, WIDTH)]), nn.ModuleList([nn.ReLU()])

        def forward(self, x: Tensor) -> Tensor:
            return self.functions[0](self.layers[0](x))  # type: ignore[no-any-return]

    result = mono_quant.quantize(Apart().eval())
    expected = result.model(x)
    model: Any = result.model
    fuse_pair(model, "layers.0", "functions.0")
    assert close(model(x), expected)
    assert model.layers[0](x).min() >= 0
    result.save(tmp_path / "model.safetensors")
    loaded: Any = mono_quant.load_model(tmp_path / "model.safetensors", Apart())
    assert torch.equal(loaded.layers[0](x), model.layers[0](x))


def test_eight_threads_keep_apart_who_runs_what(x: Tensor) -> None:
    model, apart = both(Pair())
    inside, alone = apart(x), apart.before(x)

    def call(number: int) -> bool:
        return close(model(x), inside) if number % 2 else close(model.before(x), alone)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))


def test_a_graph_that_another_thread_makes_changes_nothing(x: Tensor) -> None:
    model, apart = both(Pair())
    expected = apart(x)
    other = quantized(sequence())
    with ThreadPoolExecutor(1) as pool:
        exporting = pool.submit(torch.export.export, other, (x,))
        answers = [model(x)]
        while not exporting.done():
            answers.append(model(x))
    exporting.result()
    assert all(close(answer, expected) for answer in answers)


BRANCHES: dict[str, Callable[[Any, Tensor], Any]] = {}


def branch(forward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    BRANCHES[forward.__name__] = forward
    return forward


@branch
def asks_a_module(self: Any, x: Tensor) -> Any:
    h = self.linear(x)
    if self.last:
        h = self.last(h)
    return self.activation(h)


@branch
def asks_an_argument(self: Any, x: Tensor, more: Tensor | None = None) -> Any:
    h = self.linear(x)
    if more is None:
        return h
    return self.activation(h) + more


@branch
def asks_a_type(self: Any, x: Tensor) -> Any:
    h = self.linear(x)
    return self.activation(h) + h if isinstance(x, Tensor) else self.activation(h)


@branch
def keeps_the_answer(self: Any, x: Tensor) -> Any:
    self.kept = self.linear(x)
    return self.activation(self.kept)


@branch
def keeps_the_answer_in_a_list(self: Any, x: Tensor) -> Any:
    h = self.linear(x)
    self.answers.append(h)
    return self.activation(h)


@branch
def calls_by_way_of_another(self: Any, x: Tensor) -> Any:
    h = call(self.linear, x)
    return call(self.activation, h)


def call(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


@pytest.mark.parametrize("forward", BRANCHES.values(), ids=BRANCHES)
def test_where_another_run_could_read_the_answer_there_is_no_pair(forward: Any, x: Tensor) -> None:
    kind = type("Branching", (Pair,), {"forward": forward})
    source = kind()
    source.answers = []
    fused, apart = both(source)
    assert isinstance(fused.activation, nn.GELU)
    assert close(fused(x), apart(x))
    assert not source.answers
    assert len(fused.answers) == len(apart.answers)


def test_a_layer_that_comes_twice_computes_its_activation_nowhere(x: Tensor) -> None:
    models = both(sequence())
    for model in models:
        model.append(model[0])
    assert close(models[0](x), models[1](x))


def test_layers_that_are_moved_in_their_sequence_are_a_pair_no_longer(x: Tensor) -> None:
    models = both(nn.Sequential(OrderedDict(a=nn.Linear(WIDTH, WIDTH), b=nn.ReLU(), c=nn.Linear(WIDTH, WIDTH))))
    for model in models:
        layer = model.a
        del model.a
        model.add_module("a", layer)
    assert close(models[0](x), models[1](x))


def test_a_pair_in_another_class_is_none_until_that_is_known_too(x: Tensor) -> None:
    class Other(Pair):
        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return self.activation(h) + h  # type: ignore[no-any-return]

    models = both(Pair())
    others = []
    for model in models:
        other = Other().eval()
        other.linear, other.activation = model.linear, model.activation
        others.append(other(x))
    assert close(*others)


def test_gradients_are_those_of_the_parts(x: Tensor) -> None:
    models = both(Pair())
    for watched in (False, True):
        seen: list[Tensor] = []
        gradients = []
        for model in models:
            if watched:
                model.linear.register_full_backward_hook(lambda _, into, out, seen=seen: seen.append(out[0]))
            with torch.enable_grad():
                rows = x.clone().requires_grad_()
                wide = rows * 1
                wide += model(wide)
                wide.sum().backward()
            assert rows.grad is not None
            gradients.append(rows.grad)
        assert close(*gradients)
        assert len(seen) == (2 if watched else 0)
        assert not seen or close(*seen)


def test_nothing_of_a_class_that_users_wrote_is_changed(x: Tensor) -> None:
    model = quantized(Pair())
    assert type(model) is Pair
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert type(quantized(sequence())) is nn.Sequential


@pytest.mark.parametrize("make", [Pair, sequence, Taps])
def test_compiled_and_exported_they_answer_the_same(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = quantized(make())
    expected = model(x)
    assert close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    assert close(torch.export.export(model, (x,)).module()(x), expected)
