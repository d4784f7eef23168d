"""The OpenAI API's routes; a part of the ingress."""

import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments import model_names
from deployments.metrics_routes import MetricsRoutes
from deployments.openai_words import ChatRequest, CompletionRequest
from deployments.openai_work import Work
from deployments.schemas import PairInfo
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
_SAID_OF_PAIRS = {"after", "before", "adapter"}


class OpenAIRoutes(TokenizerRoutes, MetricsRoutes):
    @router.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """Names to put into `model`, and under `lda` what each is; `lda:alpha=A` (of a pair with a
        name of its own `NAME:alpha=A`) is the amplified model at any other alpha."""
        infos = await self._pairs.describe()
        names = model_names.names(list(infos))
        return {"object": "list", "data": [_card(name, infos) for name in names]}

    @router.get("/v1/models/{model}")
    async def model(self, model: str) -> dict[str, Any]:
        """One of them."""
        pair = model_names.resolve(model, None, self._pairs.names).pair
        return _card(model, {pair: await self._pairs.of(pair).describe()})

    @router.post("/v1/completions", response_class=Response, responses=_ANSWERS)
    async def completions(self, body: CompletionRequest) -> Response:
        """Texts that go on from prompts, in text or tokens."""
        return await self._worked(body)

    @router.post("/v1/chat/completions", response_class=Response, responses=_ANSWERS)
    async def chat_completions(self, body: ChatRequest) -> Response:
        """Answers to messages, in the form that the tokenizer's template gives them."""
        return await self._worked(body)

    async def _worked(self, body: CompletionRequest | ChatRequest) -> Response:
        names = self._pairs.names
        pair = model_names.resolve(body.model, body.alpha, names).pair
        work = Work(self._pairs.of(pair), self._limits, body, names)
        return await work.stream() if body.stream else JSONResponse(await work.answer())


def _card(name: str, infos: Mapping[str, PairInfo]) -> dict[str, Any]:
    """`infos`: by pair, at least that of the model."""
    pair, alpha = model_names.resolve(name, None, list(infos))
    info = infos[pair]
    return {
        "id": name,
        "object": "model",
        "created": _SINCE,
        "owned_by": "lda-serve",
        "max_model_len": info.context_length,
        "lda": {"pair": pair, "alpha": alpha, **info.model_dump(include=_SAID_OF_PAIRS)},
    }
