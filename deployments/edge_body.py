"""Bodies read whole before the application sees the request: in time, and within bounds.

Serve's proxy hands a request to the ingress as soon as its headers are there, and buffers without
a bound what nobody reads. So a body is read at once or refused at once.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from deployments.edge_options import EdgeOptions

# Not counted in max_bodies_bytes: large bodies that stall must not shut out the small ones.
SMALL_BYTES = 64 * 2**10


class Refused(Exception):
    """Answered with `status`; `retry_after_s` where the same, later, may pass."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        retry_after_s: int | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(status, message, code)
        self.status, self.message, self.code = status, message, code
        self.retry_after_s = retry_after_s
        self.headers = headers


class ClientGone(Exception):
    """Before its body was whole: there is nobody to answer."""


class Bodies:
    """Of all requests of this process."""

    def __init__(self, options: EdgeOptions) -> None:
        self._options = options
        self.reading = 0  # bodies
        self.held_bytes = 0  # of requests not yet answered, beyond SMALL_BYTES each

    @asynccontextmanager
    async def read(self, headers: Headers, receive: Receive) -> AsyncIterator[bytes]:
        """The body; its bytes count until the block ends. Raises Refused, ClientGone."""
        if not has_body(headers):
            yield b""
            return
        self._check(headers)
        if self.reading >= self._options.max_bodies:
            raise _busy()
        chunks: list[bytes] = []
        length = held = 0
        self.reading += 1
        try:
            try:
                async with asyncio.timeout(self._options.body_timeout_s):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGone
                        more = message.get("more_body", False)
                        chunks.append(message.get("body", b""))
                        length += len(chunks[-1])
                        if length > self._options.max_body_bytes:
                            raise self._too_large()
                        beyond = max(0, length - SMALL_BYTES) - held
                        if beyond and self.held_bytes + beyond > self._options.max_bodies_bytes:
                            raise _busy()
                        held += beyond
                        self.held_bytes += beyond
            except TimeoutError:
                limit = f"{self._options.body_timeout_s:g} s"
                raise Refused(
                    408,
                    f"the body was not there within {limit}",
                    "body_timeout",
                    headers=[("connection", "close")],
                ) from None
            finally:
                self.reading -= 1
            body = b"".join(chunks)
            chunks.clear()  # what is counted is held once
            yield body
        finally:
            self.held_bytes -= held

    def _check(self, headers: Headers) -> None:
        """What its headers say of a body already."""
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refused(415, "send the body uncompressed", "unsupported_content_encoding")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise Refused(400, "content-length: must be a number", "invalid_content_length")
        if len(length) > 18 or int(length) > self._options.max_body_bytes:
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        main, _, sub = kind.partition("/")
        if main != "application" or not (sub == "json" or sub.endswith("+json")):
            raise Refused(
                415,
                "send JSON, with the header content-type: application/json",
                "unsupported_content_type",
            )

    def _too_large(self) -> Refused:
        # The connection stays open: what still comes is dropped by the server, and the client,
        # which may read only once it has sent all, hears why.
        most = self._options.max_body_bytes
        return Refused(413, f"the body is larger than {most} bytes", "body_too_large")


def _busy() -> Refused:
    return Refused(429, "too many bodies are being read", "too_many_bodies", retry_after_s=1)


def has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip() != "0"


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first, and of the real one only that the client has gone."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message

    return replay
