"""Engines take turns in bursts, each after a pause and calls that do not count."""

from __future__ import annotations

import pytest

from benchmarks.timing import Schedule, Timing, take_turns


class FakeTime:
    """A clock that moves only when something is said to take time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.events.append("pause")
        self.now += seconds

    def call(self, name: str, seconds: float) -> None:
        self.events.append(name)
        self.now += seconds


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


def test_every_burst_follows_a_pause_and_the_order_rotates(time: FakeTime) -> None:
    schedule = Schedule(rounds=2, pause=1.0, warmup=1, burst=0.0, min_calls=2)
    calls = {name: lambda name=name: time.call(name, 1.0) for name in ("a", "b")}
    take_turns(calls, schedule, time.clock, time.sleep)
    first = ["pause", "a", "a", "a", "pause", "b", "b", "b"]
    second = ["pause", "b", "b", "b", "pause", "a", "a", "a"]
    assert time.events == first + second


def test_warmup_calls_do_not_count(time: FakeTime) -> None:
    durations = iter([100.0, 100.0, 1.0, 2.0, 3.0])
    schedule = Schedule(rounds=1, warmup=2, burst=0.0, min_calls=3)
    timings = take_turns({"a": lambda: time.call("a", next(durations))}, schedule, time.clock, time.sleep)
    assert timings["a"] == Timing(median=2.0, low=1.5, high=2.5, calls=3)


@pytest.mark.parametrize(("seconds", "calls"), [(0.25, 4), (5.0, 3), (0.001, 10)])
def test_a_burst_lasts_its_time_within_the_bounds_on_calls(time: FakeTime, seconds: float, calls: int) -> None:
    schedule = Schedule(rounds=1, warmup=0, burst=1.0, min_calls=3, max_calls=10)
    timings = take_turns({"a": lambda: time.call("a", seconds)}, schedule, time.clock, time.sleep)
    assert timings["a"].calls == calls


def test_a_single_call_is_its_own_median() -> None:
    assert Timing.of([0.5]) == Timing(0.5, 0.5, 0.5, 1)
