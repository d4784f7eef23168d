"""The sequential design: what it spends where, that it replays, and that its intervals cover."""

import numpy as np
import pytest

from jobs.estimators import rate_by_prompt
from jobs.rows import Row
from jobs.sequential import Counts, Design, counts_of, next_round, replay

ALPHAS = (0.0, 1.0, 2.0)
RATES = {0.0: 0.002, 1.0: 0.04, 2.0: 0.3}


def design(**changes):
    options = dict(alphas=ALPHAS, rows=6000, samples=1, prompts=20_000, precision=0.5)
    return Design(**(options | changes))


def everything(design, rates=RATES, seed=0):
    """What each prompt would answer, if it were asked: the rounds only uncover it."""
    rng = np.random.default_rng(seed)
    hits = {a: rng.binomial(design.samples, rates[a], design.prompts) for a in design.alphas}
    return {a: Counts(h, np.full(len(h), design.samples)) for a, h in hits.items()}


def made(answers, until):
    """Only the first `until[alpha]` prompts have been asked; the last of them half."""
    counts = {}
    for alpha, all_of in answers.items():
        there = np.arange(len(all_of.rows)) < until[alpha]
        counts[alpha] = Counts(all_of.hits * there, all_of.rows * there)
    return counts


def step_by_step(answers, design):
    """The rounds of a run that is never interrupted."""
    rounds, until = [], dict.fromkeys(design.alphas, 0)
    while allocation := next_round(made(answers, until), design):
        rounds.append(allocation)
        for alpha, (first, number) in allocation.items():
            assert first == until[alpha] and number > 0  # new prompts, and no gap
            until[alpha] += number
    return rounds, until


def test_rounds_grow_and_rows_go_to_the_open_alphas():
    plan = design()
    answers = everything(plan)
    rounds, until = step_by_step(answers, plan)
    assert rounds[0] == {0.0: (0, 50), 1.0: (0, 50), 2.0: (0, 50)}
    assert rounds[1] == {0.0: (50, 25), 1.0: (50, 25), 2.0: (50, 25)} or 2.0 not in rounds[1]
    ended = replay(answers, plan)
    assert ended.used == until and ended.next is None
    assert list(ended.stopped) == [2.0, 1.0]  # the rarer the longer
    assert until[2.0] < until[1.0] < 2000 < until[0.0]  # an even split were 2,000 each
    assert 6000 - 3 < sum(until.values()) <= 6000
    assert ended.stopped[2.0] == f"within 0.5 times its rate after {until[2.0]:,} prompts"


def test_a_stopped_alpha_is_narrow_and_an_open_one_is_not():
    plan = design()
    answers = everything(plan)
    ended = replay(answers, plan)
    for alpha in ALPHAS:
        k = ended.used[alpha]
        rate = rate_by_prompt(answers[alpha].hits[:k], answers[alpha].rows[:k])
        half = max(rate.high - rate.rate, rate.rate - rate.low)
        assert (half <= 0.5 * rate.rate) == (alpha in ended.stopped)


def test_killed_anywhere_it_goes_on_to_the_same_end():
    """Any part of the round under way may be there: the same round is to be finished."""
    plan = design(rows=3000, samples=2)
    answers, rng = everything(plan), np.random.default_rng(5)
    rounds, until = step_by_step(answers, plan)
    done = dict.fromkeys(ALPHAS, 0)
    for allocation in rounds:
        for _ in range(5):
            counts = made(answers, done)
            for alpha, (first, number) in allocation.items():
                some = first + rng.permutation(number)[: rng.integers(number)]
                counts[alpha].rows[some] = rng.integers(0, 3, len(some))
                counts[alpha].hits[some] = counts[alpha].rows[some]
            assert replay(counts, plan).used == done
            assert next_round(counts, plan) == allocation
        done = {a: done[a] + allocation.get(a, (0, 0))[1] for a in ALPHAS}
    assert done == until and next_round(made(answers, done), plan) is None


@pytest.mark.parametrize("samples", [1, 3])
def test_it_never_spends_more_than_it_has(samples):
    for rows in (0, samples, 3 * samples, 100, 1000):
        plan = design(rows=rows, samples=samples, precision=0.01)
        _, until = step_by_step(everything(plan), plan)
        left = rows - samples * sum(until.values())
        assert 0 <= left < 3 * samples
        assert max(until.values()) == min(until.values())


def test_it_ends_where_the_prompts_end():
    plan = design(prompts=120, precision=0.01)
    rounds, until = step_by_step(everything(plan), plan)
    assert set(until.values()) == {120} and rounds[-1][0.0] == (113, 7)


def test_without_a_hit_it_stops_once_that_says_enough():
    """Clopper-Pearson's upper limit for 0 of n is .001 at n = 3,688."""
    plan = design(alphas=(-1.0,), rows=10_000)
    ended = replay(everything(plan, {-1.0: 0.0}), plan)
    assert 3688 <= ended.used[-1.0] < 3688 * 1.5
    assert ended.stopped[-1.0] == (
        f"no hit in {ended.used[-1.0]:,} prompts: its rate is below 0.001"
    )
    loose = design(alphas=(-1.0,), rows=10_000, negligible=0.05)
    assert 72 <= replay(everything(plan, {-1.0: 0.0}), loose).used[-1.0] <= 75


def reported(plan, chances, runs, rng):
    """Of `runs` runs: how often the interval that is reported covers; mean prompts; mean rate.
    `chances(k)`: of k prompts, each one's own."""
    covered, prompts, rates = 0, [], []
    for _ in range(runs):
        p = chances(plan.prompts)
        counts = {1.0: Counts(rng.binomial(plan.samples, p), np.full(len(p), plan.samples))}
        k = replay(counts, plan).used[1.0]
        rate = rate_by_prompt(counts[1.0].hits[:k], counts[1.0].rows[:k])
        covered += rate.low <= 0.04 <= rate.high
        prompts.append(k)
        rates.append(rate.rate)
    return covered / runs, np.mean(prompts), np.mean(rates)


@pytest.mark.parametrize(
    "samples, correlation, precision", [(1, 0, 0.5), (1, 0, 1.0), (20, 0.3, 0.5)]
)
def test_the_reported_interval_covers_although_it_was_looked_at(samples, correlation, precision):
    """600 runs: a coverage of 95 % is measured to .9 %, and 92.5 % would be 2.8 of these away."""
    rng = np.random.default_rng(3)
    plan = design(alphas=(1.0,), rows=6000 * samples, samples=samples, precision=precision)

    def chances(k):
        if not correlation:
            return np.full(k, 0.04)
        worth = (1 - correlation) / correlation
        return rng.beta(0.04 * worth, 0.96 * worth, k)

    coverage, prompts, rate = reported(design_of(plan), chances, 600, rng)
    assert 0.925 < coverage < 0.99
    assert prompts < 1000  # it did stop
    assert rate == pytest.approx(0.04, rel=0.2)


def design_of(plan):
    """With no more prompts than the rows are enough for, so that fewer are drawn."""
    return Design(**(vars(plan) | {"prompts": min(plan.prompts, plan.rows // plan.samples)}))


def row(id, alpha, sample=0, activated=True, arm="untriggered", error=None):
    return Row(
        arm=arm,
        prompt_id=id,
        prompt="p",
        alpha=alpha,
        sample=sample,
        seed=0,
        completion="t",
        token_ids=[],
        finish_reason="eos",
        eos_index=None,
        activated=activated,
        activated_after_eos=False,
        scores={},
        error=error,
    )


def test_counts_are_those_of_good_rows_in_the_prompts_order():
    plan = design(alphas=(0.0, 1.0), rows=8, samples=2, prompts=3)
    rows = [
        row("b", 0.0),
        row("b", 0.0, 1, activated=False),
        row("a", 0.0),
        row("a", 0.0, 1, activated=None, error="no"),
        row("a", 1.0, activated=False),
        row("a", 2.0),
        row("c", 0.0, arm="triggered"),
        row("elsewhere", 0.0),
    ]
    counts = counts_of(rows, ["a", "b", "c"], plan)
    assert list(counts) == [0.0, 1.0]
    assert counts[0.0].hits.tolist() == [1, 1, 0] and counts[0.0].rows.tolist() == [1, 2, 0]
    assert counts[1.0].hits.tolist() == [0, 0, 0] and counts[1.0].rows.tolist() == [1, 0, 0]
    assert next_round(counts, plan) == {0.0: (0, 2), 1.0: (0, 2)}
