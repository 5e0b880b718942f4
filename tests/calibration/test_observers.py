"""Observers: ranges hold what they must, merging equals observing together, memory stays bounded."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.calibration import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    PercentileObserver,
    create_observer,
)
from mono_quant.core.mappers import QUINT8
from mono_quant.errors import ConfigurationError, InputError, InputTypeError, QuantizationError
from tests.core.strategies import channels

Factory = Callable[..., Observer]

ORDERLESS: dict[str, Factory] = {
    "minmax": MinMaxObserver,
    "entropy": lambda **k: HistogramObserver(512, **k),
    "mse": lambda **k: HistogramObserver(1024, method="mse", **k),
    "percentile": lambda **k: PercentileObserver(99.0, **k),
}
ALL = ORDERLESS | {"ema": lambda **k: MovingAverageMinMaxObserver(0.1, **k)}

each = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
orderless = pytest.mark.parametrize("make", ORDERLESS.values(), ids=ORDERLESS.keys())


@st.composite
def streams(draw: st.DrawFn) -> list[Tensor]:
    """Several float32 ``[3, n]`` of very different magnitudes."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scales = draw(st.lists(st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 7.0, 5e4, 1e30]), min_size=1, max_size=6))
    positive = draw(st.booleans())
    stream = [torch.randn(3, draw(st.integers(1, 50)), generator=generator) * scale for scale in scales]
    return [part.relu() for part in stream] if positive else stream


def observed(observer: Observer, stream: list[Tensor]) -> Observer:
    for part in stream:
        observer(part)
    return observer


@orderless
@pytest.mark.parametrize("axis", [None, 0])
@given(stream=streams(), data=st.data())
def test_merged_equals_together_for_any_split_and_order(
    make: Factory, axis: int | None, stream: list[Tensor], data: st.DataObject
) -> None:
    together = observed(make(axis=axis), stream)
    order = data.draw(st.permutations(range(len(stream))))
    owners = [data.draw(st.integers(0, 2)) for _ in stream]
    parts = [observed(make(axis=axis), [stream[i] for i in order if owners[i] == owner]) for owner in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for found, expected in zip(merged.range(), together.range(), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(merged.calculate_qparams(), together.calculate_qparams(), strict=True):
        assert torch.equal(found, expected)
    if isinstance(together, HistogramObserver):
        assert isinstance(merged, HistogramObserver)
        assert together.histogram is not None
        assert merged.histogram is not None
        assert all(torch.equal(a, b) for a, b in zip(merged.histogram, together.histogram, strict=True))


@given(stream=streams(), data=st.data())
def test_moving_averages_merge_in_the_order_of_the_data(stream: list[Tensor], data: st.DataObject) -> None:
    cut = sorted(data.draw(st.integers(0, len(stream))) for _ in range(2))
    parts = [stream[: cut[0]], stream[cut[0] : cut[1]], stream[cut[1] :]]
    make = ALL["ema"]
    merged = observed(make(), parts[0]).merge(observed(make(), parts[1])).merge(observed(make(), parts[2]))
    together = observed(make(), stream)
    peak = max(float(part.abs().max()) for part in stream)
    for found, expected in zip(merged.range(), together.range(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * peak)


@each
@given(stream=streams())
def test_memory_does_not_grow_with_the_data(make: Factory, stream: list[Tensor]) -> None:
    observer = observed(make(), stream)
    before = len(pickle.dumps(observer))
    observed(observer, [part.repeat(1, 20) for part in stream * 3])
    assert abs(len(pickle.dumps(observer)) - before) < 512


@each
@given(x=channels())
def test_zero_is_exact_and_the_scale_is_a_normal_number(make: Factory, x: Tensor) -> None:
    for dtype, low, high in ((torch.int8, -128, 127), (QUINT8, 0, 255)):
        observer = make(axis=0, dtype=dtype)
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        assert scale.shape == zero_point.shape == (len(x),)
        assert bool((scale >= torch.finfo(torch.float32).tiny).all())
        assert bool(((zero_point >= low) & (zero_point <= high)).all())


@each
@given(x=channels(min_length=4))
def test_the_range_never_exceeds_what_was_seen(make: Factory, x: Tensor) -> None:
    observer = make()
    observer(x)
    low, high = observer.range()
    assert float(low) >= float(x.min())
    assert float(high) <= float(x.max())


@given(stream=streams())
def test_min_max_holds_every_value(stream: list[Tensor]) -> None:
    observer = observed(MinMaxObserver(), stream)
    everything = torch.cat([part.flatten() for part in stream])
    low, high = observer.range()
    assert float(low) == float(everything.min())
    assert float(high) == float(everything.max())


@given(stream=streams(), percentile=st.floats(60, 100))
def test_a_percentile_range_holds_that_share_of_the_values(stream: list[Tensor], percentile: float) -> None:
    observer = observed(PercentileObserver(percentile), stream)
    everything = torch.cat([part.flatten() for part in stream])
    low, high = observer.range()
    inside = int(((everything >= low) & (everything <= high)).sum())
    assert inside >= percentile / 100 * len(everything) - 1e-6


def test_a_percentile_range_leaves_out_outliers() -> None:
    observer = PercentileObserver(99.0)
    observer(torch.cat([torch.rand(1000), torch.tensor([50.0])]))
    assert float(observer.range()[1]) < 1.1


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_histograms_clip_a_lone_outlier_and_keep_plain_data_whole(method: str) -> None:
    values = torch.rand(1_000_000)
    whole, outlier = HistogramObserver(method=method), HistogramObserver(method=method)
    whole(values)
    outlier(torch.cat([values, torch.tensor([2.0])]))
    assert float(whole.range()[1]) > 0.95
    assert 0.95 < float(outlier.range()[1]) < 1.9


@given(x=channels(min_length=8))
def test_the_squared_error_choice_is_no_worse_than_the_whole_range(x: Tensor) -> None:
    x = x.clamp(-1e30, 1e30)
    chosen, whole = HistogramObserver(method="mse"), MinMaxObserver()
    x = torch.cat([x.flatten(), x.flatten() / 3, x.flatten() / 7])
    chosen(x)
    whole(x)
    low, high = chosen.range()
    step = max(float(whole.calculate_qparams()[0]), 1e-38)
    # In the model of rounding that the choice rests on: what is clipped costs less than the finer steps save.
    clipped = (x - x.clamp(float(low), float(high))).double().square().sum()
    assert float(clipped) <= len(x) * step * step / 12 * 1.1


def test_exact_zeros_do_not_draw_the_range() -> None:
    values = torch.randn(5000).abs()
    sparse, dense = HistogramObserver(method="mse"), HistogramObserver(method="mse")
    dense(values)
    sparse(torch.cat([values, torch.zeros(100_000)]))
    assert torch.equal(sparse.range()[1], dense.range()[1])


@each
def test_an_observer_that_saw_nothing_names_its_layer(make: Factory) -> None:
    observer = make(name="features.3")
    observer(torch.zeros(0, 3))
    for ask in (observer.range, observer.calculate_qparams):
        with pytest.raises(QuantizationError, match=r"features\.3"):
            ask()


@each
def test_reset_forgets(make: Factory) -> None:
    observer = make()
    observer(torch.ones(3) * 100)
    observer.reset()
    assert observer.channels is None
    assert observer.min_val is None  # type: ignore[attr-defined]
    observer(torch.tensor([0.0, 1.0]))
    assert float(observer.max_val) == 1.0  # type: ignore[attr-defined]


@each
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_name_the_layer(make: Factory, value: float) -> None:
    observer = make(name="stem")
    with pytest.raises(QuantizationError, match="stem"):
        observer(torch.tensor([1.0, value]))


@each
def test_integers_are_refused(make: Factory) -> None:
    with pytest.raises(InputTypeError, match="int64"):
        make()(torch.tensor([1, 2]))


@each
def test_memory_layout_and_dtype_do_not_matter(make: Factory) -> None:
    x = torch.randn(2, 6, 5, 4).half().float()
    expected = observed(make(axis=1), [x]).range()
    whole = observed(make(), [x]).range()
    for same in (x.contiguous(memory_format=torch.channels_last), x.half(), x.double(), x.flip(3).flip(3)):
        for answer, wanted in ((observed(make(axis=1), [same]), expected), (observed(make(), [same]), whole)):
            for found, bound in zip(answer.range(), wanted, strict=True):
                assert torch.equal(found, bound)
    gaps = torch.randn(4, 8)[:, ::2]
    assert torch.equal(observed(make(), [gaps]).range()[1], observed(make(), [gaps.contiguous()]).range()[1])


@each
def test_channels_are_ranged_apart(make: Factory) -> None:
    x = torch.randn(3, 200) * torch.tensor([[1.0], [10.0], [100.0]])
    scale, _ = observed(make(axis=0), [x]).calculate_qparams()
    for channel in range(3):
        assert torch.equal(scale[channel], observed(make(), [x[channel]]).calculate_qparams()[0])


def test_channels_must_stay_the_same() -> None:
    observer = MinMaxObserver(axis=0)
    observer(torch.ones(3, 2))
    with pytest.raises(ConfigurationError, match="3 channels before, now 4"):
        observer(torch.ones(4, 2))
    with pytest.raises(InputError, match="axis"):
        MinMaxObserver(axis=3)(torch.ones(4, 2))


def test_observers_that_differ_do_not_merge() -> None:
    with pytest.raises(ConfigurationError, match="cannot merge"):
        MinMaxObserver().merge(MinMaxObserver(axis=0))
    with pytest.raises(ConfigurationError, match="cannot merge"):
        HistogramObserver().merge(PercentileObserver())  # type: ignore[arg-type]
    seen = [observed(MinMaxObserver(axis=0), [torch.ones(n, 2)]) for n in (2, 3)]
    with pytest.raises(ConfigurationError, match="channels"):
        seen[0].merge(seen[1])


@each
def test_merging_leaves_the_other_alone(make: Factory) -> None:
    first, second = observed(make(), [torch.randn(50)]), observed(make(), [torch.randn(50) * 3])
    before = [bound.clone() for bound in second.range()]
    first.merge(second)
    empty = make().merge(second)
    empty(torch.randn(10) * 1000)
    for bound, kept in zip(second.range(), before, strict=True):
        assert torch.equal(bound, kept)


@each
def test_observers_travel_between_processes(make: Factory) -> None:
    observer = observed(make(name="a"), [torch.randn(50)])
    arrived = pickle.loads(pickle.dumps(observer))
    assert torch.equal(arrived.range()[0], observer.range()[0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MinMax", MinMaxObserver),
        ("minmaxobserver", MinMaxObserver),
        ("Moving_Average", MovingAverageMinMaxObserver),
        ("ema", MovingAverageMinMaxObserver),
        ("KL", HistogramObserver),
        ("histogram", HistogramObserver),
        ("mse", HistogramObserver),
        ("percentile", PercentileObserver),
    ],
)
def test_observers_are_made_by_name(name: str, kind: type[Observer]) -> None:
    assert type(create_observer(name)) is kind


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'best'"):
        create_observer("best")
    with pytest.raises(ConfigurationError, match="averaging_constant"):
        create_observer("minmax", averaging_constant=0.1)
    for make in (
        lambda: MovingAverageMinMaxObserver(0.0),
        lambda: HistogramObserver(1000),
        lambda: HistogramObserver(method="best"),
        lambda: PercentileObserver(40),
        lambda: MinMaxObserver(torch.float32),
    ):
        with pytest.raises(ConfigurationError):
            make()
