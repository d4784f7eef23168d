"""The rate at alpha 0 from how it rises with alpha: a cross-check that needs no densities.

A curve is fitted to logit(rate) over the alphas above 0 and followed down to 0. Its limits say
what the counts leave open, not whether the curve is right: nothing bounds what a rate does between
the lowest alpha and 0, so it corroborates the other estimates and never replaces them.

Letters: k prompts, J alphas above 0, y (k, J) hits of m (k, J) rows, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jobs.estimators import CONFIDENCE

_RESAMPLES = 1000
_NEWTON_STEPS = 30
_RIDGE = 1e-6  # keeps a fit finite where a resample has no hit at some alpha
_STEEPEST = 30.0  # of logits: below, a rate is 0


@dataclass(frozen=True)
class Extrapolation:
    """The rate at alpha 0, its 95 % limits, and how far beyond the data it is read off."""

    rate: float
    low: float
    high: float
    shape: str  # "line" or "curve"
    note: str


def extrapolate(alphas: ArrayLike, hits: ArrayLike, rows: ArrayLike) -> Extrapolation | None:
    """From y (k, J) hits of m (k, J) rows of each prompt at each alpha > 0.

    A binomial fit: a straight line through two alphas; through more, a quadratic that does not
    fall between 0 and the highest alpha. Limits by bootstrap over prompts, which needs no word on
    how alike a prompt's rows are. None unless two alphas above 0 have hits.
    Raises ValueError for an alpha that is not above 0.
    """
    a, y, m = (np.asarray(x, dtype=float) for x in (alphas, hits, rows))
    if (a <= 0).any():
        raise ValueError(f"needs alphas above 0, not {a.tolist()}")
    sampled = m.sum(axis=0) > 0
    a, y, m = a[sampled], y[:, sampled], m[:, sampled]
    if (y.sum(axis=0) > 0).sum() < 2:
        return None
    some = (y.sum(axis=1) > 0).nonzero()[0]
    rate = float(at_zero(a, y.sum(axis=0)[None], m.sum(axis=0)[None])[0])
    rng, k = np.random.default_rng(0), len(y)
    counts = rng.multinomial(k, np.full(k, 1 / k), size=_RESAMPLES)  # (R, k)
    rates = at_zero(a, counts[:, some] @ y[some], counts @ m)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    shape = "line" if len(a) == 2 else "curve"
    note = (
        f"a {shape} through alpha {', '.join(f'{x:g}' for x in a)}, read off {a.min():g} below the "
        f"lowest; the limits are the counts', not the {shape}'s"
    )
    return Extrapolation(rate, float(low), float(high), shape, note)


def at_zero(alphas: np.ndarray, hits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(R,): the rate at alpha 0 for each of R sets of hits and rows (R, J), by likelihood.

    The quadratic is logit = c + s_0 (a - a^2 / 2A) + s_1 a^2 / 2A with the slopes s_0 at 0 and s_1
    at the highest alpha A; where one comes out negative the fit is made again without it, and where
    the other then does, without both.
    """
    top = alphas.max()
    ones, bend = np.ones_like(alphas), alphas**2 / (2 * top)
    if len(alphas) == 2:
        return np.asarray(special.expit(_fit(np.stack([ones, alphas], 1), hits, rows)[:, 0]))
    design = np.stack([ones, alphas - bend, bend], axis=1)  # (J, 3)
    found = _fit(design, hits, rows)  # (R, 3)
    for slope in (1, 2):
        falls = found[:, slope] < 0
        if falls.any():
            others = [0, 3 - slope]
            again = np.zeros((int(falls.sum()), 3))
            again[:, others] = _fit(design[:, others], hits[falls], rows[falls])
            flat = again[:, others[1]] < 0
            again[flat] = 0.0
            again[flat, 0] = _fit(design[:, :1], hits[falls][flat], rows[falls][flat])[:, 0]
            found[falls] = again
    return np.asarray(special.expit(found[:, 0]))


def _fit(design: np.ndarray, hits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(R, P): logistic regression of each set by Newton's method, design (J, P)."""
    size = design.shape[1]
    start = special.logit((hits.sum(1) + 0.5) / (rows.sum(1) + 1))
    found = np.zeros((len(hits), size))
    found[:, 0] = start
    for _ in range(_NEWTON_STEPS):
        rates = special.expit(np.clip(found @ design.T, -_STEEPEST, _STEEPEST))  # (R, J)
        slope = (hits - rows * rates) @ design - _RIDGE * found
        weight = rows * rates * (1 - rates)  # (R, J)
        curve = np.einsum("rj,jp,jq->rpq", weight, design, design) + _RIDGE * np.eye(size)
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        found = np.clip(found + np.clip(step, -2, 2), -_STEEPEST, _STEEPEST)
    return found
