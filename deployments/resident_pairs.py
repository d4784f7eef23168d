"""The pairs of an application, each with replicas of its own, and what is asked of one of them.

No replica has two pairs, so requests of different pairs share no batch, no step and no memory.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deployments.model_names import DEFAULT
from deployments.readiness import why
from deployments.resend import ask, ask_each, ask_once, together
from deployments.schemas import (
    Captured,
    CaptureRequest,
    Completion,
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
)
from deployments.tokenizer_words import ReadPrompt, ReadRequest, Vocabulary

READY_TIMEOUT_S = 5.0
# A replica ends a request at its deadline by itself. So much later this door does, for one that no
# replica has taken.
_LATE_S = 20.0

T = TypeVar("T")
RequestT = TypeVar("RequestT", bound=GenerateRequest)


def with_seed(request: RequestT) -> RequestT:
    if request.seed is not None:
        return request
    return request.model_copy(update={"seed": secrets.randbelow(2**53)})


class ResidentPair:
    """All methods raise InvalidRequest (also after several replicas died of it),
    BackPressureError, ReplicaUnavailable where no replica can be had, Overdue where that took
    longer than a request may."""

    def __init__(self, replica: DeploymentHandle, limits: Limits) -> None:
        self._replica = replica
        self._limits = limits
        self._alone = asyncio.Lock()
        self._info: PairInfo | None = None
        self._vocabulary: Vocabulary | None = None

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        """The `n` completions of a request."""
        self._limits.check(request)
        request = with_seed(request)
        until = self._until()
        done: list[Completion] = await self._ask(
            lambda: self._replica.generate.remote(request, until), until
        )
        return done

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[list[Piece], None]:
        """The same completions while they come. A replica that dies before the first piece is
        replaced by another one; after that this ends in ReplicaUnavailable."""
        self._limits.check(request)
        request = with_seed(request)
        replica, until = self._replica.options(stream=True), self._until()
        asked = ask_each(lambda: replica.stream.remote(request, until), self._alone)
        # Closed at once when this is, and not when it is collected: its rows must leave.
        async with aclosing(asked) as pieces:
            async with self._in_time(until):
                first = await anext(pieces, None)
            if first is not None:
                yield first
            async for piece in pieces:
                yield piece

    async def score(self, request: ScoreRequest) -> list[Scored]:
        """How likely each continuation of a prompt is."""
        self._limits.check(request)
        until = self._until()
        scored: list[Scored] = await self._ask(
            lambda: self._replica.score.remote(request, until), until
        )
        return scored

    async def capture(
        self, request: CaptureRequest, most_numbers: int | None = None
    ) -> list[Captured]:
        """What both models hold at every token of each completion, `most_numbers` in all: how many
        it would be the replica can tell, which counts the tokens."""
        self._limits.check(request)
        until = self._until()
        captured: list[Captured] = await self._ask(
            lambda: self._replica.capture.remote(request, most_numbers, until), until
        )
        return captured

    async def read(self, request: ReadRequest) -> ReadPrompt:
        """A prompt as the models read it."""
        read: ReadPrompt = await self._ask(
            lambda: self._replica.read.remote(request), self._until()
        )
        return read

    async def vocabulary(self) -> Vocabulary:
        """Asked for once."""
        if self._vocabulary is None:
            self._vocabulary = await self._ask(
                lambda: self._replica.vocabulary.remote(), self._until()
            )
        assert self._vocabulary is not None
        return self._vocabulary

    async def describe(self, timeout_s: float = READY_TIMEOUT_S) -> PairInfo:
        """What the pair is: asks a replica, and where all run but none has time to answer, says
        what one told before. A service at work is not to be taken for one that is gone.

        Raises NotReady, which says why none answers.
        """
        try:
            async with asyncio.timeout(timeout_s):
                self._info = await ask_once(self._replica.describe.remote())
        except (ReplicaUnavailable, BackPressureError, TimeoutError) as error:
            reason = await why(self._replica, error)
            if self._info is None or reason.code != "busy":
                raise reason from None
        assert self._info is not None
        return self._info

    def _until(self) -> float:
        """When what is asked now is to be answered: by the wall's clock, which nodes share."""
        return time.time() + self._limits.max_request_s

    async def _ask(self, call: Callable[[], Awaitable[T]], until: float) -> T:
        async with self._in_time(until):
            return await ask(call, self._alone)

    @asynccontextmanager
    async def _in_time(self, until: float) -> AsyncGenerator[None, None]:
        try:
            async with asyncio.timeout(until + _LATE_S - time.time()):
                yield
        except TimeoutError:
            raise Overdue from None

    async def ready(self, timeout_s: float) -> PairInfo | NotReady:
        """What the pair is, or why it does not answer."""
        try:
            return await self.describe(timeout_s)
        except NotReady as error:
            return error

    async def models(self) -> dict[str, str]:
        """What the two models are, as it was last told. To be asked before what is worth keeping:
        the first time it waits for a replica, as any request does."""
        if self._info is None:
            self._info = await self._ask(lambda: self._replica.describe.remote(), self._until())
        assert self._info is not None
        return {"model_after": self._info.after, "model_before": self._info.before}


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

    async def describe(
        self, name: str | None = None, timeout_s: float = READY_TIMEOUT_S
    ) -> dict[str, PairInfo]:
        """All of them, or the one of that name. Raises NotReady, which says of each whether it
        answers, and why not."""

        wanted = self._pairs if name is None else {name: self.of(name)}
        answers = dict(
            zip(
                wanted,
                await together(*(pair.ready(timeout_s) for pair in wanted.values())),
                strict=True,
            )
        )
        missing = [answer for answer in answers.values() if isinstance(answer, NotReady)]
        if missing and len(wanted) == 1:
            raise missing[0]
        if missing:
            states = [
                f"{name}: {answer.message if isinstance(answer, NotReady) else 'ready'}"
                for name, answer in answers.items()
            ]
            raise NotReady("; ".join(states), missing[0].code)
        return {name: one for name, one in answers.items() if isinstance(one, PairInfo)}
