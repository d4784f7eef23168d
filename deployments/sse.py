"""Server-sent events: several streams as one, begun before the answer is, ended with its client."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, Self, TypeVar

from fastapi.responses import StreamingResponse
from ray.serve.exceptions import BackPressureError
from starlette.types import Receive, Scope, Send

from deployments.http_errors import error_body, internal_error_body
from deployments.schemas import InvalidRequest, ReplicaUnavailable

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


def event(data: str, name: str | None = None) -> str:
    """One event; `data` is JSON, which has no line breaks."""
    return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"


def error_event(error: Exception) -> str:
    """The last event of an answer that has begun and cannot be finished."""
    return event(json.dumps({"error": streamed_error(error)}), "error")


def streamed_error(error: Exception) -> dict[str, Any]:
    """In the shape, and with the words, of the same error as an answer of its own."""
    if isinstance(error, InvalidRequest):
        return error_body(error)
    body: dict[str, Any] = {"type": "server_error", "param": None}
    if isinstance(error, BackPressureError):
        return {"message": "too many requests are waiting", **body, "code": "queue_full"}
    if isinstance(error, TimeoutError):
        error = ReplicaUnavailable()
    if isinstance(error, ReplicaUnavailable):
        return {"message": error.told, **body, "code": error.code}
    return internal_error_body(error)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all as they come. When one fails, or this is closed, all are closed."""
    queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        try:
            async for item in stream:
                queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)
        finally:
            await stream.aclose()

    tasks = [asyncio.ensure_future(drain(stream)) for stream in streams]
    try:
        going = len(tasks)
        while going:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                going -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Begun(Generic[T]):
    """A stream whose first item is there: what is refused is refused before the answer begins."""

    def __init__(self, stream: AsyncGenerator[T, None], first: list[T]) -> None:
        self._stream, self._first = stream, first

    @classmethod
    async def of(cls, stream: AsyncGenerator[T, None]) -> Self:
        """Raises what the stream raises instead of its first item."""
        try:
            return cls(stream, [await anext(stream)])
        except StopAsyncIteration:
            return cls(stream, [])
        except BaseException:
            await stream.aclose()
            raise

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        return self._first.pop() if self._first else await anext(self._stream)

    async def aclose(self) -> None:
        await self._stream.aclose()


class EventStream(StreamingResponse):
    """`close` is called when the answer has ended or its client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], Awaitable[None]]) -> None:
        # Nothing on the way may keep it back.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()
