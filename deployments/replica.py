"""One replica: the pair, the engine's thread, and the batched door in front of it."""

import asyncio
import importlib.metadata
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from torch import Tensor

import lda_core
from deployments import capture_files
from deployments.capture_limits import require_bytes, require_numbers
from deployments.commit import commit
from deployments.metrics import EngineMetrics, memory_words
from deployments.resident_tokenizer import read, vocabulary
from deployments.resident_traits import known_traits, resident_traits
from deployments.schemas import (
    Captured,
    CaptureRequest,
    Completion,
    Continuation,
    Densities,
    GenerateRequest,
    InvalidRequest,
    Limits,
    NotReady,
    Overdue,
    PairInfo,
    Piece,
    ReplicaUnavailable,
    Scored,
    ScoreRequest,
    Steer,
    TokenLogprobs,
)
from deployments.tokenizer_words import ReadPrompt, ReadRequest, Vocabulary
from lda_core.batch import Row
from lda_core.capture import CaptureRow
from lda_core.checkpoint import sha256
from lda_core.prompts import decoded
from lda_core.request import Role
from lda_core.scoring import ScoreRow
from lda_core.streaming import Feed, News, Settled

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
CoreFuture = Future[lda_core.Completion]
CaptureFuture = Future[lda_core.Captured]

# A piece costs a few milliseconds on its way through Ray: quick steps share one. No reader sees it.
_PIECES_APART_S = 0.02


class UserConfig(BaseModel):
    """`user_config` of the deployment: changed live, without a restart."""

    model_config = ConfigDict(extra="forbid")

    max_batch_size: int = Field(64, ge=1)
    batch_wait_timeout_s: float = Field(0.005, ge=0.0, le=10.0)


class LDAReplica:
    def __init__(
        self,
        pair: lda_core.PairConfig,
        engine: lda_core.EngineConfig,
        stuck_after_s: float,
        traits: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._pair = lda_core.ModelPair.load(pair)
        lda_core.self_test(self._pair)
        self._stuck_after_s = stuck_after_s
        self._looked_stuck = False
        for notice in self._pair.notices:
            logger.warning("pair: %s", notice)
        noise = lda_core.noise_floor(self._pair)
        logger.info("noise floor, largest change of a mixed logit by alpha: %s", noise)
        # Mixing adds up what both models have of it.
        of_one = max(change / (1 + 2 * alpha) for alpha, change in noise.items())
        resident = lda_core.Engine(self._pair, engine, noise=of_one)
        logger.info("memory: %s", memory_words(resident))
        self._metrics = EngineMetrics(resident, noise)
        self._engine = lda_core.EngineThread(resident, lambda: die())
        self._limits = limits or Limits()
        self._info = describe(self._pair, pair)
        self._resident: Mapping[str, Tensor] = {}
        if traits is not None:
            resident_of = resident_traits(Path(traits), self._info)
            for notice in resident_of.notices:
                logger.warning("traits: %s", notice)
            self._resident = resident_of.vectors
            self._info = self._info.model_copy(
                update={
                    "traits": dict(resident_of.sha256),
                    "notices": [*self._info.notices, *resident_of.notices],
                }
            )
        self._traits = capture_files.TraitSets(self._pair, self._resident)
        self.reconfigure({})  # the defaults, where the config file has no user_config

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        config = UserConfig(**user_config)
        for door in (self._admit, self._admit_captures):
            door.set_max_batch_size(config.max_batch_size)
            door.set_batch_wait_timeout_s(config.batch_wait_timeout_s)

    async def generate(
        self, request: GenerateRequest, until: float | None = None
    ) -> list[Completion]:
        """The `n` completions of one request, in the order of their seeds.

        At `until` (seconds since the epoch; by default as long from now as a request may take)
        rows end with what they have.

        Raises InvalidRequest for what only the tokenizer or the memory can tell, Overdue if all
        rows waited until then, ReplicaUnavailable if the engine has stopped.
        """
        prompt, rows = self._rows(request, self._within_s(until))
        try:
            futures = await self._admit(rows)
            done = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        except lda_core.EngineStopped as error:
            raise ReplicaUnavailable(str(error)) from None
        finally:
            # Whoever asked may have gone: their rows leave at the next step. Finished rows
            # do not care.
            for row in rows:
                row.left = True
            self._metrics.update()
        if refused := [row.refused for row in rows if row.refused]:
            if len(refused) == len(rows):
                raise refusal(refused[0], request)
        return [to_wire(completion, prompt.text) for completion in done]

    async def stream(
        self, request: GenerateRequest, until: float | None = None
    ) -> AsyncGenerator[list[Piece], None]:
        """The same completions while they come: what is new of all samples, step by step.

        Raises as `generate` does, before the first piece if all rows are refused. Whoever closes
        it has the rows leave at the next step.
        """
        prompt, rows = self._rows(request, self._within_s(until))
        tokenizer, eos_ids = self._pair.tokenizer, self._pair.eos_ids
        settled = [Settled(tokenizer, row.request, eos_ids) for row in rows]
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:  # in the engine's thread, when the news are there
            if not woken.is_set() and not loop.is_closed():
                loop.call_soon_threadsafe(woken.set)

        feed = Feed(rows, wake)
        # Pieces of rows that were refused, until another row has any: if all are, the answer does
        # not begin, and its status can still say so.
        held: list[Piece] = []
        begun = False
        try:
            futures = await self._admit(rows)
            for future in futures:
                future.add_done_callback(lambda done: wake() if failure(done) else None)
            going = len(rows)
            while going:
                await woken.wait()
                woken.clear()  # before the news are fetched: what comes now wakes again
                failed = next(filter(None, map(failure, futures)), None)
                if news := feed.fetch():
                    going -= sum(new.completion is not None for new in news.values())
                    held += [
                        to_piece(i, rows[i], new, settled[i], prompt.text)
                        for i, new in sorted(news.items())
                    ]
                    begun = begun or any(rows[i].refused is None for i in news)
                    if begun:
                        yield held
                        held = []
                        await asyncio.sleep(_PIECES_APART_S if going else 0)
                if failed is not None:  # after the last news
                    raise failed
            if all(row.refused for row in rows) and (refused := rows[0].refused):
                raise refused
        except (lda_core.RequestError, lda_core.Overdue) as error:
            raise refusal(error, request) from None
        except lda_core.EngineStopped as error:
            raise ReplicaUnavailable(str(error)) from None
        finally:
            for row in rows:
                row.left = True
            self._metrics.update()

    async def score(self, request: ScoreRequest, until: float | None = None) -> list[Scored]:
        """How likely each continuation is, in their order; between decode steps of the others.

        Raises as `generate` does.
        """
        rows: list[ScoreRow] = []
        try:
            wanted = self._continuations(request)
            rows = [self._engine.engine.accept_score(want) for want in wanted]
            futures = self._engine.submit_scores(rows)
            done = await self._in_time(futures, until)
        except lda_core.RequestError as error:
            raise invalid(error, request) from None
        except lda_core.EngineStopped as error:
            raise ReplicaUnavailable(str(error)) from None
        finally:
            for row in rows:  # one that was refused must not leave the others at work
                row.left = True
        if failed := next((scored.error for scored in done if scored.error), None):
            raise InvalidRequest("continuations", failed, "row_failed")
        return [
            Scored(
                token_ids=list(want.continuation_ids),
                after=scored.after,
                before=scored.before,
                densities=Densities(alphas=request.grid, normalisers=scored.normalisers),
                at=scored.at,
                top=scored.top,
            )
            for want, scored in zip(wanted, done, strict=True)
        ]

    def _within_s(self, until: float | None) -> float:
        """Raises Overdue if it is over already."""
        if until is None:
            return self._limits.max_request_s
        if (within_s := until - time.time()) <= 0:
            raise Overdue
        return within_s

    async def _in_time(self, futures: list[Future[T]], until: float | None) -> list[T]:
        try:
            async with asyncio.timeout(self._within_s(until)):
                return await asyncio.gather(*map(asyncio.wrap_future, futures))
        except TimeoutError:
            raise Overdue from None

    def _continuations(self, request: ScoreRequest) -> list[lda_core.ScoreRequest]:
        prompt = self._prompt(request)
        return [
            lda_core.ScoreRequest(
                (*prompt, *continuation.given),
                self._tokens(continuation, request.allow_special_tokens),
                grid=tuple(request.grid),
                temperature=request.temperature,
                top=request.top,
            )
            for continuation in request.continuations
        ]

    def _prompt(self, request: ScoreRequest | CaptureRequest) -> tuple[int, ...]:
        if request.prompt is None:
            return tuple(request.prompt_ids or ())
        return lda_core.encode(
            self._pair.tokenizer,
            request.prompt,
            request.prompt_format,
            request.system_prompt,
            request.allow_special_tokens,
        ).ids

    def _tokens(self, continuation: Continuation, allow_special_tokens: bool) -> tuple[int, ...]:
        return tuple(
            continuation.token_ids
            or self._pair.tokenizer.encode(
                continuation.text,
                add_special_tokens=False,
                split_special_tokens=not allow_special_tokens,
            )
        )

    async def capture(
        self,
        request: CaptureRequest,
        most_numbers: int | None = None,
        until: float | None = None,
    ) -> list[Captured]:
        """What both models hold at every token of each completion, in their order; between decode
        steps of the others. `most_numbers`: norms and scores that whoever asked can be answered.

        Raises as `generate` does, and InvalidRequest for an answer that would be too large.
        """
        rows: list[CaptureRow] = []
        try:
            # Traits may be large: others are answered meanwhile.
            directions = await asyncio.to_thread(self._traits.of, request.traits)
            wanted = self._captures(request, directions)
            rows = [self._engine.engine.accept_capture(want) for want in wanted]
            if most_numbers is not None:
                require_numbers(wanted, self._pair, most_numbers)
            require_bytes(wanted, self._pair, self._limits.max_capture_bytes)
            futures = await self._admit_captures(rows)
            done = await self._in_time(futures, until)
        except lda_core.RequestError as error:
            raise InvalidRequest(error.field, error.message, error.code) from None
        except lda_core.EngineStopped as error:
            raise ReplicaUnavailable(str(error)) from None
        finally:
            for row in rows:  # one that was refused must not leave the others at work
                row.left = True
            self._metrics.update()
        if failed := next((captured.error for captured in done if captured.error), None):
            raise InvalidRequest("completions", failed, "row_failed")
        text = self._pair.tokenizer.decode
        return [
            # Tensors may be many: others are answered meanwhile.
            await asyncio.to_thread(capture_files.to_wire, want, captured, text)
            for want, captured in zip(wanted, done, strict=True)
        ]

    def _captures(
        self, request: CaptureRequest, directions: lda_core.Directions | None
    ) -> list[lda_core.CaptureRequest]:
        prompt = self._prompt(request)
        texts = [self._tokens(c, request.allow_special_tokens) for c in request.completions]
        roles: tuple[Role, ...] = ("after", "before")
        if request.models != "both":
            roles = (request.models,)
        return [
            lda_core.CaptureRequest(
                prompt,
                completion,
                roles=roles,
                directions=directions,
                layer=request.layer,
                raw=request.raw,
                mean=request.mean,
            )
            for completion in texts or [()]
        ]

    @serve.batch
    async def _admit_captures(self, items: list[list[CaptureRow]]) -> list[list[CaptureFuture]]:
        """As `_admit`: rows of several requests for the same things share their passes."""
        return self._submit_captures(items)

    def _submit_captures(self, items: list[list[CaptureRow]]) -> list[list[CaptureFuture]]:
        futures = iter(self._engine.submit_captures([row for rows in items for row in rows]))
        return [[next(futures) for _ in rows] for rows in items]

    @serve.batch
    async def _admit(self, items: list[list[Row]]) -> list[list[CoreFuture]]:
        """Hands what arrived together to the engine in one go; nobody waits for a neighbour."""
        return self._submit(items)

    def _submit(self, items: list[list[Row]]) -> list[list[CoreFuture]]:
        futures = iter(self._engine.submit([row for rows in items for row in rows]))
        return [[next(futures) for _ in rows] for rows in items]

    def _rows(self, request: GenerateRequest, within_s: float) -> tuple[lda_core.Prompt, list[Row]]:
        assert request.seed is not None  # the ingress has chosen one
        messages = [message.model_dump() for message in request.messages or []]
        text = request.prompt if request.open_prompt is None else request.open_prompt
        tokenizer, ids = self._pair.tokenizer, request.prompt_ids
        prompt = None
        try:
            if ids is None:
                prompt = lda_core.encode(
                    tokenizer,
                    text if text is not None else messages,
                    request.effective_format,
                    request.system_prompt,
                    request.allow_special_tokens,
                    open_end=request.open_prompt is not None,
                    prefill=request.prefill,
                )
            row = lda_core.Request(
                prompt.ids if prompt is not None else tuple(ids or ()),
                alpha=request.alpha,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                max_new_tokens=request.max_new_tokens,
                seed=request.seed,
                stop=tuple(request.stop),
                ignore_eos=request.ignore_eos,
                logprobs=request.logprobs,
                grid=tuple(request.grid),
                watch=tuple(request.watch),
                amplify_first=request.amplify_first,
                amplify_min_kl=request.amplify_min_kl,
                plausible=request.plausible,
                steer=None if request.steer is None else self._steer(request.steer),
                top_logprobs=request.top_logprobs,
                min_tokens=request.min_tokens,
                kl=request.kl,
            )
            rows = [self._engine.engine.accept(r, within_s) for r in row.samples(request.n)]
        except lda_core.RequestError as error:
            raise invalid(error, request) from None
        # Only now are its tokens known to be of the vocabulary.
        return prompt or decoded(tokenizer, row.prompt_ids), rows

    def _steer(self, steer: Steer) -> lda_core.Steer:
        roles = frozenset(("after", "before") if steer.models == "both" else (steer.models,))
        vector = steer.vector
        if steer.trait is not None:
            if steer.trait not in self._resident:
                raise lda_core.RequestError("steer.trait", known_traits(self._resident))
            layers = self._resident[steer.trait]  # (L, D)
            if steer.layer >= len(layers):
                raise lda_core.RequestError(
                    "steer.layer", f"must be between 0 and {len(layers) - 1}"
                )
            vector = layers[steer.layer].tolist()
        assert vector is not None
        return lda_core.Steer(tuple(vector), steer.layer, steer.coefficient, roles)

    async def describe(self) -> PairInfo:
        """What the pair is. Raises NotReady if the engine hangs, ReplicaUnavailable if it has
        ended."""
        try:
            self._engine.check(self._stuck_after_s)
        except lda_core.EngineStuck as error:
            raise NotReady(str(error), "engine_stuck") from None
        except lda_core.EngineStopped as error:
            raise ReplicaUnavailable(str(error)) from None
        return self._info

    async def read(self, request: ReadRequest) -> ReadPrompt:
        """A prompt as the models read it. Raises InvalidRequest."""
        return read(self._pair, request, self._engine.engine.context_length)

    async def vocabulary(self) -> Vocabulary:
        return await asyncio.to_thread(vocabulary, self._pair)

    def check_health(self) -> None:
        """Ends the replica where the engine's thread is dead, or stuck twice in a row, and Ray
        starts another. Once may be a machine that stood still: the engine's thread, too, needs a
        moment to go on, and the replicas of all its service must not end together.

        Raising is not enough: a replica that fails its checks is asked to finish first what it
        holds, for as long as draining may take, and a stuck one never does. Raises EngineStopped.
        """
        self._metrics.update()
        looked_stuck, self._looked_stuck = self._looked_stuck, False
        try:
            self._engine.check(self._stuck_after_s)
        except lda_core.EngineStopped as error:
            self._looked_stuck = isinstance(error, lda_core.EngineStuck)
            if self._looked_stuck and not looked_stuck:
                logger.warning("%s; at the next check this replica ends", error)
                return
            logger.error("this replica ends: %s", error)
            die()
            raise

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.stop()


def invalid(
    error: lda_core.RequestError, request: GenerateRequest | ScoreRequest
) -> InvalidRequest:
    """The engine's refusal in the words of the wire."""
    in_tokens = error.field == "prompt" and request.prompt_ids is not None
    return InvalidRequest("prompt_ids" if in_tokens else error.field, error.message, error.code)


def refusal(
    error: lda_core.RequestError | lda_core.Overdue, request: GenerateRequest
) -> InvalidRequest | Overdue:
    return Overdue() if isinstance(error, lda_core.Overdue) else invalid(error, request)


def die() -> None:
    """A replica whose engine has failed answers nothing more, and quickly: the router would
    prefer it. Dead, its requests go elsewhere at once and Ray starts another."""
    os._exit(1)


def failure(future: CoreFuture) -> BaseException | None:
    return future.exception() if future.done() and not future.cancelled() else None


def to_piece(index: int, row: Row, news: News, settled: Settled, formatted_prompt: str) -> Piece:
    text, done = settled.add(news.token_ids), news.completion
    if done is not None:
        text += settled.end(done)
    logprobs = None
    if row.request.wants_logprobs:
        columns = list(zip(*news.logprobs, strict=True)) or [(), (), ()]
        after, before, amplified = map(list, columns)
        logprobs = TokenLogprobs(after=after, before=before, amplified=amplified)
    return Piece(
        index=index,
        alpha=row.request.alpha,
        text=text,
        token_ids=news.token_ids,
        logprobs=logprobs,
        top_logprobs=news.top if row.request.top_logprobs else None,
        kl=news.kl if row.request.kl else None,
        completion=None if done is None else to_wire(done, formatted_prompt),
    )


def to_wire(completion: lda_core.Completion, formatted_prompt: str) -> Completion:
    fields = asdict(completion)
    if completion.logprobs is not None:
        fields["logprobs"] = TokenLogprobs(**fields["logprobs"])
    if completion.densities is not None:
        fields["densities"] = Densities(**fields["densities"])
    return Completion(**fields, formatted_prompt=formatted_prompt)


def describe(pair: lda_core.ModelPair, config: lda_core.PairConfig) -> PairInfo:
    """Names, hashes and versions: what a manifest needs to say which pair it was."""

    def hashes(role: str) -> dict[str, str]:
        return {path.name: sha256(path) for path in pair.files.get(role, [])}

    (tokenizer_folder,) = pair.files["tokenizer"]
    tokenizer_file = next(
        path
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
        if (path := tokenizer_folder / name).exists()
    )
    packages = ("lda-serve", "torch", "transformers", "ray")
    return PairInfo(
        after=config.after or f"{config.before} + {config.adapter}",
        before=config.before,
        adapter=config.adapter,
        after_sha256=hashes("after"),
        before_sha256=hashes("before"),
        adapter_sha256=hashes("adapter"),
        tokenizer_sha256=sha256(tokenizer_file),
        architecture=pair.after.config.model_type,
        dtype=str(pair.after.dtype).removeprefix("torch."),
        device=pair.device.type,
        vocab_size=pair.vocab_size,
        tokenizer_size_after=pair.comparison.size_after,
        tokenizer_size_before=pair.comparison.size_before,
        context_length=pair.context_length,
        layers=pair.after.config.num_hidden_layers,
        hidden_size=pair.after.config.hidden_size,
        notices=list(pair.notices),
        versions={name: importlib.metadata.version(name) for name in packages},
        commit=commit(),
    )
