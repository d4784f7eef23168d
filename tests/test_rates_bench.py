"""The benchmark of the rates: how runs are judged, and a small one from end to end."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from benchmarks import monitor, rates, rates_runs
from benchmarks.rates import Run, judge, numbers
from jobs.weight_columns import Columns
from jobs.weighted import estimate

RATIOS = {"4e3": 0.2, "9e4": 0.3, "1e4": 0.1}


def run_with(hits_at_0, rate_scale=1.0):
    """1,000 prompts with a row at alpha 0 and one at 1 that is never a hit; 10 tokens a row."""
    n = 2000
    columns = Columns(
        prompts=np.repeat(np.arange(n // 2), 2),
        alphas=np.tile([0.0, 1.0], n // 2),
        hits=np.arange(n) < 2 * hits_at_0,
        tokens=np.full(n, 10),
        grid=(0.0, 1.0),
        target=np.zeros((n, 2)),
        proposal=np.zeros((n, 2)),
    )
    return Run(estimate(columns), 1000, 30 * 1000, 10 * n, 1000, 10 * 1000)


def test_cost_is_tokens_read_or_drawn():
    """A run reads 2 x (30 x 1,000 + 20,000) tokens, brute force 40 a row; drawn are 40,000."""
    judged = judge([run_with(4), run_with(6)], truth=0.004)
    assert judged.brute_rows == pytest.approx(2500)
    assert judged.over_brute_drawn / judged.over_brute == pytest.approx((4000 / 2500) ** 0.5)


def test_errors_are_against_the_truth():
    judged = judge([run_with(4), run_with(6)], truth=0.004)  # rates .004 and .006
    error = (0.002**2 / 2) ** 0.5
    assert judged.over_brute == pytest.approx(error / (0.004 * 0.996 / 2500) ** 0.5)
    assert (judged.covered, judged.within_3x, judged.runs) == (2, 2, 2)
    assert judge([run_with(4)] * 3, truth=0.0001).within_3x == 0
    assert judge([run_with(40)] * 3, truth=0.001).covered == 0


def test_what_brute_force_would_not_see():
    assert judge([run_with(4)] * 20, truth=0.0001).brute_zero == round(20 * 0.9999**2500)


def test_the_line_has_the_worst_pair():
    good, bad = judge([run_with(4)] * 2, truth=0.004), judge([run_with(40)] * 2, truth=0.001)
    fields = {field.name: 0.1 for field in dataclasses.fields(monitor.Result)}
    monitors = {key: monitor.Result(**{**fields, "ratio": r}) for key, r in RATIOS.items()}
    pairs = {"4e3": good, "9e4": bad, "1e4": good}
    spread = {"4e3": bad, "9e4": good, "1e4": judge([run_with(4)] * 3, truth=0.004)}
    line = numbers(rates.Found(pairs, spread, monitors, {"trigger_rank": 1}))
    assert (line["monitor_over_brute"], line["trigger_rank"]) == (0.3, 1)
    assert line["covered_of_20"] == 0
    assert line["rmse_over_brute_4e3"] == 0
    assert line["rmse_over_brute_9e4"] > 1
    assert line["rare_within_3x_of_20"] == 2
    assert line["rare_within_3x_spread_of_20"] == line["covered_spread_of_20"] == 3
    assert line["rmse_over_brute_4e3_spread"] == line["rmse_over_brute_9e4"]
    assert line["rmse_over_brute_1e4_spread"] == 0


@pytest.mark.parametrize("design", [rates_runs.DESIGN, rates_runs.SPREAD], ids=["all", "spread"])
def test_a_small_run_end_to_end(design):
    """Rows as a job stores them; both models' densities; other prompts in each run."""
    pair = rates_runs.Sampler("after")
    rows = 50
    first, again, other = (list(pair.run(design, rows, number)) for number in (1, 1, 2))
    assert [row.token_ids for row in first] == [row.token_ids for row in again]
    assert {row.prompt_id for row in first} != {row.prompt_id for row in other}
    assert len({row.seed for row in (*first, *other)}) == 2 * rows
    assert Counter(row.alpha for row in first) == dict.fromkeys(design.grid, 10)
    assert len({row.prompt_id for row in first}) == (50 if design.spread else 10)
    assert {row.block for row in first} == (set(range(10)) if design.spread else {None})
    collect = rates_runs.collector()
    for row in (*first, *other):
        collect.add(row)
    found = estimate(collect.columns())
    assert found.rows == 2 * rows and found.without == found.failed == 0
    assert abs(found.mean_weight - 1) < max(0.1, 4 * found.mean_weight_error)


def test_a_spread_design_has_as_many_samples_at_any_alpha_and_whole_blocks_alone():
    with pytest.raises(ValueError, match="as many samples at any alpha"):
        rates_runs.Design({0.0: 2, 1.0: 1}, spread=True)
    twice = rates_runs.Design({0.0: 2, 1.0: 2}, spread=True)
    rows = list(rates_runs.Sampler("after").run(twice, 11, 1))
    assert Counter(row.prompt_id for row in rows).most_common() == [
        (id, 2) for id in dict.fromkeys(row.prompt_id for row in rows)
    ]
    assert len(rows) == 8 and Counter(row.block for row in rows) == {0: 4, 1: 4}
