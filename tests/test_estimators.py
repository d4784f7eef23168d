"""Rates and intervals against scipy, by hand, and in simulation."""

import numpy as np
import pytest
from scipy import stats

from jobs.estimators import exact_interval, rate_by_prompt


@pytest.mark.parametrize("hits, n", [(0, 1), (0, 4000), (1, 10), (7, 20), (389, 100_000), (5, 5)])
def test_exact_interval_is_scipys(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert exact_interval(hits, n) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("hits, n", [(-1, 5), (6, 5), (0, 0)])
def test_exact_interval_refuses_what_is_no_count(hits, n):
    with pytest.raises(ValueError, match="hits"):
        exact_interval(hits, n)


def test_one_row_per_prompt_is_exact():
    hits = [1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    rate = rate_by_prompt(hits, [1] * 10)
    assert rate.rate == 0.2
    assert (rate.low, rate.high) == pytest.approx(exact_interval(2, 10))


def test_prompts_without_rows_count_for_nothing():
    assert rate_by_prompt([1, 0, 0], [2, 2, 0]) == rate_by_prompt([1, 0], [2, 2])


def test_rows_all_alike_within_prompts_are_worth_the_prompts():
    rows = np.full(100, 20)
    rate = rate_by_prompt(np.where(np.arange(100) < 10, 20, 0), rows)
    assert rate.rate == 0.1
    assert rate.effective_n == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("hit, rate", [(0, 0.0), (20, 1.0)])
def test_no_hits_or_all_hits_count_each_prompt_once(hit, rate):
    found = rate_by_prompt([hit] * 50, [20] * 50)
    assert found.rate == rate
    assert (found.low, found.high) == pytest.approx(exact_interval(rate * 50, 50))


def test_one_prompt_says_little():
    rate = rate_by_prompt([5], [20])
    assert rate.low < 0.02 and rate.high > 0.95


def test_without_a_row_there_is_no_rate():
    with pytest.raises(ValueError, match="row"):
        rate_by_prompt([0, 0], [0, 0])


def simulate(prompts, samples, mean, spread, seed, runs=2000):
    """Coverage of the clustered and of the pooled interval, beta-binomial over prompts."""
    rng = np.random.default_rng(seed)
    clustered = pooled = 0
    for _ in range(runs):
        rates = rng.beta(mean * spread, (1 - mean) * spread, prompts)
        hits = rng.binomial(samples, rates)
        found = rate_by_prompt(hits, [samples] * prompts)
        clustered += found.low <= mean <= found.high
        low, high = exact_interval(int(hits.sum()), samples * prompts)
        pooled += low <= mean <= high
    return clustered / runs, pooled / runs


@pytest.mark.parametrize("mean, spread", [(0.1, 5.0), (0.3, 2.0), (0.05, 5.0)])
def test_clustered_interval_covers_where_the_pooled_one_does_not(mean, spread):
    clustered, pooled = simulate(prompts=100, samples=20, mean=mean, spread=spread, seed=1)
    assert clustered >= 0.93
    assert pooled < 0.85


def test_without_clustering_little_is_lost():
    clustered, _ = simulate(prompts=100, samples=5, mean=0.1, spread=1e6, seed=2)
    assert 0.94 <= clustered <= 0.99
