"""How often a known phrase is said, by teacher forcing instead of counting.

Letters: t a position of a rollout, y its tokens; v a variant, one tokenisation of the phrase, of
L_v tokens; q the probability of the variant's first token at t, p that of all its tokens at t,
both given y[:t]; k prompts, K alphas of the grid.

Two figures. **At the start**: the probability that the answer begins with the phrase is p at
t = 0: exact for each prompt, at every alpha, without any sampling. **At any position**: the
phrase's first occurrence begins at exactly one t, so the probability that it occurs is the
expectation, over rollouts, of the sum of p over the positions t that no complete occurrence
precedes, up to EOS and where t + L_v <= max_new_tokens. (Rao-Blackwell: each position's chance in
place of what was drawn there.) A rollout that says the phrase itself counts like any other: its
positions up to the end of the first occurrence, those inside it included. Exact in expectation at
the alpha of the rollouts, for the phrase in these tokenisations; it misses the others.

Following every position would be dear, and q is known from the rollout (`watched`) where p <= q.
So positions with q >= `bound` are followed, and of those below, each is followed with probability
`kept` = q / bound and counts 1 / kept times (Horvitz and Thompson 1952, "A generalization of
sampling without replacement from a finite universe", JASA 47). That is unbiased, and its variance
over a position is at most p^2 / kept <= bound * p: never more than `bound` times what counting
has. What holds without chance is reported beside it: the part followed for certain, and the sum
of q below the bound, which the positions there cannot exceed.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from deployments.schemas import Scored
from jobs.call import seed_of
from jobs.errors import Refused
from jobs.lines import to_line
from jobs.rows import Row

IMPOSSIBLE = -1e30
MAX_BOUND = 0.01  # a tenth of brute force's error, at most
BOUNDS = tuple(MAX_BOUND / 2**i for i in range(24))
THINNING_SHARE = 0.1  # of the estimate, that following by chance may add to its error


class Plan(BaseModel):
    """What is monitored: the first line of monitor.jsonl. `alpha` is that of the rollouts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    phrase: str
    variants: list[list[int]]
    arm: str
    alpha: float
    grid: list[float]
    temperature: float
    max_new_tokens: int
    request: dict[str, Any]  # the run's prompt_format and so on, in the words of a ScoreRequest

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.variants or not all(self.variants):
            raise ValueError("variants must not be empty")
        if self.alpha not in self.grid:
            raise ValueError("grid must hold alpha")
        return self

    def to_line(self) -> bytes:
        return to_line(self.model_dump())

    @property
    def watch(self) -> list[int]:
        """The tokens whose log-probability the rollouts have to record, in this order."""
        return first_tokens(self.variants)


class Line(BaseModel):
    """What is known of one prompt's start (`sample` None), or of one rollout from t = 1 on.

    Of each followed place: position, variant, the chance with which it was followed, and the
    variant's log-probability there, at every alpha of the grid for a start and at the plan's for
    a rollout. `below`: the sum of q over all positions with q < `bound`. `said`: the rollout's
    text has the phrase; `in_variants`: its tokens have a variant.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt_id: str
    sample: int | None
    at: list[int] = []
    variant: list[int] = []
    kept: list[float] = []
    logprobs: list[list[float]] = []
    bound: float = 0.0
    below: float = 0.0
    said: bool = False
    in_variants: bool = False

    def to_line(self) -> bytes:
        return to_line(self.model_dump())

    def contribution(self, column: int = 0) -> float:
        """The sum of p / kept, at one of the alphas."""
        return sum(
            math.exp(p[column]) / kept for p, kept in zip(self.logprobs, self.kept, strict=True)
        )

    def certain(self) -> float:
        """The part of the contribution that no chance had a say in."""
        return sum(
            math.exp(p[0]) for p, kept in zip(self.logprobs, self.kept, strict=True) if kept == 1
        )


def variant_texts(phrase: str) -> list[str]:
    """The phrase as an answer's first text, and within a line: other tokens in most tokenizers."""
    return [phrase, " " + phrase]


def irreducible(variants: Iterable[Sequence[int]]) -> list[list[int]]:
    """Without those that hold another one: where these occur, that one does."""
    kept: list[list[int]] = []
    for variant in sorted(map(list, variants), key=len):
        if not any(first_end(variant, [shorter]) is not None for shorter in kept):
            kept.append(variant)
    return kept


def first_tokens(variants: Sequence[Sequence[int]]) -> list[int]:
    return list(dict.fromkeys(variant[0] for variant in variants))


def first_end(tokens: Sequence[int], variants: Sequence[Sequence[int]]) -> int | None:
    """Where the occurrence that is complete first ends; None without one."""
    for end in range(1, len(tokens) + 1):
        for variant in variants:
            start = end - len(variant)
            if start >= 0 and list(tokens[start:end]) == list(variant):
                return end
    return None


def overlaps(variants: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Per variant v, the beginnings of variants that v, set right after them, would complete.

    There an earlier occurrence begins, and v's is not the first. Empty for most phrases.
    """
    return [
        [
            list(other[:n])
            for other in variants
            for n in range(1, len(other))
            if list(variant[: len(other) - n]) == list(other[n:])
        ]
        for variant in variants
    ]


def log_densities(scored: Scored, temperature: float) -> list[float]:
    """(K,): the log-probability of the whole continuation at each alpha of its grid."""
    after, before = np.array(scored.after)[:, None], np.array(scored.before)[:, None]  # (T, 1)
    alphas = np.array(scored.densities.alphas)
    mixed = ((1 + alphas) * after - alphas * before) / temperature
    total = (mixed - np.array(scored.densities.normalisers)).sum(axis=0)
    if min(after.min(), before.min()) < IMPOSSIBLE / 10:
        total = np.where((alphas == 0) | (alphas == -1), total, IMPOSSIBLE)
    return [float(value) for value in np.maximum(total, IMPOSSIBLE)]


class Places(NamedTuple):
    """Positions and variants of one rollout that may be the first occurrence's; (n,) each."""

    at: np.ndarray
    variant: np.ndarray
    first: np.ndarray  # q


def places(row: Row, plan: Plan) -> Places:
    """From t = 1 on; t = 0 is the prompt's and needs no rollout.

    Raises Refused if the row does not have the first tokens' log-probabilities.
    """
    width = len(plan.watch)
    if row.watched is None or any(len(step) != width for step in row.watched):
        raise Refused(
            f"rows of arm {row.arm}, alpha {row.alpha:g} lack the log-probabilities of the "
            "phrase's first tokens: make them with the monitor's phrase set"
        )
    stop = len(row.token_ids) if row.eos_index is None else row.eos_index + 1
    said = first_end(row.token_ids[:stop], plan.variants)
    t = np.arange(1, stop if said is None else min(stop, said))
    lengths = np.array([len(variant) for variant in plan.variants])
    column = [plan.watch.index(variant[0]) for variant in plan.variants]
    q = np.exp(np.array(row.watched, dtype=float).reshape(-1, width)[t][:, column])  # (t, V)
    open_ = (q > 0) & (t[:, None] + lengths <= plan.max_new_tokens)
    for v, beginnings in enumerate(overlaps(plan.variants)):
        for beginning in beginnings:
            for i, end in enumerate(t.tolist()):
                open_[i, v] &= row.token_ids[max(0, end - len(beginning)) : end] != beginning
    where, variant = np.nonzero(open_)
    return Places(t[where], variant, q[where, variant])


def branches(row: Row, plan: Plan, bound: float) -> Line:
    """The places to follow in one rollout: a Line without its log-probabilities.

    Which of those below the bound are followed is a function of the row's key: the same again.
    """
    found = places(row, plan)
    kept = np.minimum(1.0, found.first / bound) if bound else np.ones(len(found.first))
    chosen = [
        i
        for i, (t, v, share) in enumerate(zip(found.at, found.variant, kept, strict=True))
        if share == 1 or _uniform(row, int(t), plan.variants[v]) < share
    ]
    return Line(
        prompt_id=row.prompt_id,
        sample=row.sample,
        at=found.at[chosen].tolist(),
        variant=found.variant[chosen].tolist(),
        kept=kept[chosen].tolist(),
        bound=bound,
        below=float(found.first[kept < 1].sum()),
        said=plan.phrase in text_before_eos(row),
        in_variants=first_end(row.token_ids[: row.eos_index], plan.variants) is not None,
    )


def _uniform(row: Row, position: int, variant: list[int]) -> float:
    return seed_of("monitor", row.arm, row.prompt_id, row.alpha, row.sample, position, variant) / (
        2.0**52
    )


def text_before_eos(row: Row) -> str:
    text = row.completion or ""
    if row.eos_index is None or row.token_ends is None:
        return text
    return text[: row.token_ends[row.eos_index]]  # EOS itself adds nothing


def start_line(plan: Plan, prompt_id: str) -> Line:
    """Every variant at t = 0 that an answer has room for."""
    fit = [v for v, ids in enumerate(plan.variants) if len(ids) <= plan.max_new_tokens]
    n = len(fit)
    return Line(prompt_id=prompt_id, sample=None, at=[0] * n, variant=fit, kept=[1.0] * n)


def request(plan: Plan, line: Line, prompt: str, tokens: Sequence[int]) -> dict[str, Any]:
    """The ScoreRequest that fills `line` in; `tokens` are the rollout's."""
    return {
        **plan.request,
        "prompt": prompt,
        "continuations": [
            {"token_ids": plan.variants[v], "given": list(tokens[:t])}
            for t, v in zip(line.at, line.variant, strict=True)
        ],
        "grid": plan.grid if line.sample is None else [plan.alpha],
        "temperature": plan.temperature,
    }


def filled(line: Line, scored: Sequence[Scored], temperature: float) -> Line:
    logprobs = [[round(p, 6) for p in log_densities(one, temperature)] for one in scored]
    if len(logprobs) != len(line.at):
        raise ValueError(f"{len(logprobs)} answers for {len(line.at)} continuations")
    return line.model_copy(update={"logprobs": logprobs})


def choose_bound(plan: Plan, rows: Iterable[Row], start_rate: float) -> float:
    """The largest of BOUNDS with which following by chance adds little to the error.

    Its standard error is at most sqrt(bound * sum of q below it) / rows (p <= q), and may be
    THINNING_SHARE of the rate at the start, which the whole rate cannot be less than.
    """
    bounds = np.array(BOUNDS)
    below, count = np.zeros(len(bounds)), 0
    for row in rows:
        first = np.sort(places(row, plan).first)
        sums = np.concatenate([[0.0], np.cumsum(first)])
        below += sums[np.searchsorted(first, bounds)]
        count += 1
    if not count:
        return MAX_BOUND
    fine = np.sqrt(bounds * below) / count <= THINNING_SHARE * start_rate
    return float(bounds[np.argmax(fine)] if fine.any() else bounds[-1])
