"""What the engine is asked and what it answers; one Request is one row."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from lda_core.errors import RequestError

FinishReason = Literal["length", "stop", "eos", "error"]
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """One row: a prompt in token ids and how to go on from it.

    Raises RequestError naming the field if a value is out of range.
    """

    prompt_ids: tuple[int, ...]
    alpha: float = 1.0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is no limit
    max_new_tokens: int = 80
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # generate exactly max_new_tokens
    logprobs: bool = False

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, message: str) -> None:
            if not ok:
                raise RequestError(field, message)

        need(len(self.prompt_ids) > 0, "prompt", "must have at least one token")
        need(all(type(i) is int for i in self.prompt_ids), "prompt", "token ids must be integers")
        need(math.isfinite(self.alpha), "alpha", "must be a finite number")
        need(0 <= self.temperature < math.inf, "temperature", "must be finite and at least 0")
        need(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        need(0 <= self.top_k <= MAX_TOP_K, "top_k", f"must be between 0 and {MAX_TOP_K}")
        need(self.max_new_tokens >= 1, "max_new_tokens", "must be at least 1")
        need(0 <= self.seed <= MAX_SEED, "seed", f"must be between 0 and {MAX_SEED}")
        need(all(self.stop), "stop", "must not hold an empty string")

    def samples(self, n: int) -> list["Request"]:
        """`n` rows that differ in their seed alone: seed, seed + 1, ..."""
        return [replace(self, seed=self.seed + i) for i in range(n)]

    @property
    def columns(self) -> int:
        """Most columns of a slot that the row can ever fill (the last token is never read)."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of each drawn token at temperature 1, without top-k or top-p."""

    after: list[float]
    before: list[float]
    amplified: list[float]


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
