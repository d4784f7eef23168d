"""The edge of the service: what every HTTP request passes before a route sees it.

In order: its id, its headers' size, the Host, the key, the key's share, the body, what kind of JSON
that is. A refusal has the shape of every error and repeats nothing of what was sent. Each request
ends in one line of the access log, which holds no text of a client's either.
"""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import request_ids
from deployments.edge_body import Bodies, ClientGone, Refused, has_body, replayed
from deployments.edge_json import MAX_KEYS, TooManyValues, check_json
from deployments.edge_options import EdgeOptions, Keys
from deployments.http_errors import answer, error_body, internal_error
from deployments.ingress_metrics import count
from deployments.schemas import InvalidRequest

logger = logging.getLogger("ray.serve.access")

OPEN_PATH = "/health"
CLIENT_GONE = 499  # in the log: nginx's number for it
_METHODS = frozenset("GET HEAD POST PUT PATCH DELETE OPTIONS".split())
# Larger ones are looked at in a thread: others are answered between its steps, each of which holds
# the interpreter, for tenths of a second with the largest bodies.
_LARGE_BYTES = 2**18


class Edge:
    """The rules and what they count, in one ingress."""

    def __init__(
        self, options: EdgeOptions, listening: str | None, *, serve_tells_id: bool = True
    ) -> None:
        """`listening`: the address that Serve's proxy listens on, None for no address.
        `serve_tells_id`: its proxy puts the id that it passed on into the answer by itself.

        Raises EdgeError where the service must not be reached like this.
        """
        options.require_keys_beyond_loopback(listening)
        self._options = options
        keys = options.read_keys()
        self._keys = Keys(keys) if keys else None
        self._hosts = options.allowed_hosts(listening)
        self._serve_tells_id = serve_tells_id
        self._bodies = Bodies(options)
        self._in_flight: Counter[str] = Counter()

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.monotonic()
        headers = Headers(scope=scope)
        asked = headers.get(request_ids.HEADER)
        request_id = request_ids.begin(asked)
        tell_id = not (self._serve_tells_id and asked == request_id)
        status: int | None = None
        key: str | None = None

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(request_ids.HEADER.encode(), request_id.encode())] if tell_id else []
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            self._check_headers(scope, headers)
            key = self._name_of_key(scope, headers)
            self._take(key)
            try:
                async with self._bodies.read(headers, receive) as body:
                    await self._check_body(body, scope)
                    await app(scope, replayed(body, receive), told)
            finally:
                self._give_back(key)
        except ClientGone:
            pass
        except Exception as error:
            if status is not None:  # the answer has begun
                raise
            await _answer_to(error)(scope, receive, told)
        finally:
            self._log(request_id, scope, status or CLIENT_GONE, time.monotonic() - begun, key)

    def _check_headers(self, scope: Scope, headers: Headers) -> None:
        all_headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in all_headers)
        if len(all_headers) > self._options.max_headers or size > self._options.max_headers_bytes:
            raise Refused(431, "the headers are too many or too large", "headers_too_large")
        if self._hosts is not None:
            host = headers.get("host", "").strip().lower()
            name, colon, port = host.rpartition(":")
            if colon and port.isdigit():
                host = name
            if len(headers.getlist("host")) != 1 or host not in self._hosts:
                raise Refused(400, "this service has another name (edge.hosts)", "host_not_allowed")

    def _name_of_key(self, scope: Scope, headers: Headers) -> str | None:
        """Raises Refused where a key is asked for and none of ours is there."""
        if self._keys is None:
            return None
        name = self._keys.name_of(scope["headers"])
        # A stranger's body is not read: it would take the place of others'.
        is_open = (
            scope["path"] == scope.get("root_path", "") + OPEN_PATH
            and scope["method"] in ("GET", "HEAD")
            and not has_body(headers)
        )
        if name is None and not is_open:
            raise Refused(
                401,
                "no API key, or none of this service's: send authorization: Bearer KEY",
                "invalid_api_key",
                headers=(
                    ("www-authenticate", "Bearer"),
                    ("www-authenticate", 'Basic realm="LDA Serve"'),  # lets a browser ask
                ),
            )
        return name

    def _take(self, key: str | None) -> None:
        most = self._options.max_in_flight_per_key
        if key is not None:
            if most is not None and self._in_flight[key] >= most:
                raise Refused(
                    429, "too many requests of this key", "too_many_of_key", retry_after_s=1
                )
            self._in_flight[key] += 1

    def _give_back(self, key: str | None) -> None:
        if key is not None:
            self._in_flight[key] -= 1

    async def _check_body(self, body: bytes, scope: Scope) -> None:
        if not body:
            return
        most = self._options.max_json_depth, self._options.max_json_values

        def check() -> None:
            check_json(body, *most, lambda: _field_names(scope["app"]))

        try:
            if len(body) > _LARGE_BYTES:
                await asyncio.to_thread(check)
            else:
                check()
        except TooManyValues:
            raise Refused(
                413,
                f"the body has more than {most[1]} values, or an object more than {MAX_KEYS} keys",
                "too_many_values",
            ) from None

    def _log(
        self, request_id: str, scope: Scope, status: int, seconds: float, key: str | None
    ) -> None:
        method = scope["method"]
        line = {
            "request_id": request_id,
            "method": method if method in _METHODS else None,
            "route": getattr(scope.get("route"), "path", None),
            "status": status,
            "seconds": round(seconds, 4),
            "key": key,
        }
        logger.info(json.dumps(line))


class EdgeMiddleware:
    """`edge` is asked with each request: Serve copies the application before there is one."""

    def __init__(self, app: ASGIApp, edge: Callable[[], Edge]) -> None:
        self._app, self._edge = app, edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._edge().serve(self._app, scope, receive, send)
        else:  # no route speaks anything else
            await send({"type": "websocket.close", "code": 1008})


def _answer_to(error: Exception) -> Response:
    if isinstance(error, (Refused, InvalidRequest)):
        count("lda_edge_refused", code=error.code)
    if isinstance(error, Refused):
        kind = "server_error" if error.status == 429 else "invalid_request_error"
        body = {"message": error.message, "type": kind, "param": None, "code": error.code}
        response = answer(error.status, body, retry_after_s=error.retry_after_s)
        for name, value in error.headers:
            response.headers.append(name, value)
        return response
    if isinstance(error, InvalidRequest):
        return answer(400, error_body(error))
    return internal_error(error)


@cache
def _field_names(app: Any) -> frozenset[str]:
    """Of everything that the API's own description says: these are not a client's words."""
    schemas = app.openapi().get("components", {}).get("schemas", {})
    return frozenset(name for one in schemas.values() for name in one.get("properties", {}))
