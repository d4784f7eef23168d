"""How a client's requests reach the service over HTTP, and what it does when they do not.

InvalidRequest   the request is bad; the same fails again
Unanswered       no answer in all tries; the same, later, may succeed
Refused          nothing would be answered: no service there, a wrong key, another version
"""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

import httpx
from pydantic import TypeAdapter, ValidationError

from deployments.schemas import Completion, InvalidRequest, PairInfo, PairInfos, Piece, Scored
from jobs.client_capture import from_lists
from jobs.errors import Refused

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
LONGEST_RETRY_AFTER_S = 60.0
TRIES_TO_CONNECT = 3  # to a service that has never answered: it is probably not there
CONNECT_TIMEOUT_S = 10.0
PASSING = (429, 502, 503, 504)  # where the answer does not say itself whether to try again
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOW_TO_SERVE = "start one with `lda serve`, or say where it is with url="

_PATHS = {"generate": "/v1/lda/generate", "score": "/score", "capture": "/capture"}
_ANSWERS: dict[str, TypeAdapter[Any]] = {
    "generate": TypeAdapter(list[Completion]),
    "score": TypeAdapter(list[Scored]),
    "capture": TypeAdapter(list[dict[str, Any]]),
}


class Unanswered(Exception):
    """No answer came, in all tries; the message is the last one's."""


class Transport(Protocol):
    """The client's way to the service."""

    async def ask(self, method: str, request: Mapping[str, Any]) -> Any:
        """What `generate`, `score` or `capture` answers."""
        ...

    def stream(
        self, request: Mapping[str, Any], alphas: list[float]
    ) -> AsyncGenerator[Piece, None]: ...

    async def describe(self, pair: str | None) -> PairInfo: ...

    async def aclose(self) -> None: ...


class HttpTransport:
    """Asks again, the same seed and all, where the connection was lost, no replica could answer
    (`retries` times) or the queue was full (until `timeout_s`, which is for all tries together).

    `transport`: httpx's own, for a way of one's own (a proxy, an ASGI application).
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        in_flight: int,
        timeout_s: float,
        retries: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused(f"url: must begin with http:// or https://, not {url!r}")
        self._url = url.rstrip("/")
        self._timeout_s, self._retries = timeout_s, retries
        self._answered = False
        self._http = httpx.AsyncClient(
            base_url=self._url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # timeout_s is ours
            limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
            transport=transport,
            trust_env=parts.hostname not in LOOPBACK,  # a proxy cannot see this machine
        )

    async def ask(self, method: str, request: Mapping[str, Any]) -> Any:
        """Capture's answers are Activations; what JSON cannot hold is refused there."""
        content = await self._body("POST", _PATHS[method], request)
        answer = _checked(_ANSWERS[method], content)
        return [from_lists(one) for one in answer] if method == "capture" else answer

    async def describe(self, pair: str | None) -> PairInfo:
        path = "/ready" if pair is None else f"/ready?{urlencode({'pair': pair})}"
        content = await self._body("GET", path, None)
        found: PairInfo | PairInfos = _checked(TypeAdapter(PairInfo | PairInfos), content)
        if isinstance(found, PairInfos):
            known = ", ".join(found.pairs)
            raise InvalidRequest("pair", f"must be the name of a pair; there are {known}")
        return found

    async def stream(
        self, request: Mapping[str, Any], alphas: list[float]
    ) -> AsyncGenerator[Piece, None]:
        """Asks again only before the first piece."""
        of = {"alphas": alphas} if len(alphas) > 1 else {"alpha": alphas[0]}
        asked = {**request, **of}
        try:
            async with self._answer("POST", "/stream", asked, whole=False) as response:
                async with aclosing(_events(response)) as events:
                    async for name, data in events:
                        if name == "error":
                            raise _streamed_error(data)
                        yield _checked(TypeAdapter(Piece), data)
        except httpx.TransportError as error:  # while the answer was read
            raise Unanswered(_said(error)) from None

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _body(self, verb: str, path: str, request: Mapping[str, Any] | None) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._answer(verb, path, request, whole=True) as response:
                    return response.content
        except TimeoutError:
            raise Unanswered(f"no answer in {self._timeout_s:g} s") from None

    @asynccontextmanager
    async def _answer(
        self, verb: str, path: str, request: Mapping[str, Any] | None, *, whole: bool
    ) -> AsyncIterator[httpx.Response]:
        """A good answer: `whole`, or its body is still to be read."""
        failures = tries = 0
        while True:
            wait_s, patient = 0.0, False
            try:
                built = self._built(verb, path, request)
                response = await self._http.send(built, stream=not whole)
            except httpx.TransportError as error:
                problem = _said(error)
                if not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
                    self._answered = True  # it went while it did
                elif not self._answered and isinstance(error, httpx.ConnectError):
                    if failures + 1 >= TRIES_TO_CONNECT:
                        raise Refused(
                            f"no service at {self._url}: {problem}\n{HOW_TO_SERVE}"
                        ) from None
            else:
                self._answered = True
                try:
                    if response.status_code == 200:
                        yield response
                        return
                    await response.aread()
                    _raise_if_final(response)
                    problem = f"{response.status_code}: {_message(response)}"
                    wait_s = _retry_after_s(response)
                    patient = response.status_code == 429
                finally:
                    await response.aclose()
            failures += not patient
            if failures > self._retries:
                raise Unanswered(problem)
            # Jitter, or all that a dead replica dropped would come back at one instant.
            backoff_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**tries)
            await asyncio.sleep(wait_s + backoff_s * random.uniform(0.5, 1.5))
            tries += 1

    def _built(self, verb: str, path: str, request: Mapping[str, Any] | None) -> httpx.Request:
        if request is None:
            return self._http.build_request(verb, path)
        body = json.dumps(request).encode("ascii")
        return self._http.build_request(
            verb, path, content=body, headers={"content-type": "application/json"}
        )


def _checked(answer: TypeAdapter[Any], content: bytes | str) -> Any:
    try:
        return answer.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(
            f"the service does not answer in this client's words ({where}: {first['msg']}): "
            "another version?"
        ) from None


def _raise_if_final(response: httpx.Response) -> None:
    """Raises what asking again would not change."""
    status = response.status_code
    said = response.headers.get("x-should-retry")
    if said == "true" or (said is None and status in PASSING):
        return
    message = _message(response)
    if status in (400, 422):
        error = _error(response)
        param = str(error.get("param") or "")
        code = str(error.get("code") or "invalid_value")
        raise InvalidRequest(param, message.removeprefix(f"{param}: "), code)
    if status < 500:
        raise Refused(f"{response.url} answers {status}: {message}")
    raise Unanswered(f"{status}: {message}")


def _error(response: httpx.Response) -> Mapping[str, Any]:
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, Mapping) else {}


def _message(response: httpx.Response) -> str:
    return str(_error(response).get("message") or response.reason_phrase)


def _retry_after_s(response: httpx.Response) -> float:
    """Retry-After in seconds; 0 where it says a date or nothing."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if seconds == seconds else 0.0


async def _events(response: httpx.Response) -> AsyncGenerator[tuple[str, str], None]:
    """Name and data of each server-sent event before [DONE]."""
    name, data = "", ""
    async for line in response.aiter_lines():
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data += line.removeprefix("data:").strip()
        elif not line and data:
            if data == "[DONE]":
                return
            yield name, data
            name, data = "", ""
    raise Unanswered("the connection was lost in the middle of the answer")


def _streamed_error(data: str) -> Exception:
    try:
        error = json.loads(data)["error"]
        message, kind = str(error["message"]), error.get("type")
    except (ValueError, LookupError, TypeError, AttributeError):
        return Unanswered("the answer ended in an error")
    if kind == "invalid_request_error":
        param = str(error.get("param") or "")
        return InvalidRequest(param, message.removeprefix(f"{param}: "), str(error.get("code")))
    return Unanswered(message)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
