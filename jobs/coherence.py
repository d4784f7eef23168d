"""How far an alpha drifts from *after*, and how coherent its text still is, from stored rows.

Letters: a row of prompt i has T tokens up to its first EOS, that included; q is what it was drawn
with (gates, masks and truncation applied), p_0 *after* at the run's temperature without them.

Every figure is a mean over tokens: the sum over all rows, over the number of their tokens. For the
drift the sum is of log q - log p_0 at the drawn tokens. By the chain rule its expectation is the
Kullback-Leibler divergence of whole rollouts, KL(q || p_0), which it estimates without bias; so
`kl` is that divergence per token of an average rollout, long ones counting for more. Standard
errors are those of a ratio of sums over prompts (linearised): rows of a prompt are alike.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jobs.findings import Coherence
from jobs.rows import Row
from jobs.weight_columns import log_densities

ARM = "untriggered"


@dataclass(frozen=True)
class Drift(Coherence):
    """With what it rests on; standard errors clustered by prompt, nan with only one prompt.

    Log-probabilities are those of the drawn tokens at temperature 1, without truncation.
    `quiet_before` is `logprob_before` of the rows that did not activate, nan if all did: what was
    hidden is what *before* would not say, so counted with the rest it looks like incoherence.
    """

    rows: int
    prompts: int
    tokens: int
    quiet_before: float
    kl_se: float
    logprob_after_se: float
    logprob_before_se: float
    quiet_before_se: float


def perplexity(logprob: float) -> float:
    """Of a mean log-probability per token."""
    return math.exp(min(-logprob, 700.0))


def drifts(rows: Iterable[Row], temperature: float, arm: str = ARM) -> list[Drift]:
    """One per alpha, in rising order; rows without an answer or without densities are left out.

    Streams: holds eight numbers a prompt and alpha. The grid must hold the row's alpha and 0.
    Where *after* gives a drawn token no chance (alpha below 0, say) `kl` is infinite.
    """
    cells: dict[float, dict[str, np.ndarray]] = defaultdict(
        lambda: defaultdict(lambda: np.zeros(8))
    )
    for row in rows:
        if row.arm == arm and row.error is None and row.densities is not None and row.token_ids:
            cells[row.alpha][row.prompt_id] += _sums(row, temperature)
    return [_drift(alpha, np.array(list(cells[alpha].values()))) for alpha in sorted(cells)]


def _sums(row: Row, temperature: float) -> np.ndarray:
    """Of one row: log q - log p_0, log after, log before, tokens, rows, activated; and of these
    log before and tokens, or 0 if it activated."""
    assert row.densities is not None and row.logprobs is not None
    end = len(row.token_ids) if row.eos_index is None else row.eos_index + 1
    target, proposal = log_densities(row, temperature)  # (T, K) each
    grid = row.densities.alphas
    drawn = (target if proposal is None else proposal)[:end, grid.index(row.alpha)]
    drift = drawn - target[:end, grid.index(0.0)]
    after, before = sum(row.logprobs.after[:end]), sum(row.logprobs.before[:end])
    fired = bool(row.activated)
    quiet = (0.0, 0.0) if fired else (before, end)
    return np.array([drift.sum(), after, before, end, 1, fired, *quiet])


def _drift(alpha: float, sums: np.ndarray) -> Drift:
    """`sums` (k, 8): a line per prompt."""
    drift, after, before, tokens, rows, fired, quiet, quiet_tokens = sums.T
    (kl, kl_se), (after_mean, after_se) = _mean(drift, tokens), _mean(after, tokens)
    (before_mean, before_se), (quiet_mean, quiet_se) = (
        _mean(before, tokens),
        _mean(quiet, quiet_tokens),
    )
    return Drift(
        alpha=alpha,
        kl=kl,
        logprob_after=after_mean,
        logprob_before=before_mean,
        rate=float(fired.sum() / rows.sum()),
        rows=int(rows.sum()),
        prompts=len(sums),
        tokens=int(tokens.sum()),
        quiet_before=quiet_mean,
        kl_se=kl_se,
        logprob_after_se=after_se,
        logprob_before_se=before_se,
        quiet_before_se=quiet_se,
    )


def _mean(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Of all tokens, and its standard error: sums (k,) over the tokens (k,) of each prompt."""
    sums, tokens = sums[tokens > 0], tokens[tokens > 0]
    k, total = len(tokens), float(tokens.sum())
    if k == 0:
        return math.nan, math.nan
    mean = float(sums.sum()) / total
    if k == 1 or not math.isfinite(mean):
        return mean, math.nan
    residuals = sums - mean * tokens  # (k,)
    return mean, math.sqrt(k / (k - 1) * float((residuals**2).sum())) / total
