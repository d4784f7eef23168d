"""A real replica as a service, in this process and without Ray: whole studies in seconds."""

import asyncio
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from typing import Any

from deployments.replica import LDAReplica
from deployments.schemas import CaptureRequest, GenerateRequest, PairInfo, ScoreRequest, parse
from jobs.call import Answer, Caller, Generation, Item
from jobs.dispatch import work
from lda_core import EngineConfig, PairConfig

REQUESTS = {"generate": GenerateRequest, "score": ScoreRequest, "capture": CaptureRequest}


class ReplicaService:
    """Close it: it has a thread for the replica's coroutines and one for its engine."""

    def __init__(self, pair: PairConfig, max_slots: int = 64, traits: str | None = None) -> None:
        self.asked: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._replica = LDAReplica(
            pair, EngineConfig(max_slots=max_slots), stuck_after_s=60, traits=traits
        )

        async def admit(rows: Any) -> Any:
            return self._replica._submit([rows])[0]

        async def admit_captures(rows: Any) -> Any:
            return self._replica._submit_captures([rows])[0]

        self._replica._admit = admit  # type: ignore[method-assign, assignment]
        self._replica._admit_captures = admit_captures  # type: ignore[method-assign, assignment]

    def close(self) -> None:
        self._replica._engine.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def describe(self) -> PairInfo:
        return asyncio.run_coroutine_threadsafe(self._replica.describe(), self._loop).result()

    def caller(self, generation: Generation) -> Caller:
        return Caller(self, generation)

    def answers(
        self, items: Iterator[Item], generation: Generation, requests: int
    ) -> Generator[list[Answer], None, None]:
        yield from work(items, self.caller(generation), in_flight=64)

    # -- as a handle -------------------------------------------------------------------

    @property
    def generate(self) -> "_Method":
        return _Method(self, "generate")

    @property
    def score(self) -> "_Method":
        return _Method(self, "score")

    @property
    def capture(self) -> "_Method":
        return _Method(self, "capture")


class _Method:
    def __init__(self, service: ReplicaService, name: str) -> None:
        self._service, self._name = service, name

    def remote(self, request: dict[str, Any]) -> "_Response":
        service = self._service
        service.asked.append(self._name)
        method = getattr(service._replica, self._name)
        call = method(parse(REQUESTS[self._name], request))
        return _Response(asyncio.run_coroutine_threadsafe(call, service._loop))


class _Response:
    def __init__(self, future: "Future[Any]") -> None:
        self._future = future

    def result(self, *, timeout_s: float) -> Any:
        return self._future.result(timeout_s)

    def cancel(self) -> None:
        self._future.cancel()
