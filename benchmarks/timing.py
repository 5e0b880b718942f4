"""Timing several engines in one process so that none pays for another's threads.

Calls that simply alternate are unfair: after a parallel region the worker threads of one pool keep spinning for a
while and take the cores from the next engine. So the engines take turns in bursts, and each burst starts with a pause
and a few calls that do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Schedule:
    """How long and how often engines take turns.

    Attributes:
        rounds: Bursts of each engine. The order is rotated from round to round.
        pause: Seconds of sleep before a burst.
        warmup: Calls before a burst that do not count.
        burst: Seconds of counted calls in a burst, at least.
        min_calls: Counted calls in a burst, at least, however slow they are.
        max_calls: Counted calls in a burst, at most, however fast they are.
    """

    rounds: int = 7
    pause: float = 0.25
    warmup: int = 2
    burst: float = 0.5
    min_calls: int = 3
    max_calls: int = 2000


#: For a quick look and for tests: the figures are not worth keeping.
QUICK = Schedule(rounds=2, pause=0.02, warmup=1, burst=0.02, min_calls=1, max_calls=20)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over all bursts.

    Attributes:
        median: The middle of all counted calls.
        low, high: First and third quartile.
        calls: Counted calls.
    """

    median: float
    low: float
    high: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarize the times of single calls; at least one."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        return cls(median(seconds), low, high, len(seconds))

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    schedule: Schedule | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Time each of ``calls`` in bursts that take turns.

    Args:
        calls: What to time, by name.
        schedule: Defaults to :class:`Schedule`.
        clock, sleep: Where time comes from.

    Returns:
        A timing for each name, in the order of ``calls``.
    """
    schedule = schedule or Schedule()
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(schedule.rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            sleep(schedule.pause)
            seconds[name] += _burst(calls[name], schedule, clock)
    return {name: Timing.of(measured) for name, measured in seconds.items()}


def _burst(call: Callable[[], object], schedule: Schedule, clock: Callable[[], float]) -> list[float]:
    for _ in range(schedule.warmup):
        call()
    measured: list[float] = []
    start = clock()
    while len(measured) < schedule.max_calls:
        before = clock()
        call()
        after = clock()
        measured.append(after - before)
        if len(measured) >= schedule.min_calls and after - start >= schedule.burst:
            break
    return measured
