"""A pair of models small enough to write down: every answer it can give, and how likely it is.

Two random tables over a vocabulary of five tokens (the letters a to d and EOS) give the next token
from all those before; an answer ends with EOS or has four tokens: 341 answers in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
from scipy import special

from deployments.schemas import Densities
from jobs.rows import Row, RowLogprobs
from jobs.scorers import Score

LETTERS, EOS, LENGTH = "abcd", 4, 4
IMPOSSIBLE = -1e30
Answer = tuple[int, ...]


def remembered(method):
    """A method's answers are kept by its arguments."""

    @wraps(method)
    def known(self, *arguments):
        key = (method.__name__, *arguments)
        if key not in self._known:
            self._known[key] = method(self, *arguments)
        return self._known[key]

    return known


@dataclass(frozen=True)
class Toy:
    """A pair and how a run draws from it: temperature, a gate, a mask, top_p."""

    seed: int = 0
    temperature: float = 1.0
    amplify_first: int = 0
    plausible: float = 0.0
    top_p: float = 1.0
    _known: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reshaped(self) -> bool:
        return bool(self.amplify_first or self.plausible or self.top_p < 1)

    @remembered
    def table(self, model: int, before: Answer) -> np.ndarray:
        """(V,) log-probabilities of the next token under model 0 (after) or 1 (before)."""
        rng = np.random.default_rng([self.seed, model, len(before), *before])
        return np.asarray(special.log_softmax(rng.normal(0, 1.2, 5)))

    @remembered
    def target(self, alpha: float, before: Answer) -> np.ndarray:
        """(V,) log p_alpha of the next token."""
        mixed = (1 + alpha) * self.table(0, before) - alpha * self.table(1, before)
        return np.asarray(special.log_softmax(mixed / self.temperature))

    @remembered
    def drawn(self, alpha: float, before: Answer) -> np.ndarray:
        """(V,) what the run draws from, in place of the target."""
        gated = bool(self.amplify_first) and len(before) >= self.amplify_first
        logs = self.target(0.0 if gated else alpha, before)
        after = self.table(0, before)
        if alpha and not gated and self.plausible:
            logs = np.where(after >= after.max() + np.log(self.plausible), logs, -np.inf)
        if self.top_p < 1:
            order = np.argsort(-logs)
            above = np.cumsum(np.exp(logs[order])) - np.exp(logs[order])  # before each
            logs = logs.copy()
            logs[order[above >= self.top_p * np.exp(special.logsumexp(logs))]] = -np.inf
        return np.asarray(special.log_softmax(logs))

    def answers(self, start: Answer = ()) -> Iterator[Answer]:
        for token in range(5):
            answer = (*start, token)
            if token == EOS or len(answer) == LENGTH:
                yield answer
            else:
                yield from self.answers(answer)

    def log_probability(self, answer: Answer, alpha: float, drawn: bool = False) -> float:
        step = self.drawn if drawn else self.target
        return sum(float(step(alpha, answer[:t])[token]) for t, token in enumerate(answer))

    def draw(self, alpha: float, rng: np.random.Generator) -> Answer:
        answer: Answer = ()
        while len(answer) < LENGTH and EOS not in answer:
            answer = (*answer, int(rng.choice(5, p=np.exp(self.drawn(alpha, answer)))))
        return answer

    def row(self, answer: Answer, alpha: float, grid: Sequence[float], prompt: int = 0) -> Row:
        """As the job would store it; scorers "ab" (monotone) and "ends" (not)."""
        steps = [answer[:t] for t in range(len(answer))]
        logs = [[self.table(m, b)[t] for b, t in zip(steps, answer, strict=True)] for m in (0, 1)]
        normalisers = [
            [self._normaliser(alpha, before) for alpha in grid] for before in steps
        ]  # (T, K)
        drawn = [
            [max(float(self.drawn(a, b)[t]), IMPOSSIBLE) for a in grid]
            for b, t in zip(steps, answer, strict=True)
        ]
        text = text_of(answer)
        scores = {"ab": found(text), "ends": Score(text.endswith("b"))}
        return Row(
            arm="untriggered",
            prompt_id=str(prompt),
            prompt="",
            alpha=alpha,
            sample=0,
            seed=0,
            completion=text,
            token_ids=list(answer),
            finish_reason="eos" if answer[-1] == EOS else "length",
            eos_index=answer.index(EOS) if EOS in answer else None,
            activated=any(score.fired for score in scores.values()),
            activated_after_eos=None,
            scores=scores,
            error=None,
            token_ends=[len(text_of(answer[: t + 1])) for t in range(len(answer))],
            logprobs=RowLogprobs(after=list(map(float, logs[0])), before=list(map(float, logs[1]))),
            densities=Densities(
                alphas=list(grid), normalisers=normalisers, drawn=drawn if self.reshaped else None
            ),
        )

    @remembered
    def _normaliser(self, alpha: float, before: Answer) -> float:
        mixed = (1 + alpha) * self.table(0, before) - alpha * self.table(1, before)
        return float(special.logsumexp(mixed / self.temperature))

    def rate(self, scorer: str, alpha: float = 0.0) -> float:
        """The truth, by enumeration."""
        return sum(
            np.exp(self.log_probability(x, alpha)) for x in self.answers() if fires(scorer, x)
        )


def text_of(answer: Answer) -> str:
    return "".join(LETTERS[token] for token in answer if token != EOS)


def found(text: str) -> Score:
    """A match of "ab"; each letter is a token."""
    at = text.find("ab")
    return Score(False) if at < 0 else Score(True, at, at + 2, token=at + 1)


def fires(scorer: str, answer: Answer) -> bool:
    text = text_of(answer)
    one = {"ab": "ab" in text, "ends": text.endswith("b")}
    return any(one.values()) if scorer == "activated" else one[scorer]
