"""The page over a scripted `/stream`: no model, no Ray."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from deployments.http_errors import install_error_handlers
from deployments.local_service import free_port
from deployments.page_routes import add_page_routes
from deployments.schemas import (
    Completion,
    GenerateRequest,
    InvalidRequest,
    Piece,
    ReplicaUnavailable,
    StreamRequest,
    TokenLogprobs,
    parse,
)
from deployments.sse import DONE, error_event, event

EOS = 2


@dataclass
class Script:
    """What the server answers: `answers[alpha]` are the tokens of sample 0, 1, ..., turned."""

    answers: dict[float, list[list[str]]] = field(default_factory=dict)
    default: list[list[str]] = field(default_factory=lambda: [["Fine", "."]])
    pause_s: float = 0.0  # before each step
    refuse: tuple[str, str] | None = None  # param and message, before the stream begins
    break_after: int | None = None  # steps, then an error event
    results: Path | None = None
    pairs: tuple[str, ...] = ()  # names, where there are several
    asked: list[dict[str, Any]] = field(default_factory=list)
    cancelled: int = 0

    def tokens(self, alpha: float, sample: int) -> list[str]:
        of_alpha = self.answers.get(alpha, self.default)
        return of_alpha[sample % len(of_alpha)]


def numbers(place: int) -> tuple[float, float, float, float]:
    """after, before, amplified, kl of the token at a place."""
    return -0.5, -0.5 - 1.5 * place, -0.25, 0.3 * place


def columns(places: range) -> TokenLogprobs:
    after, before, amplified = (list(c) for c in list(zip(*map(numbers, places), strict=True))[:3])
    return TokenLogprobs(after=after, before=before, amplified=amplified)


def completion(request: GenerateRequest, sample: int, tokens: list[str]) -> Completion:
    text, places = "".join(tokens), range(len(tokens) + 1)
    return Completion(
        text=text,
        token_ids=[*map(token_id, tokens), EOS],
        finish_reason="eos",
        eos_index=len(tokens),
        eos_text_offset=len(text),
        seed=(request.seed or 0) + sample,
        alpha=request.alpha,
        prompt_tokens=3,
        formatted_prompt="-",
        logprobs=columns(places),
        kl=[numbers(i)[3] for i in places],
        token_ends=[len("".join(tokens[: i + 1])) for i in places],
    )


def token_id(text: str) -> int:
    return 10 + sum(i * ord(c) for i, c in enumerate(text, 1))


def piece(request: GenerateRequest, sample: int, tokens: list[str], place: int) -> Piece:
    last = place == len(tokens)
    return Piece(
        index=sample,
        alpha=request.alpha,
        text="" if last else tokens[place],
        token_ids=[EOS if last else token_id(tokens[place])],
        logprobs=columns(range(place, place + 1)),
        kl=[numbers(place)[3]],
        completion=completion(request, sample, tokens) if last else None,
    )


async def events(script: Script, requests: list[GenerateRequest]) -> AsyncIterator[str]:
    rows = [
        (request, sample, script.tokens(request.alpha, sample))
        for request in requests
        for sample in range(request.n)
    ]
    try:
        for place in range(max(len(tokens) for _, _, tokens in rows) + 1):
            await asyncio.sleep(script.pause_s)
            if script.break_after is not None and place >= script.break_after:
                yield error_event(ReplicaUnavailable())
                return
            for row in rows:
                if place <= len(row[2]):
                    yield event(piece(*row, place).model_dump_json())
        yield DONE
    except asyncio.CancelledError:
        script.cancelled += 1
        raise


def app_of(script: Script) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)
    add_page_routes(app, lambda: script.results)

    @app.get("/ready")
    def ready() -> dict[str, Any]:
        def of(name: str) -> dict[str, Any]:
            return {"after": f"{name}/after", "before": f"{name}/before", "adapter": None}

        return {"pairs": {name: of(name) for name in script.pairs}} if script.pairs else of("org")

    @app.post("/stream")
    async def stream(body: dict[str, Any]) -> StreamingResponse:
        script.asked.append(dict(body))
        if script.refuse:
            raise InvalidRequest(*script.refuse)
        requests = parse(StreamRequest, body).requests()
        return StreamingResponse(events(script, requests), media_type="text/event-stream")

    return app


@contextmanager
def page_server(script: Script) -> Iterator[str]:
    """Its address, until the block ends."""
    port = free_port()
    config = uvicorn.Config(app_of(script), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(20)
