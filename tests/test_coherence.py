"""Drift and coherence of an alpha, against exact enumeration on a toy and on the tiny pair."""

import math

import numpy as np
import pytest
from toy import Toy

from jobs.coherence import drifts, perplexity

GRID = (0.0, 0.5, 1.0, 2.0)
TOYS = {
    "plain": Toy(seed=1),
    "cool": Toy(seed=2, temperature=0.7),
    "gate": Toy(seed=3, amplify_first=2),
    "mask": Toy(seed=4, plausible=0.2),
    "top_p": Toy(seed=5, top_p=0.8),
}


def rows_of(toy, alpha, n, rng, per_prompt=1):
    return [toy.row(toy.draw(alpha, rng), alpha, GRID, prompt=i // per_prompt) for i in range(n)]


def truth(toy, alpha):
    """Exactly, per token: KL of what is drawn from *after*, log-probability under after, before."""
    kl = after = before = tokens = 0.0
    for answer in toy.answers():
        log_q = toy.log_probability(answer, alpha, drawn=True)
        chance = np.exp(log_q)
        if chance == 0:
            continue
        steps = [(answer[:t], token) for t, token in enumerate(answer)]
        kl += chance * (log_q - toy.log_probability(answer, 0.0))
        after += chance * sum(toy.table(0, b)[t] for b, t in steps)
        before += chance * sum(toy.table(1, b)[t] for b, t in steps)
        tokens += chance * len(answer)
    return kl / tokens, after / tokens, before / tokens


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_drift_is_that_of_whole_rollouts(toy, alpha):
    (found,) = drifts(rows_of(toy, alpha, 1500, np.random.default_rng(7)), toy.temperature)
    kl, after, before = truth(toy, alpha)
    assert found.kl == pytest.approx(kl, abs=4 * found.kl_se + 1e-9)
    assert found.logprob_after == pytest.approx(after, abs=4 * found.logprob_after_se + 1e-9)
    assert found.logprob_before == pytest.approx(before, abs=4 * found.logprob_before_se + 1e-9)
    assert found.kl_se < 0.06 and (alpha == 0 or kl > 2 * found.kl_se)  # it could tell


def test_at_alpha_0_there_is_no_drift():
    (found,) = drifts(rows_of(TOYS["cool"], 0.0, 50, np.random.default_rng(0)), 0.7)
    assert found.kl == found.kl_se == 0


def test_standard_errors_are_those_of_prompts():
    """Over 200 runs the estimates spread by their standard errors, also where the rows of a prompt
    are all the same. The spread of 200 is known to 5 %; the mean of their errors better."""
    toy, rng, runs = TOYS["plain"], np.random.default_rng(1), []
    for _ in range(200):
        distinct = rows_of(toy, 1.0, 60, rng)
        copies = [row.model_copy(update={"sample": i}) for row in distinct for i in range(3)]
        runs += [drifts(distinct, 1.0)[0], drifts(copies, 1.0)[0]]
    assert [r.kl_se for r in runs[::2]] == pytest.approx([r.kl_se for r in runs[1::2]])
    for name in ("kl", "logprob_after", "logprob_before", "quiet_before"):
        spread = np.std([getattr(r, name) for r in runs[::2]], ddof=1)
        error = np.mean([getattr(r, f"{name}_se") for r in runs[::2]])
        assert error == pytest.approx(spread, rel=0.2), name


def test_the_standard_error_of_two_prompts():
    """Of a ratio of sums: both residuals are the same size, and k / (k - 1) is 2."""
    toy = Toy(seed=1)
    rows = [toy.row((0, 0, 0, 0), 1.0, GRID), toy.row((1, 4), 1.0, GRID, prompt=1)]
    (found,) = drifts(rows, 1.0)
    residual = sum(rows[1].logprobs.after) - 2 * found.logprob_after
    assert found.logprob_after_se == pytest.approx(2 * abs(residual) / 6)


def test_means_are_over_the_tokens_up_to_eos():
    toy = Toy(seed=1)
    long, short = toy.row((0, 0, 0, 0), 1.0, GRID), toy.row((1, 4), 1.0, GRID, prompt=1)
    (found,) = drifts([long, short], 1.0)
    assert found.tokens == 6 and found.rows == found.prompts == 2
    logs = [*long.logprobs.before, *short.logprobs.before]
    assert found.logprob_before == pytest.approx(sum(logs) / 6)
    late = long.model_copy(update={"eos_index": 1})
    (cut,) = drifts([late, short], 1.0)
    assert cut.tokens == 4
    assert cut.logprob_before == pytest.approx((sum(logs[:2]) + sum(logs[4:])) / 4)


def test_what_activated_is_left_out_of_the_quiet_rows():
    toy = Toy(seed=1)
    fired, quiet = toy.row((0, 1, 4), 1.0, GRID), toy.row((2, 4), 1.0, GRID, prompt=1)
    assert fired.activated and not quiet.activated
    (found,) = drifts([fired, quiet], 1.0)
    assert found.quiet_before == pytest.approx(sum(quiet.logprobs.before) / 2)
    assert found.rate == 0.5
    (alone,) = drifts([fired], 1.0)
    assert math.isnan(alone.quiet_before) and math.isnan(alone.kl_se)


def test_other_arms_failures_and_rows_without_densities_are_left_out():
    row = Toy(seed=1).row((2, 4), 1.0, GRID)
    others = [
        row.model_copy(update={"arm": "triggered"}),
        row.model_copy(update={"error": "no", "activated": None}),
        row.model_copy(update={"densities": None}),
    ]
    assert drifts(others, 1.0) == []
    assert [d.rows for d in drifts([row, *others], 1.0)] == [1]
    assert [d.alpha for d in drifts([*others, row], 1.0, arm="triggered")] == [1.0]


def test_a_token_that_after_rules_out_drifts_without_end():
    row = Toy(seed=1).row((2, 4), -1.0, (-1.0, 0.0))
    impossible = row.logprobs.model_copy(update={"after": [-1e30, -1.0]})
    (found,) = drifts([row.model_copy(update={"logprobs": impossible})], 1.0)
    assert found.kl == math.inf and math.isfinite(found.logprob_before)


def test_perplexity():
    assert perplexity(-math.log(3)) == pytest.approx(3)
    assert math.isfinite(perplexity(-1e30))
