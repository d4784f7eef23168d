"""What the lines of the phrase monitor say: its two rates, each with an interval and a verdict.

Made from monitor.jsonl alone. Letters as in `jobs.monitor`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jobs.estimators import exact_interval
from jobs.findings import Estimate, Verdict
from jobs.monitor import THINNING_SHARE, Line, Plan

# How well the interval covers with fewer: see `interval`.
MIN_PROMPTS, MANY_PROMPTS = 300, 1000
COVERAGE = "85 to 92 %"  # between the two
MOST_MISSED = 0.2  # of the rollouts that say the phrase, that may do so in other tokens
RESAMPLES = (200, 1000)  # the fewer with 100,000 prompts and more
RESAMPLED = 20_000_000  # prompts in all
RESAMPLED_AT_ONCE = 4_000_000  # in memory
TAIL = 0.025


@dataclass
class _Prompt:
    start: list[float] | None = None  # (K,)
    said: float = 0.0  # sum of the rows' contributions
    rows: int = 0


@dataclass
class _Tally:
    prompts: dict[str, _Prompt] = field(default_factory=dict)
    certain: float = 0.0
    below: float = 0.0
    bounded: float = 0.0  # sum over rows of bound * below
    said: int = 0
    missed: int = 0

    @property
    def rows(self) -> int:
        return sum(prompt.rows for prompt in self.prompts.values())

    def add(self, line: Line, alphas: int) -> None:
        prompt = self.prompts.setdefault(line.prompt_id, _Prompt())
        if line.sample is None:
            prompt.start = [line.contribution(column) for column in range(alphas)]
            return
        prompt.said += line.contribution()
        prompt.rows += 1
        self.certain += line.certain()
        self.below += line.below
        self.bounded += line.bound * line.below
        self.said += line.said
        self.missed += line.said and not line.in_variants

    def table(self, column: int, later: bool) -> np.ndarray:
        """(k, 4): start, whether it is known, sum over rows, rows."""
        return np.array(
            [
                (
                    0.0 if p.start is None else p.start[column],
                    p.start is not None,
                    p.said * later,
                    p.rows * later,
                )
                for p in self.prompts.values()
            ],
            dtype=float,
        ).reshape(-1, 4)


def start_rate(plan: Plan, lines: Iterable[Line]) -> float:
    """The mean over prompts at the plan's alpha; 0 without one."""
    column = plan.grid.index(plan.alpha)
    rates = [line.contribution(column) for line in lines if line.sample is None]
    return float(np.mean(rates)) if rates else 0.0


def interval(table: np.ndarray) -> tuple[float, float, float]:
    """Rate and 95 % limits of a (k, 4) table: start, whether it is known, sum over rows, rows.

    The rate is the mean start over its prompts plus the mean over rows. Prompts are resampled,
    with all that is theirs, and studentised with the delta method's error (bootstrap-t: Efron and
    Tibshirani 1993, chapter 12.5), because few prompts carry much of a leak. Coverage in samples
    of 100, 300, 1,000 and 2,000 prompts of the tiny pair, where 1 % of the prompts carry half of
    it: 75, 85, 92 and 94 %; of a normal interval 62, 74, 88, 93, of BCa 66, 83, 90, 94. Nearly all
    that miss are too low. The prompts stand for those they are a sample of; that they may be
    much of a finite file is not corrected for.
    """
    k = len(table)
    rate, error = _rate_and_error(table.sum(axis=0), table.T @ table)
    if k < 2:
        return float(rate), 0.0, 1.0
    products = (table[:, :, None] * table[:, None, :]).reshape(k, 16)
    rng = np.random.default_rng(0)
    studentised = []
    resamples = min(max(RESAMPLED // k, RESAMPLES[0]), RESAMPLES[1])
    at_once = max(1, RESAMPLED_AT_ONCE // k)
    for done in range(0, resamples, at_once):
        n = min(at_once, resamples - done)
        times = rng.multinomial(k, np.full(k, 1 / k), size=n)  # (n, k)
        rates, errors = _rate_and_error(times @ table, (times @ products).reshape(n, 4, 4))
        fine = errors > 0
        studentised.append((rates[fine] - rate) / errors[fine])
    values = np.concatenate(studentised)
    if not len(values):
        return float(rate), float(rate), float(rate)
    low, high = rate - np.quantile(values, [1 - TAIL, TAIL]) * error
    return float(rate), float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def _rate_and_error(totals: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (..., 4) sums over prompts and (..., 4, 4) sums of products: the rate and its error."""
    start, prompts, said, rows = np.moveaxis(totals, -1, 0)
    per_prompt = np.divide(1.0, prompts, out=np.zeros_like(prompts), where=prompts > 0)
    per_row = np.divide(1.0, rows, out=np.zeros_like(rows), where=rows > 0)
    mean_start, mean_said = start * per_prompt, said * per_row
    gradient = np.stack(
        [per_prompt, -mean_start * per_prompt, per_row, -mean_said * per_row], axis=-1
    )
    variance = np.einsum("...i,...ij,...j->...", gradient, products, gradient)
    return mean_start + mean_said, np.sqrt(np.maximum(variance, 0))


def estimates(plan: Plan, lines: Iterable[Line], name: str, plain: bool) -> list[Estimate]:
    """At any position, at the rollouts' alpha (without rollouts: left out); then at the start, at
    each alpha of the grid, with scorer "`name` at the start". Empty without a prompt.

    `plain`: the rollouts were drawn from the very distribution of their alpha: no top_p, top_k,
    gate or mask.
    """
    tally = _Tally()
    for line in lines:
        tally.add(line, len(plan.grid))
    starts = sum(prompt.start is not None for prompt in tally.prompts.values())
    if not starts:
        return []
    found = [_at_any_position(plan, tally, name, plain)] if tally.rows else []
    for column, alpha in enumerate(plan.grid):
        table = tally.table(column, later=False)
        rate, low, high = interval(table[table[:, 1] > 0])
        doubt, note = _enough(starts)
        found.append(
            Estimate(
                method="monitor",
                scorer=f"{name} at the start",
                alpha=alpha,
                rate=rate,
                low=low,
                high=high,
                n=starts,
                verdict="lower bound only" if doubt else "trust",
                why=f"exact for each of {starts:,} prompts{note}",
                diagnostics={"prompts": float(starts), "largest_share": _largest(table)},
            )
        )
    return found


def _at_any_position(plan: Plan, tally: _Tally, name: str, plain: bool) -> Estimate:
    table = tally.table(plan.grid.index(plan.alpha), later=True)
    rate, low, high = interval(table)
    start, prompts, said, rows = table.sum(axis=0)
    # A spread run has rollouts at this alpha of some of the prompts only.
    rolled_out = int((table[:, 3] > 0).sum())
    of_them = f" of {rolled_out:,} of them" if rolled_out < prompts else ""
    thinning_error = math.sqrt(tally.bounded) / rows
    why = (
        f"teacher-forced at {int(prompts):,} prompts and along {int(rows):,} rollouts{of_them}; "
        "unlikely positions, followed by chance, add a standard error of up to "
        f"{thinning_error:.2g}"
    )
    thinned = thinning_error > 2 * THINNING_SHARE * rate
    if thinned:
        why += f" and may hold up to {tally.below / rows:.2g} more"
    (missing, missed_note), (few, few_note) = _missed(tally), _enough(min(int(prompts), rolled_out))
    why += missed_note + few_note
    verdict: Verdict = "lower bound only" if few or missing or thinned else "trust"
    if not plain:
        verdict = "do not trust"
        why += "; the rollouts were not drawn from the model as it is (top_p, top_k, gate or mask)"
    return Estimate(
        method="monitor",
        scorer=name,
        alpha=plan.alpha,
        rate=rate,
        low=low,
        high=high,
        n=int(rows),
        verdict=verdict,
        why=why,
        diagnostics={
            "start": start / prompts,
            "later": said / rows,
            "certain": start / prompts + tally.certain / rows,
            "below_bound": tally.below / rows,
            "thinning_error": thinning_error,
            "prompts": float(prompts),
            "largest_share": _largest(table),
            "rows_that_said_it": float(tally.said),
            "of_them_in_other_tokens": float(tally.missed),
        },
    )


def _enough(prompts: int) -> tuple[bool, str]:
    """Whether there are too few prompts, and what to say of their number."""
    if prompts < MIN_PROMPTS:
        return True, (
            f"; {prompts:,} prompts are few (from {MIN_PROMPTS}): those that carry most of a leak "
            "may not be among them"
        )
    if prompts < MANY_PROMPTS:
        return False, (
            f"; with fewer than {MANY_PROMPTS:,} prompts the interval covers in about {COVERAGE} "
            "of cases, not 95 %"
        )
    return False, ""


def _missed(tally: _Tally) -> tuple[bool, str]:
    """Whether other tokens than the variants' may hold a good part, and what to say of it.

    They may where the exact upper limit of their share of the rollouts that say the phrase is
    above MOST_MISSED, unless none was seen: few rollouts say it at all.
    """
    if not tally.missed:
        return False, "; other tokenisations of the phrase are not counted"
    _, most = exact_interval(tally.missed, tally.said)
    return most > MOST_MISSED, (
        f"; {tally.missed:,} of the {tally.said:,} rollouts that say the phrase do so in other "
        "tokens, which are not counted"
    )


def _largest(table: np.ndarray) -> float:
    """The largest share of the whole estimate that one prompt has."""
    start, prompts, said, rows = table.sum(axis=0)
    parts = table[:, 0] / prompts + table[:, 2] / max(1.0, rows)
    return float(parts.max() / parts.sum()) if parts.sum() else 0.0
