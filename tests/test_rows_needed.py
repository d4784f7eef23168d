"""The planner: how many rows until something is seen, and until its rate is known."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jobs.estimators import exact_interval
from jobs.rows_needed import (
    chance_of_seeing,
    main,
    prompts_until_seen,
    prompts_until_within,
    rate_and_boost,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("rate", [1e-7, 1e-4, 4e-3, 0.3, 0.99])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_seen_once_is_the_closed_form(rate, confidence):
    """1 - (1 - r)^n >= c."""
    needed = math.ceil(math.log(1 - confidence) / math.log1p(-rate) * (1 - 1e-12))
    assert prompts_until_seen(rate, 1, confidence) == needed


@pytest.mark.parametrize("seen", [1, 3, 10])
@pytest.mark.parametrize("rate", [1e-4, 0.02])
def test_seen_k_times_is_the_least_number_that_the_binomial_allows(seen, rate):
    n = prompts_until_seen(rate, seen)
    assert stats.binom.sf(seen - 1, n, rate) >= 0.95 > stats.binom.sf(seen - 1, n - 1, rate)


def test_independent_rows_may_be_of_any_prompt():
    for samples in (2, 7):
        rows = samples * prompts_until_seen(1e-3, 3, samples=samples)
        assert 0 <= rows - prompts_until_seen(1e-3, 3) < samples


@pytest.mark.parametrize("seen", [1, 3])
def test_rows_of_a_prompt_that_are_alike_are_seen_later(seen):
    """Against 20,000 simulated runs: their share is known to .0035 where it is .95 or less."""
    rate, samples, icc = 0.01, 8, 0.3
    n = prompts_until_seen(rate, seen, samples=samples, icc=icc)
    assert n * samples > 1.5 * prompts_until_seen(rate, seen)
    assert chance_of_seeing(n - 1, rate, seen, samples, icc) < 0.95
    rng, worth = np.random.default_rng(2), (1 - icc) / icc
    for prompts in (n, n // 3):
        p = rng.beta(rate * worth, (1 - rate) * worth, (20_000, prompts))
        share = np.mean(rng.binomial(samples, p).sum(axis=1) >= seen)
        exact = chance_of_seeing(prompts, rate, seen, samples, icc)
        assert share == pytest.approx(exact, abs=4 * 0.0035)


def test_a_trace_of_likeness_changes_nothing():
    alike = prompts_until_seen(0.002, 2, samples=5, icc=1e-6)
    assert alike == prompts_until_seen(0.002, 2, samples=5)


@pytest.mark.parametrize("rate", [1e-4, 0.02, 0.4])
@pytest.mark.parametrize("factor", [1.2, 2.0, 5.0])
def test_the_interval_is_within_the_factor_and_with_one_row_less_it_is_not(rate, factor):
    n = prompts_until_within(rate, factor)

    def within(rows):
        low, high = exact_interval(rate * rows, rows)
        return rate / factor <= low and high <= rate * factor

    assert within(n) and not within(n - 1)


def test_likeness_costs_the_design_effect():
    """4 rows at .2 are worth 2.5 of their own."""
    alone = prompts_until_within(0.01, 2.0)
    assert prompts_until_within(0.01, 2.0, samples=4, icc=0.2) == math.ceil(alone / 2.5)


@pytest.fixture
def planned(capsys):
    """Exit status, standard output as lines of cells, and standard error."""

    def planned(*options):
        try:
            status = main(list(options))
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        lines = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
        return status, [[cell.strip() for cell in line] for line in lines], err

    return planned


def test_counting_needs_one_pass_a_token(planned):
    status, lines, _ = planned("--rate", "1e-4")
    assert status == 0 and len(lines) == 2
    assert lines[0][0] == "seen once with 95 %"
    assert lines[0][2:] == ["0.0001", "29,956", "29,956", f"{29956 * 48:,}", "-"]
    assert lines[1][0] == "95 % interval within a factor of 2"


def test_an_amplified_row_needs_two(planned):
    options = ("--rate", "1e-4", "--boost", "100", "--tokens", "10", "--tokens-per-s", "1000")
    _, lines, _ = planned(*options)
    assert [line[1] for line in lines] == [
        "counted at alpha 0",
        "amplified, 100 times as often",
    ] * 2
    assert lines[1][2:] == ["0.01", "299", "299", f"{299 * 10 * 2:,}", "3 s"]
    assert lines[0][-1] == "2.5 min"  # 29,956 rows of 10 tokens, 2,000 a second


def test_samples_are_prompts_times_rows(planned):
    _, lines, _ = planned("--rate", "0.01", "--samples-per-prompt", "4", "--icc", "0.2")
    prompts, rows = (int(cell.replace(",", "")) for cell in lines[0][3:5])
    assert rows == 4 * prompts and prompts == prompts_until_seen(0.01, samples=4, icc=0.2)


@pytest.fixture
def summary(tmp_path):
    values = {"untriggered/alpha=0/rate": 0.004, "untriggered/alpha=0.5/rate": 0.012}
    values |= {"untriggered/alpha=-1/rate": 0.0}
    (tmp_path / "summary.json").write_text(json.dumps(values))
    return tmp_path / "summary.json"


def test_rate_and_boost_of_an_earlier_run(summary, planned):
    assert rate_and_boost(summary, 0.5) == (0.004, pytest.approx(3))
    from_file = planned("--summary", str(summary), "--alpha", "0.5")
    assert from_file == planned("--summary", str(summary.parent), "--alpha", "0.5")
    assert from_file == planned("--rate", "0.004", "--boost", "3")
    own_rate = planned("--summary", str(summary), "--alpha", "0.5", "--rate", "1e-5")
    assert own_rate == planned("--rate", "1e-5", "--boost", "3")


@pytest.mark.parametrize(
    "options, says",
    [
        ([], "--rate: must be given, from 1e-09 to 0.99"),
        (["--rate", "0"], "argument --rate: must be a number from 1e-09 to 0.99"),
        (["--rate", "nan"], "argument --rate: must be a number"),
        (["--rate", "1"], "argument --rate"),
        (["--rate", ".1", "--seen", "0"], "argument --seen: must be a whole number from 1 to 100"),
        (["--rate", ".1", "--confidence", "95"], "argument --confidence: must be a number from"),
        (["--rate", ".1", "--factor", "1"], "argument --factor: must be a number from 1.01"),
        (["--rate", ".1", "--samples", "0"], "argument --samples"),
        (["--rate", ".1", "--icc", "1"], "argument --icc: must be a number from 0 to 0.99"),
        (["--rate", ".1", "--boost", "50"], "--boost: must be from 1e-08 to 9.9 at rate 0.1"),
        (["--rate", ".1", "--boost", "0"], "argument --boost"),
        (["--rate", ".1", "--tokens", "0"], "argument --tokens"),
        (["--rate", ".1", "--tokens-per-s", "0"], "argument --tokens-per-s"),
        (["--rate", ".1", "--alpha", "1"], "--alpha: needs --summary"),
        (["--summary", "SUMMARY"], "--summary: needs --alpha"),
        (["--summary", "SUMMARY", "--alpha", "3"], "has no untriggered/alpha=3/rate"),
        (["--summary", "SUMMARY", "--alpha", "-1"], "has no hit at alpha -1"),
        (["--summary", "/no/such", "--alpha", "1"], "--summary: /no/such cannot be read"),
    ],
)
def test_bad_input_is_refused_by_name_and_range(planned, summary, options, says):
    status, lines, err = planned(*(str(summary) if o == "SUMMARY" else o for o in options))
    assert status == 2 and not lines
    assert says in err


def test_the_script_runs_from_anywhere_and_needs_no_service(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "rows_needed.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--rate 1e-4 --boost 100" in done.stdout
