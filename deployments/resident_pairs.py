"""The pairs of an application, each with replicas of its own, and what is asked of one of them.

No replica has two pairs, so requests of different pairs share no batch, no step and no memory.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TypeVar

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deployments.model_names import DEFAULT
from deployments.resend import ask, ask_each, ask_once, together
from deployments.schemas import (
    Captured,
    CaptureRequest,
    Completion,
    GenerateRequest,
    InvalidRequest,
    Limits,
    PairInfo,
    PairsUnavailable,
    Piece,
    ReplicaUnavailable,
    Scored,
    ScoreRequest,
)
from deployments.tokenizer_words import ReadPrompt, ReadRequest, Vocabulary

READY_TIMEOUT_S = 5.0

RequestT = TypeVar("RequestT", bound=GenerateRequest)


def with_seed(request: RequestT) -> RequestT:
    if request.seed is not None:
        return request
    return request.model_copy(update={"seed": secrets.randbelow(2**53)})


class ResidentPair:
    """All methods raise InvalidRequest (also after several replicas died of it),
    BackPressureError, ReplicaUnavailable where no replica can be had."""

    def __init__(self, replica: DeploymentHandle, limits: Limits) -> None:
        self._replica = replica
        self._limits = limits
        self._info: PairInfo | None = None
        self._vocabulary: Vocabulary | None = None

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        """The `n` completions of a request."""
        self._limits.check(request)
        request = with_seed(request)
        done: list[Completion] = await ask(lambda: self._replica.generate.remote(request))
        return done

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[list[Piece], None]:
        """The same completions while they come. A replica that dies before the first piece is
        replaced by another one; after that this ends in ReplicaUnavailable."""
        self._limits.check(request)
        request = with_seed(request)
        replica = self._replica.options(stream=True)
        # Closed at once when this is, and not when it is collected: its rows must leave.
        async with aclosing(ask_each(lambda: replica.stream.remote(request))) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, request: ScoreRequest) -> list[Scored]:
        """How likely each continuation of a prompt is."""
        self._limits.check(request)
        scored: list[Scored] = await ask(lambda: self._replica.score.remote(request))
        return scored

    async def capture(
        self, request: CaptureRequest, most_numbers: int | None = None
    ) -> list[Captured]:
        """What both models hold at every token of each completion, `most_numbers` in all: how many
        it would be the replica can tell, which counts the tokens."""
        self._limits.check(request)
        captured: list[Captured] = await ask(
            lambda: self._replica.capture.remote(request, most_numbers)
        )
        return captured

    async def read(self, request: ReadRequest) -> ReadPrompt:
        """A prompt as the models read it."""
        read: ReadPrompt = await ask(lambda: self._replica.read.remote(request))
        return read

    async def vocabulary(self) -> Vocabulary:
        """Asked for once."""
        if self._vocabulary is None:
            self._vocabulary = await ask(lambda: self._replica.vocabulary.remote())
        assert self._vocabulary is not None
        return self._vocabulary

    async def describe(self) -> PairInfo:
        """What the pair is; asks a replica, so it fails if none can answer."""
        info: PairInfo = await ask_once(self._replica.describe.remote())
        self._info = info
        return info

    async def models(self) -> dict[str, str]:
        """What the two models are, as it was last told."""
        info = self._info or await self.describe()
        return {"model_after": info.after, "model_before": info.before}


class ResidentPairs:
    """By name, in the order of the config file."""

    def __init__(self, replicas: Mapping[str, DeploymentHandle], limits: Limits) -> None:
        self._pairs = {name: ResidentPair(handle, limits) for name, handle in replicas.items()}

    @property
    def names(self) -> list[str]:
        return list(self._pairs)

    def of(self, name: str | None) -> ResidentPair:
        """The pair of that name; without one the only pair there is, or `lda`.

        Raises InvalidRequest, which lists the names.
        """
        if name is None:
            name = next(iter(self._pairs)) if len(self._pairs) == 1 else DEFAULT
        if name not in self._pairs:
            known = ", ".join(self._pairs)
            raise InvalidRequest("pair", f"must be the name of a pair; there are {known}")
        return self._pairs[name]

    async def describe(self) -> dict[str, PairInfo]:
        """All of them. Raises what the only one raises, or TimeoutError; of several
        PairsUnavailable, which says of each whether it answers."""

        async def one(pair: ResidentPair) -> PairInfo | Exception:
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    return await pair.describe()
            except (ReplicaUnavailable, BackPressureError, TimeoutError) as error:
                return error

        answers = dict(
            zip(self._pairs, await together(*map(one, self._pairs.values())), strict=True)
        )
        infos = {name: one for name, one in answers.items() if isinstance(one, PairInfo)}
        missing = {name: one for name, one in answers.items() if isinstance(one, Exception)}
        if len(self._pairs) == 1:
            for error in missing.values():
                raise error
        if missing:
            states = [f"{name}: ready" for name in infos]
            states += [f"{name}: no answer ({type(e).__name__})" for name, e in missing.items()]
            raise PairsUnavailable("; ".join(states))
        return infos
