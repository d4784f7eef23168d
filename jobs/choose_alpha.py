"""`--alphas auto`: alphas that drift from *after* by given targets while the text stays coherent,
read off a pilot at a ladder of alphas on a few prompts.

How much an alpha amplifies depends on the pair: what alpha 1 is to one, 0.3 is to another. The
drift KL(q_alpha || after) per token is comparable; for given contexts it rises with alpha (its
derivative is alpha times the variance of the log-ratio), and it is about quadratic for small ones.
So: isotonic regression of the pilot's drifts, its root interpolated monotonically (PCHIP, Fritsch
and Carlson 1980, SIAM J. Numer. Anal. 17), and solved for each target. No alpha is chosen whose
text *before* finds less likely than at alpha 0 by more than a budget, nor one beyond the pilot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from jobs.coherence import Drift, perplexity
from jobs.errors import Refused

PILOT_ALPHAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
PILOT_PROMPTS = 100
# Nats per token. On the tiny pair they are alpha 0.5, 1 and 2, its useful range.
TARGETS = (0.01, 0.06, 0.4)
# Nats per token that *before* may like the text less than at alpha 0: perplexity 4.5 times higher.
# On the tiny pair alpha 2 loses 1.4, and alpha 3, where the text is visibly damaged, 3.5.
BUDGET = 1.5
MOST_CHOSEN = len(TARGETS) + 1  # one for each target, and -1
APART = 1.15  # alphas nearer to each other than this factor tell the same twice
_STEPS = 4000  # of the pilot's range, in which targets are looked up


@dataclass(frozen=True)
class Choice:
    """`alphas` in rising order, 0 first; `reasons` one for each; `limit` the largest alpha of the
    pilot's range that is within the budget."""

    alphas: tuple[float, ...]
    reasons: tuple[str, ...]
    limit: float


def choose(
    pilot: Sequence[Drift], targets: Sequence[float] = TARGETS, budget: float = BUDGET
) -> Choice:
    """Alphas for these targets, nats per token, rounded down to 2 significant digits.

    Alphas below 0 in the pilot are not looked at. A target beyond the limit is served by the
    limit. Raises Refused unless the pilot has alpha 0 and two alphas above it.
    """
    points = sorted((d for d in pilot if d.alpha >= 0), key=lambda d: d.alpha)
    if len(points) < 3 or points[0].alpha != 0:
        raise Refused("--alphas auto: the pilot needs good rows at alpha 0 and at two above it")
    alphas = np.linspace(0, points[-1].alpha, _STEPS + 1)
    kl = _kl(points, alphas)
    limit = float(alphas[_loss(points, alphas) <= budget][-1])
    within = "the largest within the budget" if limit < alphas[-1] else "the pilot's largest"
    chosen = {0.0: "*after* as it is: counted, and the share that bounds the weights"}
    for target in sorted(targets):
        reached = alphas[kl >= target]
        alpha = min(float(reached[0]) if len(reached) else math.inf, limit)
        why = f"drifts {target:g} nats a token"
        if alpha == limit:
            drift = float(np.interp(limit, alphas, kl))
            why = f"{within}, which drifts {drift:.2g} of {target:g} nats a token"
        alpha = _rounded_down(alpha)
        if alpha > max(chosen) * APART:
            chosen[alpha] = why
    return Choice(tuple(chosen), tuple(chosen.values()), limit)


def choice_table(pilot: Sequence[Drift], choice: Choice) -> Table:
    """Rate against coherence."""
    made = Table(
        title="pilot: rate against coherence",
        caption="chosen: "
        + "; ".join(
            f"alpha {a:g}: {why}" for a, why in zip(choice.alphas, choice.reasons, strict=True)
        ),
    )
    for heading in ("alpha", "rows", "activated %", "drift", "±", "perplexity before", "budget"):
        made.add_column(heading, justify="right")
    for d in sorted((d for d in pilot if d.alpha >= 0), key=lambda d: d.alpha):
        made.add_row(
            f"{d.alpha:g}",
            f"{d.rows:,}",
            "-" if d.rate is None else f"{100 * d.rate:.1f}",
            f"{d.kl:.4f}",
            f"{d.kl_se:.4f}",
            f"{perplexity(_text(d)):.2f}",
            "within" if d.alpha <= choice.limit else "beyond",
        )
    return made


def _text(drift: Drift) -> float:
    """How likely *before* finds the text: of rows that did not activate, if there are any."""
    return drift.logprob_before if math.isnan(drift.quiet_before) else drift.quiet_before


def _kl(points: Sequence[Drift], alphas: np.ndarray) -> np.ndarray:
    """Drift at `alphas`, rising from 0 at alpha 0."""
    fit = _rising([max(0.0, d.kl) if d.alpha > 0 else 0.0 for d in points], points)
    root: np.ndarray = PchipInterpolator([d.alpha for d in points], np.sqrt(fit))(alphas)
    return root**2


def _loss(points: Sequence[Drift], alphas: np.ndarray) -> np.ndarray:
    """Nats per token that *before* likes the text less than at alpha 0, rising."""
    loss = _rising([_text(points[0]) - _text(d) for d in points], points)
    return np.asarray(PchipInterpolator([d.alpha for d in points], loss - loss[0])(alphas))


def _rising(values: Sequence[float], points: Sequence[Drift]) -> np.ndarray:
    fit: np.ndarray = isotonic_regression(values, weights=[d.tokens for d in points]).x
    return fit


def _rounded_down(alpha: float) -> float:
    """To 2 significant digits, so that it stays within the budget."""
    if alpha <= 0:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(alpha)) - 1)
    return float(f"{math.floor(alpha / digit + 1e-9) * digit:.2g}")
