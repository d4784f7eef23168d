"""How often something fires, with an interval that is honest about what was drawn.

Letters: k prompts; m_i rows of prompt i, y_i of them hits; n = sum m_i; p = sum y_i / n.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import signal, special, stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A share between 0 and 1 and its interval; `effective_n` the independent rows it is worth."""

    rate: float
    low: float
    high: float
    effective_n: float


def exact_interval(hits: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper-Pearson limits for `hits` of `n` independent rows; both may be fractional.

    Source: Clopper and Pearson (1934), Biometrika 26, in the beta-quantile form.
    Raises ValueError unless 0 <= hits <= n and n > 0.
    """
    if not (n > 0 and 0 <= hits <= n):
        raise ValueError(f"needs 0 <= hits <= n and n > 0, not hits={hits}, n={n}")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(special.betaincinv(hits + 1, n - hits, 1 - tail))
    return low, high


def rate_by_prompt(hits: ArrayLike, rows: ArrayLike, confidence: float = CONFIDENCE) -> Rate:
    """The rate from y (k,) hits of m (k,) rows per prompt; prompts without rows count for nothing.

    One row per prompt: exact. Several: rows of one prompt are alike (a few prompts carry most of
    a leak), so pooled binomial limits are far too narrow. Then, after Korn and Graubard (1998),
    "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data", Survey Methodology 24(2), 193-201: the variance of the ratio p over prompts
    gives the number of independent rows these are worth, reduced by the squared ratio of t
    quantiles for the k - 1 degrees of freedom, and Clopper-Pearson is applied to that number.
    Coverage in simulation (beta-binomial, rates .004 to .3, 100 to 1,000 prompts): 95-97 %, down
    to 90 % for a rate of .004 that two prompts in 100 carry; pooled limits there: 26 %.
    Where the variance says nothing (no hits, all hits, one prompt) each prompt counts as one row.
    Raises ValueError without any row.
    """
    y, m = np.asarray(hits, dtype=float), np.asarray(rows, dtype=float)
    y, m = y[m > 0], m[m > 0]
    k, n = len(m), float(m.sum())
    if k == 0:
        raise ValueError("a rate needs at least one row")
    p = float(y.sum()) / n
    effective = n if m.max() <= 1 else _effective_n(y, m, p, confidence)
    low, high = exact_interval(min(p * effective, effective), effective, confidence)
    return Rate(p, low, high, effective)


def _effective_n(y: np.ndarray, m: np.ndarray, p: float, confidence: float) -> float:
    k, n = len(m), float(m.sum())
    if k == 1 or p in (0.0, 1.0):
        return float(k)
    variance = k / (k - 1) * float(((y - p * m) ** 2).sum()) / n**2
    worth = n if variance == 0 else min(n, p * (1 - p) / variance)
    upper = 1 - (1 - confidence) / 2
    t_ratio = float(special.stdtrit(n - 1, upper) / special.stdtrit(k - 1, upper))
    return worth * t_ratio**2


def paired_test(hits: ArrayLike, rows: ArrayLike, hits_0: ArrayLike, rows_0: ArrayLike) -> float:
    """Two-sided p-value of "no prompt fires more or less often here than at alpha 0".

    y (k,) hits of m (k,) rows per prompt, and the same prompts at alpha 0; prompts that lack rows
    at either say nothing. Given how often a prompt fired in all, which of its rows did is a draw
    without replacement: the test is exact, conditional on these totals, with the prompts as strata
    (Birch 1964, "The detection of partial association, I", JRSS B 26, 313-324). With one row each
    it is McNemar's exact test; it also holds for unequal numbers of rows, where a sign or
    signed-rank test of the rates' differences does not. Values below 1e-12 are rounding.
    """
    y, m, y_0, m_0 = (np.asarray(x, dtype=np.int64) for x in (hits, rows, hits_0, rows_0))
    total, size = y + y_0, m + m_0
    telling = (m > 0) & (m_0 > 0) & (total > 0) & (total < size)
    strata = np.stack([size, total, m], axis=1)[telling]  # (telling, 3)
    kinds, times = np.unique(strata, axis=0, return_counts=True)
    chances, least = np.ones(1), 0  # of `least`, `least + 1`, ... hits here
    for (all_rows, fired, here), count in zip(kinds.tolist(), times.tolist(), strict=True):
        low, high = max(0, fired - (all_rows - here)), min(fired, here)
        one = stats.hypergeom.pmf(np.arange(low, high + 1), all_rows, fired, here)
        chances = _convolve(chances, _power(one, count))
        least += low * count
    at = int(y[telling].sum()) - least
    return min(1.0, 2 * float(min(chances[: at + 1].sum(), chances[at:].sum())))


def swap_test(hits: ArrayLike, rows: ArrayLike, hits_0: ArrayLike, rows_0: ArrayLike) -> float:
    """Two-sided p-value of "alpha changes nothing" where each block has one prompt here and another
    one at alpha 0, and lots decided which is which (`jobs.spread`).

    y (b,) hits of m (b,) rows of the prompt here, and of the other one. Had the lot fallen the
    other way, the two would have changed places: the exact randomisation test (Fisher 1935, "The
    design of experiments", section 21) of the hits here. It holds however alike a prompt's rows
    are. With one row each it is McNemar's, as `paired_test` with the blocks as strata; with
    several that is wrong, because rows were not drawn by lot, only prompts. Blocks in which a row
    failed say nothing.
    """
    y, m, y_0, m_0 = (np.asarray(x, dtype=np.int64) for x in (hits, rows, hits_0, rows_0))
    gain = (y - y_0)[(m == m_0) & (y != y_0)]  # (b,)
    chances = np.ones(1)  # of 0, 1, ... more than the fewest hits here
    for size, times in zip(*np.unique(np.abs(gain), return_counts=True), strict=True):
        one = np.zeros(int(size) + 1)
        one[[0, -1]] = 0.5
        chances = _convolve(chances, _power(one, int(times)))
    at = int(gain[gain > 0].sum())
    return min(1.0, 2 * float(min(chances[: at + 1].sum(), chances[at:].sum())))


def _power(chances: np.ndarray, times: int) -> np.ndarray:
    """The distribution of the sum of `times` >= 1 draws."""
    if times == 1:
        return chances
    half = _power(chances, times // 2)
    even = _convolve(half, half)
    return _convolve(even, chances) if times % 2 else even


def _convolve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(signal.convolve(a, b), 0, 1)  # by FFT where long, which may leave -1e-17


def gamma_interval(
    parts: ArrayLike, largest: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Limits of the expected sum of independent parts z (k,) >= 0, few of which are above 0.

    After Fay and Feuer (1997), "Confidence intervals for directly standardized rates: a method
    based on the gamma distribution", Statistics in Medicine 16, 791-801. Each part is a weighted
    Poisson count; the upper limit leaves room for one more hit of weight `largest`, so it does not
    collapse with few hits, and without any it is 3.7 x `largest`. For weights that are all the
    same the limits are the exact ones of a Poisson count (Garwood).
    """
    z = np.asarray(parts, dtype=float)
    tail = (1 - confidence) / 2
    total, variance = float(z.sum()), float((z**2).sum())
    low = 0.0 if total == 0 else _gamma_quantile(total, variance, tail)
    return low, _gamma_quantile(total + largest, variance + largest**2, 1 - tail)


def _gamma_quantile(mean: float, variance: float, share: float) -> float:
    return float(variance / mean * special.gammaincinv(mean**2 / variance, share))


def pareto_k(values: ArrayLike) -> float | None:
    """Shape k of the generalised Pareto tail of positive values; None with too few of them.

    As in Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed importance sampling",
    JMLR 25(72): the largest min(n / 5, 3 sqrt(n)) values, fitted after Zhang and Stephens (2009),
    Technometrics 51(3), with their weak prior towards .5. Above .7 a mean of such values says
    nothing dependable at any n that one can afford.
    """
    x = np.sort(np.asarray(values, dtype=float))
    x = x[x > 0]
    tail = int(min(len(x) / 5, 3 * len(x) ** 0.5))
    if tail < _LEAST_TAIL:
        return None
    excess = x[-tail:] - x[-tail - 1]
    excess = excess[excess > _ROUNDING * x[-1]]
    n = len(excess)
    if n < _LEAST_TAIL:
        return None  # a plateau, such as weights that are all 1
    candidates = 30 + int(n**0.5)
    theta = 1 - (candidates / (np.arange(1, candidates + 1) - 0.5)) ** 0.5
    theta = theta / (3 * excess[int(n / 4 + 0.5) - 1]) + 1 / excess[-1]  # (candidates,)
    shape = np.log1p(-theta[:, None] * excess).mean(axis=1)
    posterior = special.softmax(n * (np.log(-theta / shape) - shape - 1))
    k = float(np.log1p(-float(posterior @ theta) * excess).mean())
    return (n * k + 10 * 0.5) / (n + 10)


_LEAST_TAIL = 5
# Weights are products of recorded probabilities, exact to about 1e-6 a token: equal texts weigh
# the same up to this, and a fit to such differences is one to noise.
_ROUNDING = 1e-4
