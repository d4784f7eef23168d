"""A fake service for captures: numbers of model, layer, point, trait and token alone."""

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fakes import PAIR

from deployments.schemas import (
    Captured,
    CaptureRequest,
    Completion,
    GenerateRequest,
    InvalidRequest,
    PairInfo,
    parse,
)
from jobs.call import Caller
from jobs.capture_files import Content, Tensor, from_bytes, to_bytes
from jobs.dispatch import work

LAYERS, HEADS = PAIR.layers, 4
PROMPT_TOKENS = 3  # of every prompt


def answer_ids(request: GenerateRequest) -> list[int]:
    """Six tokens and EOS, of the seed; prompts with `empty` in them have none."""
    assert request.prompt is not None and request.seed is not None
    if "empty" in request.prompt:
        return []
    return [3 + (request.seed + 7 * i) % 700 for i in range(6)] + [2]


def complete(request: GenerateRequest) -> list[Completion]:
    ids = answer_ids(request)
    return [
        Completion(
            text=" ".join(map(str, ids[:-1])),
            token_ids=ids,
            finish_reason="eos",
            eos_index=len(ids) - 1 if ids else None,
            eos_text_offset=None,
            seed=request.seed,
            alpha=request.alpha,
            prompt_tokens=PROMPT_TOKENS,
            formatted_prompt=request.prompt,
        )
    ]


def score(role: str, token: int, layer: int, point: int, trait: int) -> float:
    """After goes further along the second trait, the more so the later the layer."""
    apart = 0.5 * (layer + 1) * trait if role == "after" else 0.0
    return (token % 10) / 10 + layer + 0.1 * point + 10.0 * trait + apart


def capture(request: CaptureRequest) -> list[Captured]:
    assert request.traits is not None
    traits = sorted(from_bytes(request.traits).tensors)
    prompt = [1, *(ord(c) % 700 for c in request.prompt[:1]), 5][:PROMPT_TOKENS]
    prompt += [9] * (PROMPT_TOKENS - len(prompt))
    return [
        _captured(request, traits, prompt, list(completion.token_ids or ()))
        for completion in request.completions
    ] or [_captured(request, traits, prompt, [])]


def _captured(
    request: CaptureRequest, traits: list[str], prompt: list[int], ids: list[int]
) -> Captured:
    every = [*prompt, *ids]
    tensors = {}
    for role in ("after", "before") if request.models == "both" else (request.models,):
        scores = [
            [
                [[score(role, t, layer, p, k) for k in range(len(traits))] for p in range(3)]
                for layer in range(LAYERS)
            ]
            for t in every
        ]
        tensors[f"{role}.scores"] = Tensor.of(np.array(scores, np.float32))
        tensors[f"{role}.norms"] = Tensor.of(np.full((len(every), LAYERS, 3), 5.0, np.float32))
        if request.layer is not None:
            weights = np.tril(np.ones((HEADS, len(every), len(every)), np.float32))
            tensors[f"{role}.attention"] = Tensor.of(weights / weights.sum(-1, keepdims=True))
            half = np.ones((len(every), HEADS, 2), np.float16)
            for part in "qkv":
                tensors[f"{role}.{part}"] = Tensor("F16", half.shape, half.tobytes())
    return Captured(
        prompt_tokens=len(prompt),
        token_ids=every,
        tokens=[f" t{i}" for i in every],
        traits=traits,
        tensors=to_bytes(Content(tensors, {})),
    )


@dataclass
class CaptureHandle:
    """`generate` and `capture`, answered in the caller's thread."""

    generated: Callable[[GenerateRequest], list[Completion]] = complete
    captured: Callable[[CaptureRequest], list[Captured]] = capture
    seen: list[GenerateRequest] = field(default_factory=list)
    captures: list[CaptureRequest] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def generate(self) -> "_Method":
        return _Method(self, GenerateRequest)

    @property
    def capture(self) -> "_Method":
        return _Method(self, CaptureRequest)


@dataclass
class _Method:
    handle: CaptureHandle
    kind: type[GenerateRequest] | type[CaptureRequest]

    def remote(self, request: dict[str, Any]) -> "_Response":
        return _Response(self.handle, parse(self.kind, request))


@dataclass(eq=False)
class _Response:
    handle: CaptureHandle
    request: GenerateRequest | CaptureRequest

    def result(self, *, timeout_s: float) -> Any:
        handle = self.handle
        with handle.lock:
            handle.under_way += 1
            handle.most_under_way = max(handle.most_under_way, handle.under_way)
        try:
            if isinstance(self.request, GenerateRequest):
                with handle.lock:
                    handle.seen.append(self.request)
                return handle.generated(self.request)
            with handle.lock:
                handle.captures.append(self.request)
            return handle.captured(self.request)
        finally:
            with handle.lock:
                handle.under_way -= 1

    def cancel(self) -> None:
        pass


@dataclass
class CaptureService:
    """In this process instead of in remote tasks; the calls, files and rows are the real ones."""

    handle: CaptureHandle = field(default_factory=CaptureHandle)
    pair: PairInfo = PAIR
    in_flight: int = 4

    def describe(self) -> PairInfo:
        return self.pair

    def caller(self, of: Any) -> Caller:
        return Caller(self.handle, of)

    def answers(
        self, items: Iterator[Any], of: Any, requests: int
    ) -> Generator[list[Any], None, None]:
        yield from work(items, Caller(self.handle, of), self.in_flight)


def too_long(request: CaptureRequest) -> list[Captured]:
    """Refuses the prompts that have `long` in them."""
    if "long" in request.prompt:
        raise InvalidRequest("prompt", "has 900 tokens, at most 512", "context_length_exceeded")
    return capture(request)
