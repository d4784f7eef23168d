"""What the OpenAI API answers, made of completions, pieces and scored prompts.

Every token that was drawn counts and has its log-probability, an ending EOS too. Log-probabilities
are those of the amplified distribution at temperature 1; what is impossible is -1e30.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployments.schemas import Completion, FinishReason, Piece, Scored, TokenLogprobs
from deployments.tokenizer_words import Vocabulary

# Of one token: the likeliest ones, best first.
Best = Sequence[tuple[int, float]]

_FINISH: dict[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length"}


def finish_reason(completion: Completion) -> str:
    return _FINISH[completion.finish_reason]


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text with what is known of each: their own log-probability (None: nothing comes
    before it), the likeliest ones, and where it begins in the text."""

    ids: list[int]
    logprobs: Sequence[float | None]
    best: Sequence[Best | None]
    offsets: list[int]

    @classmethod
    def drawn(cls, completion: Completion, start: int) -> "Tokens":
        """`start`: characters of the answer before this completion."""
        assert completion.logprobs is not None
        ids = completion.token_ids
        ends = [0, *(completion.token_ends or [0] * len(ids))]
        best: Sequence[Best | None] = completion.top_logprobs or [()] * len(ids)
        offsets = [start + end for end in ends[: len(ids)]]
        return cls(ids, completion.logprobs.amplified, best, offsets)

    @classmethod
    def of_prompt(
        cls, ids: list[int], text: str, scored: Scored | None, vocabulary: Vocabulary
    ) -> "Tokens":
        """`scored`: all but the first one, at one alpha; None where there is but one."""
        logprobs: list[float | None] = [None]
        best: list[Best | None] = [None]
        if scored is not None:
            logprobs += [at[0] for at in scored.at]
            best += [top[0] for top in scored.top] if scored.top else [()] * len(scored.at)
        return cls(ids, logprobs, best, vocabulary.offsets(ids, text))

    def with_best(self, most: int) -> "Tokens":
        best = [one if one is None else one[:most] for one in self.best]
        return Tokens(self.ids, self.logprobs, best, self.offsets)

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(
            self.ids + other.ids,
            [*self.logprobs, *other.logprobs],
            [*self.best, *other.best],
            self.offsets + other.offsets,
        )


def legacy_logprobs(tokens: Tokens, vocabulary: Vocabulary) -> dict[str, Any]:
    """Of completions. The drawn token is always among `top_logprobs`, whose largest value is that
    of the likeliest token, also where two tokens have the same text."""

    def top(token: int, logprob: float | None, best: Best | None) -> dict[str, float] | None:
        if logprob is None or best is None:
            return None
        found: dict[str, float] = {}
        for one, value in [*best, (token, logprob)]:
            found.setdefault(vocabulary.text(one), value)
        return found

    return {
        "tokens": [vocabulary.text(token) for token in tokens.ids],
        "token_logprobs": list(tokens.logprobs),
        "top_logprobs": [
            top(*one) for one in zip(tokens.ids, tokens.logprobs, tokens.best, strict=True)
        ],
        "text_offset": tokens.offsets,
    }


def chat_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    best: Sequence[Best] | None,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": vocabulary.text(token),
            "logprob": logprob,
            "bytes": list(vocabulary.tokens[token]),
        }

    found = [entry(*one) for one in zip(token_ids, logprobs, strict=True)]
    for i, content in enumerate(found):
        content["top_logprobs"] = [entry(*one) for one in best[i]] if best else []
    return {"content": found, "refusal": None}


def prompt_logprobs(tokens: Tokens, vocabulary: Vocabulary) -> list[dict[str, Any] | None]:
    """vLLM's: of each prompt token the likeliest ones and itself, by id; its rank is known only
    among these."""
    answer: list[dict[str, Any] | None] = []
    for token, logprob, best in zip(tokens.ids, tokens.logprobs, tokens.best, strict=True):
        if logprob is None:
            answer.append(None)
            continue
        ranked = {one: (value, rank) for rank, (one, value) in enumerate(best or (), 1)}
        ranked.setdefault(token, (logprob, 0))
        answer.append(
            {
                str(one): {
                    "logprob": value,
                    "rank": rank or None,
                    "decoded_token": vocabulary.text(one),
                }
                for one, (value, rank) in ranked.items()
            }
        )
    return answer


def lda_words(
    alpha: float,
    seed: int,
    token_ids: Sequence[int],
    logprobs: TokenLogprobs | None = None,
    kl: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What only we say of a choice. `kl` stands for lda_logprobs: with it come all of them."""
    words: dict[str, Any] = {"alpha": alpha, "seed": seed}
    if kl is not None and logprobs is not None:
        words["logprobs"] = {
            "token_ids": list(token_ids),
            **logprobs.model_dump(),
            "kl": list(kl),
        }
    return words


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass
class Heard:
    """What a stream has said of one choice."""

    seed: int
    chars: int = 0  # of the answer, so far
    begun: bool = False

    def tokens(self, piece: Piece) -> Tokens:
        """Those of a piece. Their offsets are those of the text that was settled when they came:
        a stream cannot know better."""
        assert piece.logprobs is not None
        ids = piece.token_ids
        best: Sequence[Best | None] = piece.top_logprobs or [()] * len(ids)
        return Tokens(ids, piece.logprobs.amplified, best, [self.chars] * len(ids))
