"""Latency of rows that arrive at random: the engine against a server of static batches.

Latency is from a row's arrival to its last token, in seconds. Both servers see the same arrivals;
the clock is an argument, so that a test can count by hand.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from lda_core import Engine, Request


class Clock(Protocol):
    def now(self) -> float: ...

    def wait_until(self, moment: float) -> None: ...


class WorkClock:
    """Seconds that this thread has worked since it was made; waiting is skipped, not slept.

    The thread's own time, because what else runs on the machine would hit one server or the other.
    """

    def __init__(self) -> None:
        self._start = time.thread_time()

    def now(self) -> float:
        return time.thread_time() - self._start

    def wait_until(self, moment: float) -> None:
        self._start -= max(0.0, moment - self.now())


def static_latencies(
    arrivals: Sequence[float], serve: Callable[[list[int]], object], batch: int, clock: Clock
) -> list[float]:
    """A server that takes up to `batch` waiting rows, runs them to the end, and only then looks
    again. `serve` runs the rows of these indices; `arrivals` are ascending."""
    latencies: list[float] = []
    while len(latencies) < len(arrivals):
        first = len(latencies)
        clock.wait_until(arrivals[first])
        now = clock.now()
        waiting = [i for i, moment in enumerate(arrivals) if i >= first and moment <= now]
        taken = waiting[:batch] or [first]  # by rounding, a wait may end a little early
        serve(taken)
        latencies += [clock.now() - arrivals[i] for i in taken]
    return latencies


def engine_latencies(
    engine: Engine, requests: Sequence[Request], arrivals: Sequence[float], clock: Clock
) -> list[float]:
    """The engine: rows join and leave at any step."""
    rows = [engine.accept(request) for request in requests]
    index = {id(row): i for i, row in enumerate(rows)}
    latencies = [0.0] * len(rows)
    come = 0
    while come < len(rows) or not engine.idle:
        if engine.idle:
            clock.wait_until(arrivals[come])
        while come < len(rows) and arrivals[come] <= clock.now():
            engine.enqueue(rows[come])
            come += 1
        for row in engine.step():
            latencies[index[id(row)]] = clock.now() - arrivals[index[id(row)]]
    return latencies


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
