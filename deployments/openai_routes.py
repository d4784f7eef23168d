"""The OpenAI API's routes; a part of the ingress."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments import model_names
from deployments.metrics_routes import MetricsRoutes
from deployments.openai_words import ChatRequest, CompletionRequest
from deployments.openai_work import Work
from deployments.schemas import (
    Completion,
    GenerateRequest,
    Limits,
    PairInfo,
    Piece,
    Scored,
    ScoreRequest,
)
from deployments.tokenizer_routes import TokenizerRoutes

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's answer, each choice with `lda`; with stream true its chunks, then "
        "`data: [DONE]`, or an event named `error` where the answer cannot be finished.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}

router = APIRouter()
_SINCE = int(time.time())


class OpenAIRoutes(TokenizerRoutes, MetricsRoutes):
    _limits: Limits

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        raise NotImplementedError

    def stream(self, request: GenerateRequest) -> AsyncGenerator[list[Piece], None]:
        raise NotImplementedError

    async def score(self, request: ScoreRequest) -> list[Scored]:
        raise NotImplementedError

    async def describe(self) -> PairInfo:
        raise NotImplementedError

    @router.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """Names to put into `model`; `lda:alpha=A` is the amplified model at any other alpha."""
        info = await self.describe()
        return {"object": "list", "data": [_card(name, info) for name in model_names.names()]}

    @router.get("/v1/models/{model}")
    async def model(self, model: str) -> dict[str, Any]:
        """One of them."""
        model_names.resolve(model, None)
        return _card(model, await self.describe())

    @router.post("/v1/completions", response_class=Response, responses=_ANSWERS)
    async def completions(self, body: CompletionRequest) -> Response:
        """Texts that go on from prompts, in text or tokens."""
        return await self._worked(body)

    @router.post("/v1/chat/completions", response_class=Response, responses=_ANSWERS)
    async def chat_completions(self, body: ChatRequest) -> Response:
        """Answers to messages, in the form that the tokenizer's template gives them."""
        return await self._worked(body)

    async def _worked(self, body: CompletionRequest | ChatRequest) -> Response:
        work = Work(self, self._limits, body)
        return await work.stream() if body.stream else JSONResponse(await work.answer())


def _card(name: str, info: PairInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _SINCE,
        "owned_by": "lda-serve",
        "max_model_len": info.context_length,
    }
