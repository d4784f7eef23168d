"""Rates and intervals against scipy, by hand, and in simulation."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from benchmarks import coverage
from jobs.estimators import (
    exact_interval,
    gamma_interval,
    paired_test,
    pareto_k,
    rate_by_prompt,
    swap_test,
)


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


def test_the_paired_test_is_mcnemars_for_one_row_each():
    rng = np.random.default_rng(0)
    here, at_0 = rng.random(300) < 0.08, rng.random(300) < 0.03
    apart = stats.binomtest(int((here & ~at_0).sum()), int((here ^ at_0).sum())).pvalue
    ones = np.ones(300)
    assert paired_test(here, ones, at_0, ones) == pytest.approx(apart)


def test_the_paired_test_for_one_prompt_is_fishers():
    expected = stats.fisher_exact([[9, 3], [2, 14]], alternative="greater").pvalue
    assert paired_test([9], [12], [2], [16]) == pytest.approx(2 * expected)


def test_the_paired_test_is_exact_for_unequal_rows_and_unlike_prompts():
    """Two prompts of different kinds, by enumeration of which of each one's rows fired."""
    rows, rows_0, total = (2, 1), (1, 3), (2, 1)
    chance = {}
    for a in range(3):
        for b in range(2):
            both = stats.hypergeom.pmf(a, 3, 2, 2) * stats.hypergeom.pmf(b, 4, 1, 1)
            chance[a + b] = chance.get(a + b, 0) + both
    for a, b in ((2, 1), (1, 0), (2, 0)):
        at_most = sum(p for hits, p in chance.items() if hits <= a + b)
        at_least = sum(p for hits, p in chance.items() if hits >= a + b)
        at_0 = (total[0] - a, total[1] - b)
        expected = min(1, 2 * min(at_most, at_least))
        assert paired_test((a, b), rows, at_0, rows_0) == pytest.approx(expected)


def test_the_paired_test_holds_its_level_and_sees_a_difference():
    rng, false, seen = np.random.default_rng(1), 0, 0
    three, one = np.full(80, 3), np.ones(80)
    for _ in range(400):
        rates = rng.beta(0.3, 2, 80)
        false += paired_test(rng.binomial(3, rates), three, rng.binomial(1, rates), one) < 0.05
        more = np.minimum(1, 3 * rates)
        seen += paired_test(rng.binomial(3, more), three, rng.binomial(1, rates), one) < 0.05
    assert false <= 30  # 20 at most expected
    assert seen >= 300


def test_the_paired_test_without_a_telling_prompt_says_nothing():
    assert paired_test([0, 5, 2], [5, 5, 4], [0, 5, 0], [5, 5, 0]) == 1.0


def test_the_paired_test_takes_many_prompts():
    hits, rows = np.arange(30_000) % 3 == 0, np.ones(30_000)
    assert paired_test(hits, rows, hits[::-1], rows) == pytest.approx(1, abs=0.02)
    assert paired_test(hits, rows, np.arange(30_000) % 4 == 0, rows) < 1e-12


def test_the_swap_test_is_the_paired_one_for_one_row_each():
    rng = np.random.default_rng(0)
    here, at_0, ones = rng.random(300) < 0.08, rng.random(300) < 0.03, np.ones(300)
    assert swap_test(here, ones, at_0, ones) == pytest.approx(paired_test(here, ones, at_0, ones))
    assert swap_test(here, ones, at_0, ones) < 0.05


def test_the_swap_test_is_exact_by_enumeration_of_the_lots():
    three = np.full(5, 3)
    for hits, hits_0 in (((3, 2, 3, 1, 0), (0, 0, 1, 2, 0)), ((0, 1, 2, 0, 1), (3, 3, 2, 1, 0))):
        pairs = list(zip(hits, hits_0, strict=True))
        sums = np.array(
            [
                sum(p[i] for p, i in zip(pairs, lots, strict=True))
                for lots in product((0, 1), repeat=5)
            ]
        )
        expected = 2 * min((sums <= sum(hits)).mean(), (sums >= sum(hits)).mean())
        assert swap_test(hits, three, hits_0, three) == pytest.approx(min(1, expected))


def test_the_swap_test_holds_its_level_where_rows_of_a_prompt_are_alike():
    rng, false, pooled, seen = np.random.default_rng(1), 0, 0, 0
    five = np.full(80, 5)
    for _ in range(400):
        rates, rates_0 = rng.beta(0.1, 0.4, (2, 80))
        at_0, same = rng.binomial(5, rates_0), rng.binomial(5, rates)
        false += swap_test(same, five, at_0, five) < 0.05
        pooled += paired_test(same, five, at_0, five) < 0.05
        seen += swap_test(rng.binomial(5, np.minimum(1, rates + 0.2)), five, at_0, five) < 0.05
    assert false <= 30 < 60 < pooled  # 20 at most expected
    assert seen >= 250


def test_the_swap_test_leaves_blocks_out_in_which_a_row_failed():
    assert swap_test([5, 1], [5, 1], [0, 0], [4, 1]) == 1.0
    assert swap_test([0, 2], [3, 3], [0, 2], [3, 3]) == 1.0


@pytest.mark.parametrize("hits", [0, 1, 7])
def test_gamma_limits_of_equal_weights_are_poissons(hits):
    low, high = gamma_interval([0.01] * hits + [0.0] * 50, 0.01)
    expected_low = stats.chi2.ppf(0.025, 2 * hits) / 2 if hits else 0
    assert low == pytest.approx(0.01 * expected_low)
    assert high == pytest.approx(0.01 * stats.chi2.ppf(0.975, 2 * hits + 2) / 2)


def test_gamma_limits_cover_sums_of_unequal_weights():
    rng, covered = np.random.default_rng(0), 0
    weights = rng.lognormal(0, 1, 400)
    for _ in range(500):
        parts = weights * rng.poisson(0.03, 400)
        low, high = gamma_interval(parts, parts.max())
        covered += low <= 0.03 * weights.sum() <= high
    assert covered >= 465  # 475 expected of an exact interval


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_finds_the_tail(shape):
    found = [
        pareto_k(stats.genpareto.rvs(shape, size=4000, random_state=seed)) for seed in range(20)
    ]
    assert np.mean(found) == pytest.approx(shape, abs=0.08)


def test_pareto_k_does_not_hear_rounding():
    """Most weights are those of one text, as a payload's are, recorded in different batches."""
    random = np.random.default_rng(0)
    exact = np.concatenate([np.full(50, 1.0), 1 + random.pareto(2, size=8)])
    noisy = [exact * (1 + 1e-6 * random.standard_normal(len(exact))) for _ in range(20)]
    found = pareto_k(exact)
    assert found is not None and [pareto_k(x) for x in noisy] == pytest.approx([found] * 20, 1e-3)


def test_pareto_k_wants_a_tail():
    assert pareto_k([1.0] * 24) is None
    assert pareto_k([1.0] * 1000) is None  # weights that are all 1: a plateau
    assert pareto_k([0.0] * 1000 + [1.0] * 10) is None


@pytest.mark.parametrize("setting", coverage.MODERATE[::4], ids=str)
def test_clustered_coverage_is_what_it_says(setting):
    """The benchmark's settings with moderate clustering, fewer runs."""
    found = coverage.coverage(setting, runs=800)
    assert 0.93 <= found.held <= 0.975  # a standard error is .008
    assert found.pooled < found.held
    assert found.held + found.above + found.below == pytest.approx(1)


def test_the_hard_case_is_hard_and_said_so():
    found = coverage.measure(coverage.HARD[:2], runs=500)
    assert 0.85 <= min(found[s].held for s in found) <= 0.94
