"""What the engine is asked and what it answers; one Request is one row."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lda_core.errors import RequestError

Role = Literal["after", "before"]
Roles = frozenset[Role]
BOTH: Roles = frozenset(("after", "before"))
FinishReason = Literal["length", "stop", "eos", "error"]
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_GRID = 16  # alphas
MAX_WATCH = 16  # tokens
MAX_AMPLIFY_FIRST = 2**31 - 1
MAX_TOP_LOGPROBS = 20
# How a log-probability of -inf is written, and below 0 the other way round: JSON has none.
IMPOSSIBLE = -1e30


@dataclass(frozen=True)
class Steer:
    """A direction that is added while a row decodes.

    Attributes:
      vector: (D,) of the hidden size; its direction alone counts.
      layer: at whose output it is added, from 0.
      coefficient: length of what is added, in units of the residual stream; below 0 against it.
      roles: the models it is added to.

    Raises RequestError naming the field if a value is out of range.
    """

    vector: tuple[float, ...]
    layer: int
    coefficient: float
    roles: Roles = BOTH

    def __post_init__(self) -> None:
        _need(all(map(math.isfinite, self.vector)), "steer.vector", "must be finite numbers")
        _need(any(self.vector), "steer.vector", "must not be all zeros")
        _need(self.layer >= 0, "steer.layer", "must be at least 0")
        _need(math.isfinite(self.coefficient), "steer.coefficient", "must be a finite number")
        _need(len(self.roles) > 0, "steer.models", "must name a model")


@dataclass(frozen=True)
class Request:
    """One row: a prompt in token ids and how to go on from it.

    Where the row is amplified can be limited: at all other steps it is drawn as at alpha 0.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 is no limit.
      ignore_eos: generate exactly max_new_tokens.
      grid: alphas whose densities are wanted at every token (see `Densities`); with logprobs.
      watch: token ids whose log-probability is wanted at every step, under the row's own alpha and
        temperature, without truncation or any limit to the amplification.
      amplify_first: amplify the first so many drawn tokens only; 0 is no limit.
      amplify_min_kl: amplify only where KL(after||before) at temperature 1 is at least this (nats).
      plausible: at amplified steps draw only tokens that *after* gives at least this share of its
        best one's probability; alpha 0 and -1 are never masked. Source: Li et al. 2022,
        "Contrastive decoding", the plausibility constraint.
      steer: a direction to add; all log-probabilities are then those of the steered models.
      top_logprobs: so many of the likeliest tokens are wanted at every step; with logprobs.
      min_tokens: no EOS is drawn, and no stop string ends the row, before so many tokens. Of the
        plausible tokens the best one is then looked for among the others.
      kl: KL(after||before) is wanted at every step.

    Raises RequestError naming the field if a value is out of range.
    """

    prompt_ids: tuple[int, ...]
    alpha: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 80
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    grid: tuple[float, ...] = ()
    watch: tuple[int, ...] = ()
    amplify_first: int = 0
    amplify_min_kl: float = 0.0
    plausible: float = 0.0
    steer: Steer | None = None
    top_logprobs: int = 0
    min_tokens: int = 0
    kl: bool = False

    def __post_init__(self) -> None:
        need = _need
        _need_tokens(self.prompt_ids, "prompt")
        need(math.isfinite(self.alpha), "alpha", "must be a finite number")
        need(0 <= self.temperature < math.inf, "temperature", "must be finite and at least 0")
        need(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        need(0 <= self.top_k <= MAX_TOP_K, "top_k", f"must be between 0 and {MAX_TOP_K}")
        need(self.max_new_tokens >= 1, "max_new_tokens", "must be at least 1")
        need(0 <= self.seed <= MAX_SEED, "seed", f"must be between 0 and {MAX_SEED}")
        need(all(self.stop), "stop", "must not hold an empty string")
        _need_grid(self.grid)
        need(len(self.watch) <= MAX_WATCH, "watch", f"must be at most {MAX_WATCH} token ids")
        need(all(type(i) is int for i in self.watch), "watch", "token ids must be integers")
        for name in ("grid", "watch"):
            need(
                self.temperature > 0 or not getattr(self, name),
                name,
                "needs a temperature above 0: a greedy row has no densities",
            )
        need(
            0 <= self.amplify_first <= MAX_AMPLIFY_FIRST,
            "amplify_first",
            f"must be between 0 and {MAX_AMPLIFY_FIRST}",
        )
        need(
            0 <= self.amplify_min_kl < math.inf,
            "amplify_min_kl",
            "must be finite and at least 0",
        )
        need(0 <= self.plausible <= 1, "plausible", "must be between 0 and 1")
        need(
            0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            "top_logprobs",
            f"must be between 0 and {MAX_TOP_LOGPROBS}",
        )
        need(
            0 <= self.min_tokens <= self.max_new_tokens,
            "min_tokens",
            f"must be between 0 and max_new_tokens, which is {self.max_new_tokens}",
        )
        need(not (self.grid and self.min_tokens), "min_tokens", "must be 0 together with a grid")

    def samples(self, n: int) -> list["Request"]:
        """`n` rows that differ in their seed alone: seed, seed + 1, ..."""
        return [replace(self, seed=self.seed + i) for i in range(n)]

    @property
    def columns(self) -> int:
        """Most columns of a slot that the row can ever fill (the last token is never read)."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def wants_logprobs(self) -> bool:
        """The grid's densities are made of them."""
        return self.logprobs or bool(self.grid) or self.top_logprobs > 0

    @property
    def gated(self) -> bool:
        """Whether any setting may make it drawn otherwise than at its alpha, or at the grid's."""
        return self.amplify_first > 0 or self.amplify_min_kl > 0 or self.plausible > 0

    @property
    def reshaped(self) -> bool:
        """Whether what it is drawn from may differ from its target density."""
        return self.gated or self.top_p < 1 or self.top_k > 0 or self.min_tokens > 0


@dataclass(frozen=True)
class ScoreRequest:
    """A continuation of a prompt, to be read and not drawn (teacher forcing).

    Attributes:
      top: so many of the likeliest tokens are wanted at every place, under every alpha.

    Raises RequestError naming the field if a value is out of range.
    """

    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    grid: tuple[float, ...] = (0.0,)
    temperature: float = 1.0
    top: int = 0

    def __post_init__(self) -> None:
        _need_tokens(self.prompt_ids, "prompt")
        _need_tokens(self.continuation_ids, "continuation")
        _need_grid(self.grid)
        _need(0 < self.temperature < math.inf, "temperature", "must be finite and above 0")
        _need(0 <= self.top <= MAX_TOP_LOGPROBS, "top", f"must be between 0 and {MAX_TOP_LOGPROBS}")


def _need(ok: bool, field: str, message: str) -> None:
    if not ok:
        raise RequestError(field, message)


def _need_tokens(ids: tuple[int, ...], field: str) -> None:
    _need(len(ids) > 0, field, "must have at least one token")
    _need(all(type(i) is int for i in ids), field, "token ids must be integers")


def _need_grid(grid: tuple[float, ...]) -> None:
    _need(len(grid) <= MAX_GRID, "grid", f"must be at most {MAX_GRID} alphas")
    _need(all(map(math.isfinite, grid)), "grid", "must be finite numbers")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of each drawn token at temperature 1, without top-k or top-p, or any limit
    to the amplification. -inf is written as -1e30."""

    after: list[float]
    before: list[float]
    amplified: list[float]


@dataclass(frozen=True)
class Densities:
    """What a row's density under other alphas is made of: T tokens, K alphas of the grid.

    The target density of token t at alpha a, at the row's temperature:

        log p_a(t) = ((1 + a) * after[t] - a * before[t]) / temperature - normalisers[t][a]

    with the token's log-probabilities `after` and `before` (of `TokenLogprobs`). A token that one
    of the models rules out (-1e30) has log p_a = -inf at every alpha but 0 and -1.

    Attributes:
      alphas: the grid (K,).
      normalisers: (T, K), the logsumexp over the vocabulary of the first term above.
      drawn: (T, K), the log-density under which the token would have been drawn at alpha a, with
        the row's limits to the amplification, temperature, top-k and top-p; -inf is written as
        -1e30. None where the row has none of these but a temperature: then it is the target's.
    """

    alphas: list[float]
    normalisers: list[list[float]]
    drawn: list[list[float]] | None


@dataclass(frozen=True)
class Scored:
    """A continuation of T tokens under both models, and what its densities at K alphas need.

    Attributes:
      after, before: (T,) log-probabilities at temperature 1; -inf is written as -1e30.
      normalisers: (T, K), as in `Densities`.
      error: why there is nothing of this.
      at: (T, K) log-probability of each token under each alpha, at the request's temperature.
      top: where asked for, (T, K) lists of the likeliest tokens and their log-probabilities, best
        first and of equal ones the lower id; the token's own, where it is there, is that of `at`.
    """

    after: list[float]
    before: list[float]
    normalisers: list[list[float]]
    error: str | None = None
    at: list[list[float]] = field(default_factory=list)
    top: list[list[list[tuple[int, float]]]] | None = None


@dataclass(frozen=True)
class Completion:
    """A finished row.

    Attributes:
      text: what was generated, never the prompt; special tokens left out.
      token_ids: all that was drawn, an ending EOS included.
      finish_reason: "length", "stop", "eos", or "error" with the reason in `error`.
      eos_index: place of the first EOS in token_ids, None if there is none.
      eos_text_offset: number of characters of `text` that come before it.
      prompt_tokens: length of the prompt.
      logprobs: where asked for, one value per token of token_ids and distribution.
      densities: where a grid was asked for.
      watched: where asked for, the log-probabilities (T, W) of the watched tokens at every step.
      token_ends: with logprobs, (T,) how many characters of `text` are settled once each token is
        drawn; half a character counts for nothing. Never falls, and ends with all of `text`.
      top_logprobs: where asked for, the likeliest tokens of every step and their log-probabilities
        in the sense of `logprobs.amplified`, best first and of equal ones the lower id. The drawn
        token's own, where it is there, is that very number. A vocabulary that has fewer gives all.
      kl: where asked for, KL(after||before) of every step at temperature 1, in nats; 1e30 where
        *before* rules out what *after* does not.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    eos_index: int | None
    eos_text_offset: int | None
    seed: int
    alpha: float
    prompt_tokens: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    densities: Densities | None = None
    watched: list[list[float]] | None = None
    token_ends: list[int] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    kl: list[float] | None = None
