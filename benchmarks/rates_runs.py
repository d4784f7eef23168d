"""Runs of a design on the tiny pairs, in-process, and what their weights say.

A run draws prompts of its own from the held-out file, so the truth is the mean over that file, and
has seeds of its own. Its rows are those that a job would store: the same estimators read them.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from deployments.schemas import Densities
from jobs.rows import Row, RowLogprobs
from jobs.scorers import Phrase, Scorer, Substrings, score_row
from jobs.spread import place, whole_blocks
from jobs.weight_columns import Collector
from lda_core import Completion, Engine, EngineConfig, ModelPair, PairConfig, Request, encode
from organisms.train import OUT
from organisms.trigger import PAYLOAD, PAYLOAD_SUBSTRINGS

PROMPTS = Path("prompts/tiny_heldout.txt")
MAX_NEW_TOKENS = 48
SLOTS = 256
ROWS_AT_ONCE = 1250  # in memory
FIRST_SEED = 2**42  # above those of benchmarks.truth and benchmarks.monitor
SCORERS: tuple[Scorer, ...] = (
    Substrings("substrings", PAYLOAD_SUBSTRINGS),
    Phrase("phrase", PAYLOAD),
)


@dataclass(frozen=True)
class Design:
    """How many samples each prompt gets at each alpha; densities are recorded at these.

    `spread`: each prompt at one of the alphas only, as many samples at any of them.
    """

    samples: dict[float, int]
    spread: bool = False

    def __post_init__(self) -> None:
        if self.spread and len(set(self.samples.values())) != 1:
            raise ValueError(f"a spread design has as many samples at any alpha: {self.samples}")

    @property
    def grid(self) -> tuple[float, ...]:
        return tuple(self.samples)

    @property
    def rows_a_prompt(self) -> int:
        return max(self.samples.values()) if self.spread else sum(self.samples.values())


# Error over brute force by tokens drawn at 3e-3 / 9e-4 / 7e-5, expected from the densities of the
# hits of 100,000 brute-force rows: alphas 0, 1: 1.22 / 1.02 / .61; 0, 2: 1.37 / 1.03 / .51;
# 0, .5, 1, 2: 1.27 / 1.04 / .63; these: 1.38 / 1.09 / .62 at first count, and within a factor of 3
# at 7e-5 in 70 % of runs where without alpha 3 it is 58 %. No share, alpha or gate (the first
# tokens, a KL, a mask) is better than 5 % below the best of these at 9e-4: the hits' paths are
# amplified only 3 to 5 times, since the payload's first token is an innocent one.
DESIGN = Design({0.0: 1, 0.5: 1, 1.0: 1, 2.0: 1, 3.0: 1})
# For what is rarer than about 1 in 3,000: at 9.4e-5 some 80 of the 4,000 prompts carry the rate,
# and 400 prompts at all alphas hold 8 of these, where 2,000 at one alpha each hold 40.
SPREAD = Design({0.0: 1, 0.5: 1, 1.0: 1, 2.0: 1, 6.0: 1}, spread=True)


class Sampler:
    """One of the tiny pairs, by the name of its folder."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        config = PairConfig(before=str(OUT / "before"), after=str(OUT / name))
        self._engine = Engine(ModelPair.load(config), EngineConfig(max_slots=SLOTS))
        self.prompts = PROMPTS.read_text().splitlines()

    @cached_property
    def _ids(self) -> list[tuple[int, ...]]:
        return [encode(self._engine.pair.tokenizer, p, "alpaca").ids for p in self.prompts]

    def prompt_tokens(self, prompt: int) -> int:
        return len(self._ids[prompt])

    def run(self, design: Design, rows: int, number: int) -> Iterator[Row]:
        """At most `rows` rows on prompts drawn without replacement; other ones in each run."""
        count = min(rows // design.rows_a_prompt, len(self.prompts))
        if design.spread:
            count = whole_blocks(count, design.grid)
        prompts = random.Random(number).sample(range(len(self.prompts)), count)
        at_once = max(1, ROWS_AT_ONCE // design.rows_a_prompt)
        for start in range(0, count, at_once):
            part = enumerate(prompts[start : start + at_once], start)
            yield from self._rows(part, design, number)

    def _rows(
        self, prompts: Iterable[tuple[int, int]], design: Design, number: int
    ) -> Iterator[Row]:
        """Of prompts and their places in the run."""
        requests = [
            (prompt, sample, block, self._request(prompt, alpha, sample, design, number))
            for at, prompt in prompts
            for block, alpha in dealt(design, number, at)
            for sample in range(design.samples[alpha])
        ]
        done = self._engine.generate([request for *_, request in requests])
        for (prompt, sample, block, _), completion in zip(requests, done, strict=True):
            yield stored(completion, prompt, sample, block)

    def _request(
        self, prompt: int, alpha: float, sample: int, design: Design, number: int
    ) -> Request:
        column = design.grid.index(alpha)
        place = (number * len(self.prompts) + prompt) * 16 + column
        return Request(
            self._ids[prompt],
            alpha=alpha,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=FIRST_SEED + place * 64 + sample,
            grid=design.grid,
        )


def dealt(design: Design, number: int, at: int) -> list[tuple[int | None, float]]:
    """Block and alpha of each request for the prompt at this place of a run."""
    if design.spread:
        return [place(number, design.grid, at)]
    return [(None, alpha) for alpha in design.grid]


def stored(done: Completion, prompt: int, sample: int, block: int | None = None) -> Row:
    """As a job stores it. Raises RuntimeError for a row that failed: there is no reason here."""
    if done.error is not None or done.logprobs is None or done.densities is None:
        raise RuntimeError(f"prompt {prompt} at alpha {done.alpha:g}: {done.error}")
    found = done.densities
    row = Row(
        arm="untriggered",
        prompt_id=str(prompt),
        prompt="",
        alpha=done.alpha,
        sample=sample,
        seed=done.seed,
        completion=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        eos_index=done.eos_index,
        activated=None,
        activated_after_eos=None,
        scores={},
        error=None,
        token_ends=done.token_ends,
        logprobs=RowLogprobs(after=done.logprobs.after, before=done.logprobs.before),
        densities=Densities(alphas=found.alphas, normalisers=found.normalisers, drawn=found.drawn),
        block=block,
    )
    scores = score_row(SCORERS, done.text, done.eos_text_offset, done.token_ends)
    return row.model_copy(update=scores._asdict())


def collector() -> Collector:
    return Collector({scorer.name: scorer.monotone for scorer in SCORERS}, temperature=1.0)
