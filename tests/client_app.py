"""The service's HTTP face without the service: an ASGI application with a script of mishaps."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from fakes import PAIR, complete
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.schemas import Completion, GenerateRequest, parse


def error(status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
    body = {"message": message, "type": "server_error", "param": None, "code": None, **more}
    return JSONResponse({"error": body}, status, headers)


@dataclass
class FakeApp:
    """Each request takes the next of `mishaps` (a response, an exception, None: no mishap)."""

    answer: Callable[[GenerateRequest], list[Completion]] = complete
    mishaps: list[Any] = field(default_factory=list)
    seen: list[GenerateRequest] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    delay_s: float = 0.0
    under_way: int = 0
    most_under_way: int = 0
    gone: int = 0  # requests whose client went before they were answered
    hold: asyncio.Event | None = None
    events: list[str] = field(default_factory=list)
    streamed: list[Any] = field(default_factory=list)
    pairs: tuple[str, ...] = ()  # names, where there are several

    def transport(self) -> httpx.ASGITransport:
        routes = [
            Route("/v1/lda/generate", self._generate, methods=["POST"]),
            Route("/stream", self._stream, methods=["POST"]),
            Route("/ready", self._ready),
        ]
        return httpx.ASGITransport(Starlette(routes=routes))

    async def _generate(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        asked = parse(GenerateRequest, await request.json())
        self.seen.append(asked)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.hold:
                await self.hold.wait()
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.gone += 1
            raise
        finally:
            self.under_way -= 1
        mishap = self.mishaps.pop(0) if self.mishaps else None
        if isinstance(mishap, Exception):
            raise mishap
        if mishap is not None:
            return mishap
        return JSONResponse([one.model_dump(mode="json") for one in self.answer(asked)])

    async def _stream(self, request: Request) -> Response:
        self.streamed.append(await request.json())
        mishap = self.mishaps.pop(0) if self.mishaps else None
        if mishap is not None:
            return mishap

        async def events() -> Any:
            for one in self.events:
                yield one

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _ready(self, request: Request) -> Response:
        def of(name: str) -> dict[str, Any]:
            return {**PAIR.model_dump(mode="json"), "after": name}

        if name := request.query_params.get("pair"):
            return JSONResponse(of(name))
        if self.pairs:
            return JSONResponse({"pairs": {name: of(name) for name in self.pairs}})
        return JSONResponse(PAIR.model_dump(mode="json"))


def piece(text: str, **fields: Any) -> str:
    """An event of a stream."""
    said = {"index": 0, "alpha": 1.0, "text": text, "token_ids": [1], **fields}
    return f"data: {json.dumps(said)}\n\n"
