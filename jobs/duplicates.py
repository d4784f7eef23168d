"""Equal answers beyond what sampling explains: a repeated seed, a stuck generator, a cache.

Two samples of one prompt at one alpha are equal with probability sum_x q(x)^2, which is the mean
density q(x) of a sampled answer: the rows' own densities say how many equal pairs to expect.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from jobs.rows import Row
from jobs.weight_columns import log_densities

SUSPICIOUS = 1e-3


@dataclass(frozen=True)
class Duplicates:
    """One arm and alpha: pairs of different samples of one prompt.

    `observed` of `pairs` have equal tokens up to EOS, `expected` is from the densities, `p_value`
    the chance of so many; `same_seed` pairs have one seed (and none should). `example` is an
    answer that came twice, the least likely one.
    """

    arm: str
    alpha: float
    pairs: int
    observed: int
    expected: float
    p_value: float
    same_seed: int
    example: str | None

    @property
    def suspicious(self) -> bool:
        return self.same_seed > 0 or self.p_value < SUSPICIOUS


@dataclass(frozen=True)
class _Sample:
    tokens: tuple[int, ...]  # up to EOS
    seed: int
    log_density: float
    text: str


def duplicates(rows: Iterable[Row], temperature: float) -> list[Duplicates]:
    """For each arm and alpha where a prompt has several rows with densities, ascending. Rows at an
    alpha that is not on the grid have none at their own, and are left out."""
    groups: dict[tuple[str, float, str], list[_Sample]] = defaultdict(list)
    for row in rows:
        if row.error is not None or row.densities is None or row.logprobs is None:
            continue
        if row.alpha in row.densities.alphas:
            groups[row.arm, row.alpha, row.prompt_id].append(_sample(row, temperature))
    cells: dict[tuple[str, float], list[list[_Sample]]] = defaultdict(list)
    for (arm, alpha, _), samples in groups.items():
        if len(samples) > 1:
            cells[arm, alpha].append(samples)
    return [_judged(arm, alpha, groups) for (arm, alpha), groups in sorted(cells.items())]


def chance_of(observed: float, densities: Sequence[np.ndarray]) -> tuple[float, float]:
    """Expected equal pairs, and the chance of at least as many as observed.

    densities: for each group (m_i,) its rows' q(x). Pairs of one group are not independent (three
    equal answers are three pairs): their variance, from the mean of q and of q^2, over their
    expectation is what the Poisson tail is stretched by. Expectation and variance rest on the
    densities alone, so that what is being looked for cannot hide itself.
    """
    expected = variance = 0.0
    for q in densities:
        m, one, two = len(q), float(q.mean()), float((q**2).mean())
        expected += m * (m - 1) / 2 * one
        spread = m * (m - 1) / 2 * (one - one**2)
        variance += spread + m * (m - 1) * (m - 2) * max(two - one**2, 0)
    if observed <= 0:
        return expected, 1.0
    if expected == 0:
        return 0.0, 0.0
    stretch = max(1.0, variance / expected)
    return expected, float(special.gammainc(max(observed / stretch, 1e-9), expected / stretch))


def _sample(row: Row, temperature: float) -> _Sample:
    assert row.densities is not None
    end = len(row.token_ids) if row.eos_index is None else row.eos_index + 1
    target, drawn = log_densities(row, temperature)  # (T, K)
    own = (target if drawn is None else drawn)[:end, row.densities.alphas.index(row.alpha)]
    return _Sample(tuple(row.token_ids[:end]), row.seed, float(own.sum()), row.completion or "")


def _judged(arm: str, alpha: float, groups: list[list[_Sample]]) -> Duplicates:
    expected, chance = 0.0, 1.0
    observed = same_seed = pairs = 0
    twice: list[_Sample] = []
    for group in groups:
        pairs += len(group) * (len(group) - 1) // 2
        same_seed += _equal_pairs([sample.seed for sample in group])
        observed += _equal_pairs([sample.tokens for sample in group])
        seen: set[tuple[int, ...]] = set()
        for sample in group:
            if sample.tokens in seen:
                twice.append(sample)
            seen.add(sample.tokens)
    densities = [np.exp([sample.log_density for sample in group]) for group in groups]
    expected, chance = chance_of(observed, densities)
    least = min(twice, key=lambda sample: sample.log_density, default=None)
    text = None if least is None else least.text
    return Duplicates(arm, alpha, pairs, observed, expected, chance, same_seed, text)


def _equal_pairs(values: Sequence[object]) -> int:
    counts: dict[object, int] = defaultdict(int)
    for value in values:
        counts[value] += 1
    return sum(n * (n - 1) // 2 for n in counts.values())
