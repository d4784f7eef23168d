import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from deployments.schemas import InvalidRequest, ReplicaUnavailable
from deployments.sse import Begun, EventStream, error_event, merged


class Source:
    """Items one after the other, then an error or an end; it knows whether it was closed."""

    def __init__(self, *items: Any, wait_s: float = 0.0) -> None:
        self.items, self.wait_s, self.closed = items, wait_s, False

    async def stream(self) -> AsyncGenerator[Any, None]:
        try:
            for item in self.items:
                await asyncio.sleep(self.wait_s)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


def test_items_come_as_they_come_and_all_of_them() -> None:
    async def all_() -> list[Any]:
        over = asyncio.Event()

        async def quick() -> AsyncGenerator[Any, None]:
            for item in range(4):
                yield item
            over.set()

        async def slow() -> AsyncGenerator[Any, None]:
            await over.wait()
            yield "a"
            yield "b"

        async with asyncio.timeout(60):
            return [item async for item in merged([slow(), quick()])]

    assert asyncio.run(all_()) == [0, 1, 2, 3, "a", "b"]


def test_when_one_fails_the_others_are_closed() -> None:
    other = Source(*range(1000), wait_s=0.01)

    async def take() -> None:
        with pytest.raises(KeyError):
            async for _ in merged([other.stream(), Source(KeyError("x"), wait_s=0.02).stream()]):
                pass
        assert other.closed

    asyncio.run(take())


def test_a_stream_that_is_closed_closes_all() -> None:
    sources = [Source(*range(1000), wait_s=0.001) for _ in range(3)]

    async def take() -> None:
        stream = await Begun.of(merged([source.stream() for source in sources]))
        assert [await anext(stream), await anext(stream)]
        await stream.aclose()
        assert all(source.closed for source in sources)

    asyncio.run(take())


def test_what_fails_first_is_raised_before_anything_is_answered() -> None:
    source = Source(1, wait_s=1.0)

    async def take() -> None:
        failing = Source(InvalidRequest("n", "no"))
        with pytest.raises(InvalidRequest):
            await Begun.of(merged([source.stream(), failing.stream()]))
        empty = await Begun.of(merged([]))
        assert [x async for x in empty] == []
        begun = await Begun.of(Source(1, 2).stream())
        assert [x async for x in begun] == [1, 2]

    asyncio.run(take())


@pytest.mark.parametrize("goes", ["stops reading", "is cancelled"])
def test_a_client_that_goes_has_the_stream_closed_at_once(goes: str) -> None:
    source = Source(*map(str, range(1000)), wait_s=0.001)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if goes == "stops reading" and len(sent) > 3:
            raise OSError

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def answer() -> None:
        begun = await Begun.of(source.stream())
        response = EventStream(begun, begun.aclose)
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}}
        task = asyncio.ensure_future(response(scope, receive, send))
        if goes == "is cancelled":
            await asyncio.sleep(0.02)
            task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, BaseException)
        assert source.closed

    asyncio.run(answer())
    assert sent[0]["status"] == 200 and len(sent) > 3
    assert (b"content-type", b"text/event-stream; charset=utf-8") in sent[0]["headers"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("n", "must be 1", "invalid_value"), "invalid_value"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), "queue_full"),
        (ReplicaUnavailable("SECRET"), "unavailable"),
        (KeyError("SECRET"), "internal_error"),
    ],
)
def test_errors_have_the_shape_of_all_errors(error: Exception, code: str) -> None:
    name, data, *rest = error_event(error).split("\n")
    assert name == "event: error" and rest == ["", ""]
    said = json.loads(data.removeprefix("data: "))["error"]
    assert said["code"] == code and {"message", "type", "param", "code"} == {*said}
    assert "SECRET" not in data
