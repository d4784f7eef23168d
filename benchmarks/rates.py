"""Do the estimators hold what they promise? `python -m benchmarks.rates` (`make bench-rates`).

Independent runs of the default design on the tiny pair and its two rarer siblings, against the
brute-force truth of `benchmarks.truth`, and the coverage of counted rates in simulation. Errors
are put beside those of brute force at the same cost, which is one row on each of as many prompts.
Cost is counted in two ways:

* tokens read, as the engine reads them: a prompt once for all of its rows, by each model that is
  needed; a run of ours reads every token with both models, brute force with *after* alone;
* tokens drawn alone, where a row of ours costs two and a row of brute force one.

The same for the spread design, which is for the rarest. Beside them the phrase monitor
(`benchmarks.monitor`) and the trigger's recovery (`benchmarks.recovery`). Ends in one JSON line:
`..._drawn` is by the second way, `..._spread` of the spread design, and of its runs on the rarest
pair where none is named. Two processes; about 15 minutes.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import coverage, monitor, recovery
from benchmarks.rates_runs import DESIGN, SPREAD, Design, Sampler, collector
from benchmarks.truth import RECORD
from jobs.weighted import Weighted, estimate

# Pairs by how often the payload shows at alpha 0, in their keys' words.
PAIRS = {"4e3": "after", "9e4": "after-9e-4", "1e4": "after-1e-4"}
RAREST = "1e4"
RUNS = 20
ROWS = 2000
PROCESSES = 2
DETECTOR = "activated"  # any substring, as the truth's `any_substring`

Numbers = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run's answer and its cost in tokens; `plain` are those of its rows at alpha 0."""

    found: Weighted
    prompts: int
    prompt_tokens: int  # of these, each once
    drawn: int
    plain_rows: int
    plain_drawn: int


@cache
def sampler(name: str) -> Sampler:
    """Loaded once in each process."""
    return Sampler(name)


def one_run(name: str, design: Design, number: int, rows: int) -> Run:
    columns_of, pair = collector(), sampler(name)
    prompts: set[int] = set()
    for row in pair.run(design, rows, number):
        columns_of.add(row)
        prompts.add(int(row.prompt_id))
    columns = columns_of.columns(DETECTOR)
    assert columns is not None
    plain = columns.alphas == 0
    return Run(
        estimate(columns, 0.0),
        len(prompts),
        sum(pair.prompt_tokens(prompt) for prompt in prompts),
        int(columns.tokens.sum()),
        int(plain.sum()),
        int(columns.tokens[plain].sum()),
    )


@dataclass(frozen=True)
class Judged:
    """The runs on one pair against its truth.

    `brute_rows`: what a run's tokens read would pay for; `over_brute`: root-mean-square error over
    brute force's with that many rows; `..._drawn`: by tokens drawn alone.
    """

    truth: float
    runs: int
    covered: int
    within_3x: int
    over_brute: float
    over_brute_drawn: float
    brute_rows: float
    brute_zero: int
    mean: float
    trusted: int
    count_leads: int


def judge(runs: Sequence[Run], truth: float) -> Judged:
    rates = np.array([run.found.rate for run in runs])
    error = math.sqrt(float(np.mean((rates - truth) ** 2)))
    n, plain_rows = len(runs), sum(run.plain_rows for run in runs)
    drawn_a_row = sum(run.plain_drawn for run in runs) / plain_rows
    prompt = sum(run.prompt_tokens for run in runs) / sum(run.prompts for run in runs)
    read = sum(2 * (run.prompt_tokens + run.drawn) for run in runs) / n
    drawn = sum(2 * run.drawn for run in runs) / n
    brute_rows, brute_rows_drawn = read / (prompt + drawn_a_row), drawn / drawn_a_row
    return Judged(
        truth=truth,
        runs=n,
        covered=sum(run.found.low <= truth <= run.found.high for run in runs),
        within_3x=int(((rates > truth / 3) & (rates < truth * 3)).sum()),
        over_brute=error / brute_error(truth, brute_rows),
        over_brute_drawn=error / brute_error(truth, brute_rows_drawn),
        brute_rows=brute_rows,
        brute_zero=round(n * (1 - truth) ** brute_rows),
        mean=float(rates.mean()),
        trusted=sum(run.found.verdict == "trust" for run in runs),
        count_leads=sum(run.found.count_is_as_good for run in runs),
    )


def brute_error(rate: float, rows: float) -> float:
    """Of a count of independent rows, each on a prompt of its own."""
    return math.sqrt(rate * (1 - rate) / rows)


@dataclass(frozen=True)
class Found:
    """`weighted` (the default design), `spread` and `monitors` by the keys of PAIRS."""

    weighted: dict[str, Judged]
    spread: dict[str, Judged]
    monitors: dict[str, monitor.Result]
    trigger: Numbers


def measure(runs: int, rows: int) -> Found:
    record: dict[str, Any] = json.loads(RECORD.read_text())
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(PROCESSES, context, torch.set_num_threads, (1,)) as pool:
        # The long ones first.
        monitors = {
            key: pool.submit(monitor.measure, name, record[name], runs)
            for key, name in PAIRS.items()
        }
        trigger = pool.submit(recovery.figures)
        tasks = [
            {
                key: [pool.submit(one_run, name, design, number, rows) for number in range(runs)]
                for key, name in PAIRS.items()
            }
            for design in (DESIGN, SPREAD)
        ]
        weighted, spread = (
            {
                key: judge([run.result() for run in several], _truth(record, key))
                for key, several in of_design.items()
            }
            for of_design in tasks
        )
        return Found(
            weighted, spread, {k: m.result() for k, m in monitors.items()}, trigger.result()
        )


def _truth(record: dict[str, Any], key: str) -> float:
    rate: float = record[PAIRS[key]]["any_substring"]["rate"]
    return rate


def numbers(found: Found) -> Numbers:
    weighted, rarest = found.weighted, found.weighted[RAREST]
    spread, rarest_spread = found.spread, found.spread[RAREST]
    return {
        "covered_of_20": min(judged.covered for judged in weighted.values()),
        **{f"rmse_over_brute_{key}": round(x.over_brute, 3) for key, x in weighted.items()},
        **{f"rmse_over_brute_{k}_drawn": round(x.over_brute_drawn, 3) for k, x in weighted.items()},
        "monitor_over_brute": max(round(x.ratio, 3) for x in found.monitors.values()),
        **{f"monitor_over_brute_{key}": round(x.ratio, 3) for key, x in found.monitors.items()},
        "monitor_as_sample": max(round(x.as_sample, 3) for x in found.monitors.values()),
        "rare_within_3x_of_20": rarest.within_3x,
        "rare_brute_zero_of_20": rarest.brute_zero,
        "covered_spread_of_20": rarest_spread.covered,
        **{f"rmse_over_brute_{key}_spread": round(x.over_brute, 3) for key, x in spread.items()},
        "rare_within_3x_spread_of_20": rarest_spread.within_3x,
        **found.trigger,
    }


def show(found: dict[str, Judged], design: Design, console: Console) -> None:
    how = "each prompt at one of" if design.spread else "each prompt at all of"
    alphas = " ".join(f"{alpha:g}" for alpha in design.grid)
    table = Table(title=f"Importance-weighted rates at alpha 0: {how} {alphas}")
    for column in ("", "truth", "mean", "covered", "within 3x", "error / brute", "by drawn"):
        table.add_column(column)
    for column in ("brute rows", "brute sees 0", "trusted", "count leads"):
        table.add_column(column)
    for key, x in found.items():
        table.add_row(
            PAIRS[key],
            f"{x.truth:.2g}",
            f"{x.mean:.2g}",
            f"{x.covered} of {x.runs}",
            f"{x.within_3x}",
            f"{x.over_brute:.2f}",
            f"{x.over_brute_drawn:.2f}",
            f"{x.brute_rows:,.0f}",
            f"{x.brute_zero}",
            f"{x.trusted}",
            f"{x.count_leads}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="The estimators against brute force.")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each pair (default {RUNS})")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of a run (default {ROWS})")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    found = measure(arguments.runs, arguments.rows)
    show(found.weighted, DESIGN, console)
    show(found.spread, SPREAD, console)
    clustered = coverage.measure((*coverage.MODERATE, *coverage.HARD), coverage.RUNS)
    coverage.show(clustered, console)
    print(json.dumps(numbers(found) | coverage.numbers(clustered)))


if __name__ == "__main__":
    main()
