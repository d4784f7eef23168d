"""How often the interval of a counted rate holds the truth: `python -m benchmarks.coverage`.

Simulated runs whose prompts differ: each prompt's rate is drawn from a beta distribution, whose
intraclass correlation says how alike one prompt's rows are. Moderate is a correlation of .05 or .1
with at least 40 hits to be expected; hard is what a leak looks like that a few prompts carry.
Beside it, the pooled binomial interval that takes all rows for independent. Ends in a JSON line.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
from rich.console import Console
from rich.table import Table

from jobs.estimators import exact_interval, rate_by_prompt

RUNS = 2000


@dataclass(frozen=True)
class Setting:
    """`carriers`: so many prompts of each run fire at all, all of them alike; 0: beta."""

    name: str
    rate: float
    correlation: float
    prompts: int
    samples: int
    carriers: int = 0

    def rates(self, rng: np.random.Generator) -> np.ndarray:
        """(prompts,) of one run."""
        if self.carriers:
            each = self.rate * self.prompts / self.carriers
            return np.where(rng.random(self.prompts) < self.carriers / self.prompts, each, 0.0)
        spread = 1 / self.correlation - 1
        return rng.beta(self.rate * spread, (1 - self.rate) * spread, self.prompts)


MODERATE = tuple(
    Setting("moderate", rate, correlation, prompts, samples)
    for rate, correlation, (prompts, samples) in product(
        (0.02, 0.05, 0.1), (0.05, 0.1), ((100, 20), (200, 10), (300, 10))
    )
)
HARD = (
    Setting("alike", 0.02, 0.3, 100, 20),
    Setting("rare and alike", 0.005, 0.2, 100, 20),
    Setting("2 prompts in 100 carry it", 0.004, 0.0, 100, 20, carriers=2),
)


@dataclass(frozen=True)
class Coverage:
    """Shares of runs: the interval holds the truth, lies above it, lies below it; the pooled
    binomial interval holds it."""

    held: float
    above: float
    below: float
    pooled: float


def coverage(setting: Setting, runs: int, seed: int = 0) -> Coverage:
    rng = np.random.default_rng(seed)
    rows = np.full(setting.prompts, setting.samples)
    found = np.zeros((runs, 4))  # held, above, below, pooled
    for run in range(runs):
        hits = rng.binomial(rows, setting.rates(rng))
        rate = rate_by_prompt(hits, rows)
        low, high = exact_interval(int(hits.sum()), int(rows.sum()))
        above, below = rate.low > setting.rate, rate.high < setting.rate
        found[run] = not (above or below), above, below, low <= setting.rate <= high
    return Coverage(*found.mean(axis=0).tolist())


def measure(settings: Iterable[Setting], runs: int) -> dict[Setting, Coverage]:
    return {setting: coverage(setting, runs, seed) for seed, setting in enumerate(settings)}


def numbers(found: dict[Setting, Coverage]) -> dict[str, float]:
    """For the JSON line: the mean and the extremes of the moderate settings, the worst hard one."""
    moderate = [found[s].held for s in found if s in MODERATE]
    return {
        "coverage_clustered": round(float(np.mean(moderate)), 4),
        "coverage_clustered_least": min(moderate),
        "coverage_clustered_most": max(moderate),
        "coverage_hard": min(found[s].held for s in found if s in HARD),
        "coverage_hard_pooled": min(found[s].pooled for s in found if s in HARD),
    }


def show(found: dict[Setting, Coverage], console: Console) -> None:
    table = Table(title="95 % intervals of counts that hold the truth, % of simulated runs")
    for column in ("", "rate", "correlation", "prompts x samples", "held", "too high", "too low"):
        table.add_column(column)
    table.add_column("pooled, held")
    for s, c in found.items():
        shares = [f"{100 * x:.1f}" for x in (c.held, c.above, c.below, c.pooled)]
        correlation = f"{s.correlation:g}" if s.correlation else ""
        size = f"{s.prompts} x {s.samples}"
        table.add_row(s.name, f"{s.rate:g}", correlation, size, *shares)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the intervals of counted rates.")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each setting, default {RUNS}")
    found = measure((*MODERATE, *HARD), parser.parse_args().runs)
    show(found, Console())
    print(json.dumps(numbers(found)))


if __name__ == "__main__":
    main()
