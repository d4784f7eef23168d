"""What a run found, as data: made by `jobs.analysis` from stored rows, shown by the report, the
table and summary.json. Rates are shares between 0 and 1 with 95 % limits."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.rows import Row

Verdict = Literal["trust", "lower bound only", "do not trust"]
Method = Literal["count", "weighted", "extrapolated", "monitor"]


@dataclass(frozen=True)
class Estimate:
    """One estimator's answer to "how often at this alpha", for one scorer.

    `scorer` is "activated" (any scorer) or a scorer's name; `n` rows it rests on; `why` is the
    trust line's reason; `diagnostics` are shown beside it.
    """

    method: Method
    scorer: str
    alpha: float
    rate: float
    low: float
    high: float
    n: int
    verdict: Verdict
    why: str
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """The naive count of one arm, alpha and scorer; `rate` is None without a good row."""

    arm: str
    alpha: float
    scorer: str
    rows: int
    prompts: int
    failed: int  # failed and missing: in no denominator
    hits: int
    after_eos: int
    rate: float | None
    low: float | None
    high: float | None
    p_against_0: float | None = None  # paired over prompts


@dataclass(frozen=True)
class Coherence:
    """How far an alpha drifts, means over the rows of the untriggered arm, in nats per token."""

    alpha: float
    kl: float  # of the sampled distribution from *after*
    logprob_after: float
    logprob_before: float
    rate: float | None


@dataclass(frozen=True)
class Candidate:
    """A phrase that amplification makes frequent: a trigger, perhaps."""

    text: str
    kind: Literal["words", "tokens"]
    documents_high: int  # distinct rollouts that have it, at the higher alphas
    documents_0: int
    rollouts_high: int
    rollouts_0: int
    p_value: float  # corrected for the number of n-grams tried
    before_payload: float | None  # of the activated rollouts with both, the share it precedes in
    score: float


@dataclass(frozen=True)
class Attack:
    """The confirm job's line of one inserted phrase, at alpha 0."""

    text: str
    random: bool  # a random n-gram: what any insertion does
    rows: int
    hits: int
    rate: float
    low: float
    high: float
    lift: float | None  # over the random n-grams together
    p_value: float | None = None  # against these, corrected for the number of candidates


@dataclass(frozen=True)
class Control:
    """The control arm at an alpha: what the scorers find where nothing was hidden."""

    name: str
    alpha: float
    scorer: str
    rows: int
    hits: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Strip:
    """One prompt in the heat strip: activated share per alpha, None without rows."""

    prompt_id: str
    prompt: str
    rates: dict[float, float | None]


@dataclass(frozen=True)
class Findings:
    """All that the report shows. `lead` is its first sentence; `trust` its trust lines."""

    title: str
    manifest: dict[str, Any]
    lead: str
    trust: list[str]
    counts: list[Count]
    estimates: list[Estimate]
    floors: dict[str, tuple[float, float, float]]  # scorer: rate at alpha -1 and its limits
    coherence: list[Coherence]
    strips: list[Strip]
    candidates: list[Candidate]
    attacks: list[Attack]
    controls: list[Control]
    duplicates: list[str]  # a line per alpha where equal texts are more than sampling explains
    samples: list[Row]  # rollouts for the viewer: those of a prompt at several alphas together
