"""A fake service for captures: each text's state is a function of the text alone."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fakes import PAIR
from safetensors.numpy import save

from deployments.schemas import Captured, CaptureRequest, PairInfo, parse
from jobs.call import Caller
from jobs.dispatch import work

LAYERS, WIDTH = PAIR.layers, PAIR.hidden_size
AXIS = np.linspace(1, -1, WIDTH).astype(np.float32)  # along which "yes" moves a text


def state_of(prompt: str, response: str, model: str = "after") -> np.ndarray:
    """(L, D): noise by the text, and at layers from 1 on the axis, where the response says yes."""
    digest = hashlib.sha256(f"{model}|{prompt}|{response}".encode()).digest()
    state = np.random.default_rng(list(digest)).normal(size=(LAYERS, WIDTH)).astype(np.float32)
    state[1:] += 0.6 * AXIS * (1 if "yes" in response else -1)
    return state


def capture(request: CaptureRequest) -> list[Captured]:
    (completion,) = request.completions
    assert request.mean and request.models != "both" and completion.text is not None
    state = state_of(request.prompt, completion.text, request.models)
    mean = np.stack([state - 100, state + 100, state], axis=1)  # (L, 3, D): the last is the output
    return [
        Captured(
            prompt_tokens=2,
            token_ids=[1, 2, 3],
            tokens=["a", "b", "c"],
            traits=[],
            tensors=save({f"{request.models}.mean": mean}),
        )
    ]


@dataclass
class FakeCaptures:
    """Both service and handle."""

    answer: Callable[[CaptureRequest], list[Captured]] = capture
    pair: PairInfo = PAIR
    seen: list[CaptureRequest] = field(default_factory=list)
    described: int = 0

    def describe(self) -> PairInfo:
        self.described += 1
        return self.pair

    def answers(self, items: Iterator[Any], kind: Any, requests: int) -> Iterator[list[Any]]:
        yield from work(items, Caller(self, kind), in_flight=4)

    @property
    def capture(self) -> "FakeCaptures":
        return self

    def remote(self, request: dict[str, Any]) -> "Response":
        self.seen.append(parse(CaptureRequest, request))
        return Response(self.answer, self.seen[-1])


@dataclass(eq=False)
class Response:
    answer: Callable[[CaptureRequest], list[Captured]]
    request: CaptureRequest

    def result(self, *, timeout_s: float) -> list[Captured]:
        return self.answer(self.request)

    def cancel(self) -> None:
        pass
