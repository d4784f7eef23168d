"""The cheap door before the models: HTTP and handle calls in, requests to replicas out.

It holds no model, and tensors only as they pass. A request whose replica dies is sent again: it
has its seed, so the text is the same.
"""

import asyncio
import importlib.metadata
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi_offline import FastAPIOffline
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from deployments import metrics_routes, openai_routes, tokenizer_routes
from deployments.capture_lists import CapturedLists, as_json, require_scores_only
from deployments.collector import make_full_collections_rare
from deployments.edge import Edge, EdgeMiddleware
from deployments.edge_options import EdgeOptions
from deployments.http_errors import RESPONSES, error_body, install_error_handlers
from deployments.page_routes import add_page_routes
from deployments.plain_api import (
    LDABatchRequest,
    LDABatchResponse,
    LDARequest,
    LDAResponse,
    LDAResult,
    ModelAnswer,
    RowError,
    Sample,
    SideBySideRequest,
    SideBySideResponse,
    TokenizerCompatibility,
)
from deployments.resend import together
from deployments.resident_pairs import ResidentPairs, with_seed
from deployments.schemas import (
    Captured,
    CaptureRequest,
    Completion,
    GenerateRequest,
    InvalidRequest,
    Limits,
    PairInfo,
    PairInfos,
    Piece,
    Scored,
    ScoreRequest,
    StreamRequest,
    parse,
)
from deployments.sse import DONE, Begun, EventStream, error_event, event, merged

# The pages under /docs come from this server, not from a CDN.
app = FastAPIOffline(
    title="LDA Serve", version=importlib.metadata.version("lda-serve"), responses=RESPONSES
)
install_error_handlers(app)
for part in (openai_routes, tokenizer_routes, metrics_routes):
    app.include_router(part.router)
add_page_routes(app, lambda: serve.get_replica_context().servable_object.results)
app.add_middleware(EdgeMiddleware, edge=lambda: serve.get_replica_context().servable_object.edge)


# A job that starts while replicas do waits for them; HTTP answers sooner, with 503.
DESCRIBED_BY_HANDLE_S = 50.0


def listening_host() -> str | None:
    """Where this cluster's HTTP proxies listen; None: nowhere."""
    host: str | None = _get_global_client().http_config.host
    return host


def require_good(done: list[Completion]) -> list[Completion]:
    """Raises InvalidRequest if all rows failed: the same request would fail again. Of several
    samples each carries its own error."""
    errors = [completion.error for completion in done]
    if None not in errors:
        raise InvalidRequest("", errors[0] or "", "row_failed")
    return done


async def piece_events(pieces: AsyncIterator[list[Piece]]) -> AsyncGenerator[str, None]:
    try:
        async for some in pieces:
            yield "".join(event(piece.model_dump_json()) for piece in some)
        yield DONE
    except Exception as error:
        yield error_event(error)


# Serve copies the app here, with the functions and globals that exist by now: whatever the
# routes call must stand above.
@serve.ingress(app)
class Ingress(openai_routes.OpenAIRoutes):
    def __init__(
        self,
        replicas: Mapping[str, DeploymentHandle],
        limits: Limits,
        results: str | None = None,
        edge: EdgeOptions | None = None,
    ) -> None:
        """`replicas`: of each pair, by its name; `results`: the folder whose finished runs the page
        shows. Raises EdgeError, which fails the deploy, where anyone could reach the service."""
        make_full_collections_rare()
        self.edge = Edge(edge or EdgeOptions(), listening_host())
        self._pairs = ResidentPairs(replicas, limits)
        self._limits = limits
        self.results = None if results is None else Path(results)

    # -- by handle ---------------------------------------------------------------------

    async def generate(self, request: GenerateRequest | Mapping[str, Any]) -> list[Completion]:
        """The `n` completions of a request (or of a dict with its fields).

        Raises InvalidRequest (also after several replicas died of it), BackPressureError,
        ReplicaUnavailable where no replica can be had.
        """
        if not isinstance(request, GenerateRequest):
            request = parse(GenerateRequest, request)
        return await self._pairs.of(request.pair).generate(request)

    async def stream(
        self, request: GenerateRequest | Mapping[str, Any]
    ) -> AsyncGenerator[list[Piece], None]:
        """The same completions while they come; for `handle.options(stream=True)`.

        Raises as `generate` does. A replica that dies before the first piece is replaced by
        another one; after that this ends in ReplicaUnavailable.
        """
        if not isinstance(request, GenerateRequest):
            request = parse(GenerateRequest, request)
        async with aclosing(self._pairs.of(request.pair).stream(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, request: ScoreRequest | Mapping[str, Any]) -> list[Scored]:
        """How likely each continuation of a prompt is; raises as `generate` does."""
        if not isinstance(request, ScoreRequest):
            request = parse(ScoreRequest, request)
        return await self._pairs.of(request.pair).score(request)

    async def capture(self, request: CaptureRequest | Mapping[str, Any]) -> list[Captured]:
        """What both models hold at every token of each completion; raises as `generate` does."""
        if not isinstance(request, CaptureRequest):
            request = parse(CaptureRequest, request)
        return await self._pairs.of(request.pair).capture(request)

    async def describe(self, pair: str | None = None) -> PairInfo:
        """What a resident pair is. Raises InvalidRequest for a name that is none, NotReady, which
        says why no replica answers."""
        return await self._pairs.of(pair).describe(DESCRIBED_BY_HANDLE_S)

    # -- over HTTP: the plain LDA server's endpoints -------------------------------------

    @app.post("/generate_lda")
    async def generate_lda(self, body: LDARequest) -> LDAResponse:
        """Samples of one prompt from `after + alpha * (after - before)`."""
        models = await self._pairs.of(body.pair).models()
        done = require_good(await self.generate(body.request()))
        return LDAResponse(
            **LDAResult.result_fields(body.prompt, done, body.max_new_tokens), **models
        )

    @app.post("/generate_lda_batch")
    async def generate_lda_batch(self, body: LDABatchRequest) -> LDABatchResponse:
        """The same for many prompts. Prompt i is drawn with `seed + i * n`, so its text is that
        of a single request with the seed in its result. A prompt that cannot be served (too
        long) carries its error; the others are answered."""
        if len(body.prompts) > self._limits.max_batch_prompts:
            raise InvalidRequest(
                "prompts",
                f"has {len(body.prompts)} prompts, at most {self._limits.max_batch_prompts}",
            )
        base = secrets.randbelow(2**52) if body.seed is None else body.seed
        requests = body.requests(base)
        for i, request in enumerate(requests):
            try:
                self._limits.check(request)
            except InvalidRequest as error:
                raise InvalidRequest(body.param(error.param, i), error.message) from None
        models = await self._pairs.of(body.pair).models()
        gate = asyncio.Semaphore(max(1, self._limits.batch_rows_in_flight // body.n))

        async def one(prompt: str, request: GenerateRequest) -> LDAResult | RowError:
            async with gate:
                try:
                    done = require_good(await self.generate(request))
                except InvalidRequest as error:
                    return RowError(prompt=prompt, error=error_body(error))
            return LDAResult(**LDAResult.result_fields(prompt, done, body.max_new_tokens))

        results = await together(*map(one, body.prompts, requests))
        return LDABatchResponse(
            results=results,
            alpha=body.alpha,
            batch_size=len(results),
            **models,
        )

    @app.post("/generate")
    async def generate_side_by_side(self, body: SideBySideRequest) -> SideBySideResponse:
        """*after* (model_1) and *before* (model_2) on one prompt with one seed."""
        request = with_seed(body.request(alpha=0.0))
        models = await self._pairs.of(body.pair).models()
        after, before = await together(
            self.generate(request), self.generate(request.model_copy(update={"alpha": -1.0}))
        )
        answers = [
            ModelAnswer(
                model_id=models[role],
                **Sample.fields_of(require_good(done)[0], body.max_new_tokens),
            )
            for role, done in (("model_after", after), ("model_before", before))
        ]
        return SideBySideResponse(prompt=body.prompt, model_1=answers[0], model_2=answers[1])

    @app.post("/v1/lda/generate")
    async def generate_over_http(self, body: GenerateRequest) -> list[Completion]:
        """All that a request by handle may say, and all that it is answered."""
        return await self.generate(body)

    @app.post("/score")
    async def score_over_http(self, body: ScoreRequest) -> list[Scored]:
        """Teacher forcing: the log-probabilities of given continuations under *after*, *before*
        and every alpha of the grid."""
        return await self.score(body)

    @app.post(
        "/stream",
        response_class=EventStream,
        status_code=200,
        responses={
            200: {
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
                "description": "One event for each `Piece`, then `data: [DONE]`; an event named "
                "`error` instead where the answer cannot be finished.",
            }
        },
    )
    async def stream_over_http(self, body: StreamRequest) -> EventStream:
        """The samples of one prompt while they come, of several alphas side by side."""
        requests = with_seed(body).requests()
        for i, request in enumerate(requests):
            try:
                self._limits.check(request)
            except InvalidRequest as error:
                of_one = body.alphas and error.param == "alpha"
                param = f"alphas[{i}]" if of_one else error.param
                raise InvalidRequest(param, error.message, error.code) from None
        pieces = await Begun.of(merged([self.stream(request) for request in requests]))
        return EventStream(piece_events(pieces), pieces.aclose)

    @app.post("/capture", response_model=list[CapturedLists])
    async def capture_over_http(self, body: CaptureRequest) -> Response:
        """Projections of both models' residual streams on given directions, at every token of a
        prompt and its completions."""
        require_scores_only(body)
        pair = self._pairs.of(body.pair)
        captured = await pair.capture(body, self._limits.max_capture_numbers)
        # Numbers may be many: others are answered meanwhile.
        content = await asyncio.to_thread(as_json, captured)
        return Response(content, media_type="application/json")

    @app.get("/tokenizer_compatibility")
    async def tokenizer_compatibility(self, pair: str | None = None) -> TokenizerCompatibility:
        """A service that is up has compatible tokenizers: others are refused at start."""
        info = await self._pairs.of(pair).describe()
        return TokenizerCompatibility(
            compatible=True,
            vocab_size_1=info.tokenizer_size_after,
            vocab_size_2=info.tokenizer_size_before,
            vocabs_match=info.tokenizer_size_after == info.tokenizer_size_before,
            warning="; ".join(info.notices) or None,
        )

    # -- over HTTP: about the service ----------------------------------------------------

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        """The door is open. Says nothing of the models: see /ready."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(self, pair: str | None = None) -> PairInfo | PairInfos:
        """200 with the pair once a replica answers, and from then on also while those that run are
        too busy to; else 503, which says why. Of several pairs with all of them (or the one that
        is asked for), once of each a replica answers."""
        infos = await self._pairs.describe(pair)
        if pair is None and len(self._pairs.names) > 1:
            return PairInfos(pairs=infos)
        (info,) = infos.values()
        return info

    @app.get("/version")
    async def version(self) -> dict[str, str]:
        return {"version": app.version}
