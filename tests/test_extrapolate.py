"""The rate at alpha 0 read off the rates above it."""

import numpy as np
import pytest
from scipy import special, stats

from jobs.extrapolate import at_zero, extrapolate


def rates_of(intercept, slope, bend, alphas):
    a = np.asarray(alphas)
    return special.expit(intercept + slope * a + bend * a**2)


def test_a_line_through_two_alphas_goes_through_both():
    hits, rows = np.array([[20.0, 80.0]]), np.array([[1000.0, 1000.0]])
    low, high = special.logit([0.02, 0.08])
    expected = special.expit(low - (high - low))  # alphas 1 and 2
    assert at_zero(np.array([1.0, 2.0]), hits, rows)[0] == pytest.approx(expected, rel=1e-4)


def test_a_curve_through_three_alphas_finds_its_own_zero():
    alphas = np.array([0.5, 1.0, 2.0])
    rates = rates_of(-6.0, 2.5, -0.4, alphas)
    found = at_zero(alphas, 1e6 * rates[None], np.full((1, 3), 1e6))
    assert found[0] == pytest.approx(special.expit(-6.0), rel=1e-3)


def test_the_fit_is_the_likelihoods_maximum():
    """Beside scipy's optimiser, on counts that no such curve goes through."""
    from scipy.optimize import minimize

    alphas, hits = np.array([0.5, 1.0, 1.5, 2.0]), np.array([6.0, 9.0, 40.0, 60.0])
    rows = np.full(4, 500.0)

    def minus_log_likelihood(x):
        return -stats.binom.logpmf(hits, rows, rates_of(*x, alphas)).sum()

    best = minimize(minus_log_likelihood, [-4, 1, 0], method="Nelder-Mead", tol=1e-12).x
    assert best[1] > 0 and best[1] + 4 * best[2] > 0  # no constraint is active
    assert at_zero(alphas, hits[None], rows[None])[0] == pytest.approx(
        special.expit(best[0]), rel=1e-3
    )


@pytest.mark.parametrize("hits", [[30, 20, 60], [20, 60, 30]])
def test_no_curve_falls(hits):
    """One bends down at the low end, one at the high: the fit is flat there instead."""
    alphas, rows = np.array([0.5, 1.0, 2.0]), np.full((1, 3), 1000.0)
    rate = at_zero(alphas, np.array([hits], dtype=float), rows)[0]
    assert 0 < rate <= hits[0] / 1000 * 1.2


def test_rates_that_fall_throughout_give_their_mean():
    alphas, rows = np.array([0.5, 1.0, 2.0]), np.full((1, 3), 1000.0)
    assert at_zero(alphas, np.array([[60.0, 30, 15]]), rows)[0] == pytest.approx(0.035, rel=1e-3)


def test_extrapolation_covers_where_the_curve_is_right():
    rng, alphas, truth = np.random.default_rng(0), np.array([0.5, 1.0, 2.0]), special.expit(-5.0)
    rates, covered = rates_of(-5.0, 2.0, -0.3, alphas), 0
    for _ in range(60):
        odds = rng.gamma(3, 1 / 3, (300, 1))  # prompts differ
        hits = rng.binomial(4, np.clip(rates * odds, 0, 1))
        found = extrapolate(alphas, hits, np.full((300, 3), 4))
        assert found is not None and found.shape == "curve"
        covered += found.low <= truth <= found.high
    assert covered >= 53  # 57 expected; fewer than 53 once in a hundred


def test_it_says_how_far_it_reaches():
    found = extrapolate([1, 2], [[3, 9], [2, 8]], [[20, 20], [20, 20]])
    assert found is not None and "read off 1 below the lowest" in found.note
    assert found.shape == "line" and found.low <= found.rate <= found.high


@pytest.mark.parametrize("hits", [[[0, 0], [0, 0]], [[0, 3], [0, 2]]])
def test_fewer_than_two_alphas_with_hits_say_nothing(hits):
    assert extrapolate([1, 2], hits, [[20, 20], [20, 20]]) is None


def test_an_alpha_that_was_not_sampled_is_left_out():
    hits, rows = [[3, 0, 9], [2, 0, 8]], [[20, 0, 20], [20, 0, 20]]
    found = extrapolate([1, 1.5, 2], hits, rows)
    assert found == extrapolate([1, 2], [[3, 9], [2, 8]], [[20, 20], [20, 20]])


def test_alpha_0_is_what_is_sought_and_not_an_input():
    with pytest.raises(ValueError, match="above 0"):
        extrapolate([0, 1], [[1, 2]], [[9, 9]])
