"""What only Serve's HTTP proxy can do for the edge; it runs there, before Serve's own code.

Ray calls `middlewares` in each proxy if the environment in which its cluster is started has
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy_guard:middlewares. Without it the
service works and is guarded by its edge, but

- many requests whose bodies do not come cost the others pauses (`deployments.collector`);
- an answer that its client does not read waits in the proxy's memory for as long as the client
  likes, and its rows are decoded to their end;
- the proxy says an `x-request-id` back as it came, and fails with a bare 500 on some headers that
  are not UTF-8.

The connection of a client that does not read stays open even so until the client closes it: the
server waits for what it wrote last, at most two of PIECE_BYTES, to be read.
"""

import asyncio
from collections.abc import Iterator

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.collector import make_full_collections_rare
from deployments.request_ids import HEADER, is_good

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy_guard:middlewares"}
SEND_TIMEOUT_S = 30.0
# The server waits for its client only before it writes, so the last part of an answer is always in
# memory: it must not be all of it.
PIECE_BYTES = 64 * 2**10

# Serve obeys these, and reads their values as UTF-8. No client of ours needs them, and the last
# one would keep the rows of clients that have gone.
_SERVES_OWN = (
    *("serve-multiplexed-model-id", "x-session-id"),
    *("x-request-timeout-seconds", "x-request-disconnect-disabled"),
)


def middlewares() -> list[Middleware]:
    make_full_collections_rare()
    return [Middleware(ProxyGuard)]


class ProxyGuard:
    def __init__(self, app: ASGIApp, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._app, self._send_timeout_s = app, send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = [pair for pair in scope["headers"] if _passes(*pair)]
            scope = {**scope, "headers": headers}
        if scope["type"] == "http":
            connection = _Connection(receive, send, self._send_timeout_s)
            receive, send = connection.receive, connection.send
        await self._app(scope, receive, send)


def _passes(name: bytes, value: bytes) -> bool:
    known = name.decode("latin-1").replace("_", "-")
    return is_good(value.decode("latin-1")) if known == HEADER else known not in _SERVES_OWN


class _Connection:
    """Once PIECE_BYTES could not be sent in time, the client counts as gone: so it is told to
    Serve, which stops the request, and nothing more is kept for the client."""

    def __init__(self, receive: Receive, send: Send, timeout_s: float) -> None:
        self._receive, self._send, self._timeout_s = receive, send, timeout_s
        self._cut = asyncio.Event()

    async def send(self, message: Message) -> None:
        for piece in _pieces(message):
            if self._cut.is_set():
                return
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._send(piece)
            except TimeoutError:
                self._cut.set()

    async def receive(self) -> Message:
        received = asyncio.ensure_future(self._receive())
        cut = asyncio.ensure_future(self._cut.wait())
        try:
            await asyncio.wait((received, cut), return_when=asyncio.FIRST_COMPLETED)
            return received.result() if received.done() else {"type": "http.disconnect"}
        finally:
            received.cancel()
            cut.cancel()


def _pieces(message: Message) -> Iterator[Message]:
    body = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        end = start + PIECE_BYTES
        more = end < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start:end], "more_body": more}
