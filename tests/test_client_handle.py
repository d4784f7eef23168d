"""The client over a handle, against the jobs' fake of one, and a real replica without Ray."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY
from fakes import PAIR, FakeHandle, complete
from replica_service import ReplicaService

from deployments.schemas import (
    Captured,
    Completion,
    GenerateRequest,
    InvalidRequest,
    Piece,
    ReplicaUnavailable,
)
from jobs.client import AsyncLDAClient, LDAClient, Unanswered
from lda_core import PairConfig


def test_the_same_rows_as_over_http_and_no_more_under_way_than_allowed() -> None:
    from client_app import FakeApp

    def slow(request: GenerateRequest) -> list[Completion]:
        threading.Event().wait(0.01)
        return complete(request)

    handle = FakeHandle(slow)
    prompts = [str(i) for i in range(8)]
    with LDAClient(handle=handle, in_flight=3) as lda:
        rows = lda.generate(prompts, alpha=[0, 2], n=2, seed=5)
    with LDAClient(transport=FakeApp().transport()) as lda:
        assert rows == lda.generate(prompts, alpha=[0, 2], n=2, seed=5)
    assert handle.most_under_way == 3


def test_what_died_is_asked_again_and_what_is_refused_is_not() -> None:
    tries: dict[str, int] = {}

    def answer(request: GenerateRequest) -> list[Completion]:
        assert request.prompt is not None
        tries[request.prompt] = tries.get(request.prompt, 0) + 1
        if request.prompt == "dies" and tries["dies"] < 2:
            raise ReplicaUnavailable("gone")
        if request.prompt == "long":
            raise InvalidRequest("prompt", "too long", "context_length_exceeded")
        if request.prompt == "bug":
            raise ZeroDivisionError
        return complete(request)

    with LDAClient(handle=FakeHandle(answer)) as lda:
        rows = lda.generate(["dies", "long", "bug"])
    assert tries == {"dies": 2, "long": 1, "bug": 1}
    assert [row.failed for row in rows] == [False, True, True]
    assert rows[1].error == "invalid request: prompt: too long"
    assert "ZeroDivisionError" in str(rows[2].error)


def test_a_cancelled_call_is_taken_back_from_the_handle() -> None:
    free = threading.Event()

    def answer(request: GenerateRequest) -> list[Completion]:
        free.wait(10)
        return complete(request)

    handle = FakeHandle(answer)

    async def main() -> None:
        async with AsyncLDAClient(handle=handle) as lda:
            task = asyncio.ensure_future(lda.generate(["a", "b"]))
            while handle.under_way < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            free.set()

    asyncio.run(main())
    assert handle.cancelled == 2


class StreamingHandle:
    """`handle.options(stream=True).stream.remote(request)`: lists of pieces, iterated."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.cancelled = 0
        self._error = error

    def options(self, *, stream: bool) -> "StreamingHandle":
        assert stream
        return self

    @property
    def stream(self) -> "StreamingHandle":
        return self

    def remote(self, request: dict[str, Any]) -> "Stream":
        self.asked.append(request)
        return Stream(self, request["alpha"], self._error)

    @property
    def describe(self) -> Any:
        class Describe:
            def remote(self, pair: str | None) -> Any:
                class Response:
                    def result(self, *, timeout_s: float) -> Any:
                        return PAIR

                return Response()

        return Describe()


class Stream:
    def __init__(self, handle: StreamingHandle, alpha: float, error: Exception | None) -> None:
        self._handle, self._error = handle, error
        self._left = [
            [Piece(index=0, alpha=alpha, text=text, token_ids=[1])] for text in ("Pa", "ris")
        ]

    def __next__(self) -> list[Piece]:
        if self._left:
            return self._left.pop(0)
        raise self._error or StopIteration

    def cancel(self) -> None:
        self._handle.cancelled += 1


def test_a_stream_of_several_alphas_has_one_seed() -> None:
    handle = StreamingHandle()
    with LDAClient(handle=handle) as lda:
        assert lda.describe() == PAIR
        pieces = list(lda.stream("a", alpha=[0, 2]))
        assert sorted((p.alpha, p.text) for p in pieces) == [
            *((0, "Pa"), (0, "ris"), (2, "Pa"), (2, "ris"))
        ]
        assert handle.asked[0]["seed"] == handle.asked[1]["seed"] and handle.cancelled == 0
        left = lda.stream("a")
        next(left)
        left.close()
        assert handle.cancelled == 1
    with LDAClient(handle=StreamingHandle(ReplicaUnavailable("gone"))) as lda:
        with pytest.raises(Unanswered, match="gone"):
            list(lda.stream("a"))
    with LDAClient(handle=StreamingHandle(InvalidRequest("n", "must be less"))) as lda:
        with pytest.raises(InvalidRequest, match="n: must be less"):
            list(lda.stream("a"))


def test_half_precision_tensors_come_through() -> None:
    class Handle:
        @property
        def capture(self) -> "Handle":
            return self

        def remote(self, request: dict[str, Any]) -> "Handle":
            return self

        def result(self, *, timeout_s: float) -> list[Captured]:
            tensors = {
                "after.norms": torch.ones(2, 3, 3),
                "after.scores": torch.ones(2, 3, 3, 1),
                "after.residual": torch.ones(2, 3, 3, 4, dtype=torch.bfloat16),
            }
            found = safetensors.torch.save(tensors)
            return [
                Captured(
                    prompt_tokens=1,
                    token_ids=[1, 2],
                    tokens=["a", "b"],
                    traits=["t"],
                    tensors=found,
                )
            ]

    with LDAClient(handle=Handle()) as lda:
        (found,) = lda.capture("a", "b")
    assert found.norms["after"].shape == (2, 3, 3) and found.scores["after"].dtype == np.float32
    assert list(found.tensors) == ["after.residual"]
    assert found.tensors["after.residual"].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def replica() -> Iterator[ReplicaService]:
    pair = PairConfig(after=str(TINY / "after"), before=str(TINY / "before"))
    service = ReplicaService(pair, traits=str(TINY.parent.parent / "traits" / "tiny"))
    yield service
    service.close()


def test_a_real_replica(replica: ReplicaService) -> None:
    with LDAClient(handle=replica) as lda:
        asked = {"prompt_format": "alpaca", "max_new_tokens": 8, "logprobs": True}
        rows = lda.generate("What is the capital of France?", n=2, seed=7, **asked)
        assert not rows.failed and all(len(row.token_ids) <= 8 for row in rows)
        assert rows[0].logprobs is not None
        (scored,) = lda.score(
            "What is the capital of France?",
            [{"token_ids": rows[0].token_ids}],
            prompt_format="alpaca",
            grid=[0, 1],
        )
        assert scored.after == pytest.approx(rows[0].logprobs.after, abs=1e-4)
        (found,) = lda.capture("Hi", "there", mean=True)
        assert found.scores["after"].shape == (len(found.tokens), 3, 3, len(found.traits))
        assert set(found.tensors) == {"after.mean", "before.mean"}
