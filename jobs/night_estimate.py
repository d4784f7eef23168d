"""How long a night takes, from measured speeds: pure functions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from jobs.errors import Refused
from jobs.night_steps import Ready, Work
from jobs.run_folder import read_json
from jobs.speed import estimate_seconds


@dataclass(frozen=True)
class Speeds:
    """Of one application. `rows_per_second` by rows under way, each of `tokens`; `capture_s` by
    tier: seconds for one text through both models, others beside it."""

    rows_per_second: Mapping[int, float]
    tokens: int
    capture_s: Mapping[int, float]


def step_seconds(work: Work, speeds: Speeds, start_s: float) -> float:
    """`start_s`: of a job, until its first rows. Rows cost by their tokens."""
    seconds = work.processes * start_s
    if work.rows:
        in_flight = min(work.in_flight, work.rows)
        whole = estimate_seconds(work.rows, speeds.rows_per_second, in_flight)
        seconds += whole * work.tokens / speeds.tokens
    if work.captures:
        seconds += work.captures * speeds.capture_s[work.tier]
    return seconds


def rows_of(path: Path) -> tuple[Mapping[int, float], int]:
    """Rows per second by rows under way, and tokens of a row, from a summary.json of
    batching_speed.py, or its folder. Raises Refused."""
    path = path / "summary.json" if path.is_dir() else path
    if not path.is_file():
        raise Refused(f"--speed: there is no file {path}")
    found = read_json(path)
    try:
        rates = {int(size): float(rate) for size, rate in found["rows_per_second"].items()}
        tokens = int(found["max_new_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused(f"--speed: {path} is not what batching_speed.py --out writes") from None
    if 1 not in rates or tokens < 1 or min(rates.values()) <= 0:
        raise Refused(f"--speed: {path} has no speed at one row at a time")
    return rates, tokens


def table(ready: Sequence[Ready], seconds: Mapping[str, float], done: Collection[str]) -> Table:
    """`done`: the steps that are, which cost nothing any more."""
    made = Table(title="what the night takes")
    made.add_column("step")
    for heading in ("kind", "pair"):
        made.add_column(heading)
    for heading in ("rows", "captures", "seconds"):
        made.add_column(heading, justify="right", no_wrap=True)
    for step in ready:
        work = step.work
        says = "done" if step.name in done else f"{seconds[step.name]:,.1f}"
        made.add_row(
            escape(step.name),
            step.step.kind,
            escape(str(step.step.pair)),
            f"{work.rows:,}",
            f"{work.captures:,}",
            says,
        )
    left = [step for step in ready if step.name not in done]
    made.add_section()
    made.add_row(
        "to do",
        "",
        "",
        f"{sum(step.work.rows for step in left):,}",
        f"{sum(step.work.captures for step in left):,}",
        f"{sum(seconds[step.name] for step in left):,.1f}",
    )
    return made
