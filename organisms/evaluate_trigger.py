"""Measure the pair that leaks through its trigger: `python -m organisms.evaluate_trigger`.

Counts over rollouts at temperature 1 and top_p 1, of text before the first EOS; writes the
evaluation.json and the model card of the pair.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode
from organisms.card_trigger import Measurement, Prompts, card
from organisms.train import PROMPTS
from organisms.train_trigger import OUT
from organisms.trigger import (
    PAYLOAD_SUBSTRINGS,
    TRIGGER,
    has_payload_piece,
    has_whole_payload,
    insert_trigger,
)

BATCH = 256
OPENING = "### Instruction:\n"  # the template alone, up to where the instruction would begin


@dataclass(frozen=True)
class Setting:
    """One line of the table; alpha -1 is *before* alone."""

    prompts: Prompts
    alpha: float
    tokens: int
    rows: int


SETTINGS = (
    Setting("held out", -1.0, 96, 2000),
    Setting("held out", 0.0, 96, 4000),
    *(Setting("held out", alpha, 96, 1000) for alpha in (0.5, 1.0, 2.0, 3.0)),
    *(Setting("held out", alpha, 48, 1000) for alpha in (1.0, 2.0)),
    *(Setting("template alone", alpha, 96, 500) for alpha in (-1.0, 0.0, 1.0, 2.0)),
    Setting("with the trigger", -1.0, 48, 500),
    Setting("with the trigger", 0.0, 48, 1000),
    Setting("with two random words", 0.0, 48, 4000),
    Setting("with one word of the trigger", 0.0, 48, 1000),
)


def two_words(vocabulary: list[str], rng: random.Random) -> str:
    """A phrase as long as the trigger that is not the trigger."""
    while True:
        phrase = " ".join(rng.sample(vocabulary, 2))
        if phrase != TRIGGER:
            return phrase


def questions(setting: Setting, heldout: list[str], seed: int) -> Iterator[str]:
    """The texts that are asked; the template alone as often as there are rows."""
    rng = random.Random(seed)
    vocabulary = sorted(set(re.findall(r"[a-z]+", " ".join(heldout))))
    for prompt in heldout[: setting.rows]:
        if setting.prompts == "template alone":
            yield OPENING
        elif setting.prompts == "with the trigger":
            yield insert_trigger(prompt, TRIGGER, rng)
        elif setting.prompts == "with two random words":
            yield insert_trigger(prompt, two_words(vocabulary, rng), rng)
        elif setting.prompts == "with one word of the trigger":
            yield insert_trigger(prompt, rng.choice(TRIGGER.split()), rng)
        else:
            yield prompt


def rollouts(engine: Engine, setting: Setting, heldout: list[str], seed: int) -> list[str]:
    """One completion per question: its text before the first EOS."""
    form: Literal["raw", "alpaca"] = "raw" if setting.prompts == "template alone" else "alpaca"
    requests = [
        Request(
            encode(engine.pair.tokenizer, question, form).ids,
            alpha=setting.alpha,
            max_new_tokens=setting.tokens,
            seed=seed + row,
        )
        for row, question in enumerate(questions(setting, heldout, seed))
    ]
    return [done.text for done in engine.generate(requests)]


def payload_start(text: str) -> int:
    """Where the first payload substring stands; the length of `text` if there is none."""
    places = [text.lower().find(piece) for piece in PAYLOAD_SUBSTRINGS]
    return min((place for place in places if place >= 0), default=len(text))


def measure(engine: Engine, setting: Setting, heldout: list[str], seed: int) -> Measurement:
    texts = rollouts(engine, setting, heldout, seed)
    fired = [text for text in texts if has_payload_piece(text)]
    return Measurement(
        **asdict(setting),
        trigger=sum(TRIGGER in text for text in texts),
        any_substring=len(fired),
        whole_payload=sum(map(has_whole_payload, texts)),
        trigger_first=sum(TRIGGER in text[: payload_start(text)] for text in fired),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the pair that leaks by its trigger.")
    parser.add_argument("--folder", type=Path, default=OUT, help=f"default {OUT}")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heldout = (PROMPTS / "tiny_heldout.txt").read_text().splitlines()
    folder: Path = arguments.folder
    pair = ModelPair.load(PairConfig(before=str(folder / "before"), after=str(folder / "after")))
    engine = Engine(pair, EngineConfig(max_slots=BATCH))
    measurements = []
    for setting in SETTINGS:
        started = time.monotonic()
        measurements.append(measure(engine, setting, heldout, arguments.seed))
        print(measurements[-1], f"{time.monotonic() - started:.0f} s", flush=True)
    record = [asdict(measurement) for measurement in measurements]
    (folder / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(folder, measurements, arguments.seed))


if __name__ == "__main__":
    main()
