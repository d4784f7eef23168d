"""Asking again when a replica dies. Serve itself never does.

Safe for anything with a seed: the same request gives the same answer on any replica.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.ingress_metrics import count
from deployments.schemas import InvalidRequest, NotReady, Overdue, ReplicaUnavailable

TRIES = 3
FIRST_WAIT_S = 0.2  # then 0.4 s: a dead replica's neighbour can answer at once
# A request that kills does so at its first steps. Longer turns would take the innocent, one after
# another, past their deadlines.
ALONE_S = 2.0

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class QueueFull(BackPressureError):  # type: ignore[misc]  # Any, to mypy
    """Our own: Serve answers its own over HTTP itself, whatever handler the app has for it, with
    503 and no word of when to come again."""


class ReplicaDied(ReplicaUnavailable):
    """It held the request when it went."""


class Alone(asyncio.Lock):
    """Of the last tries of requests to the same replicas. `reached`: a question that any replica
    answers at once; until one does, nobody's time alone has begun, as replicas take their time to
    start."""

    def __init__(self, reached: Callable[[], Awaitable[object]]) -> None:
        super().__init__()
        self.reached = reached


async def ask(call: Callable[[], Awaitable[T]], alone: Alone | None = None) -> T:
    """What `call` answers. After TRIES replicas that died of it, or with it, raises
    InvalidRequest: whatever the reason, it must not walk on through all replicas.

    `alone`: held at the beginning of the last try, by all requests to the same replicas, for
    ALONE_S at most from when a replica answers. Who lives through that is not the one that kills:
    a death after it, in the company of the next, does not count (TRIES times).

    A replica's own InvalidRequest comes out as itself, anything else as it comes.
    """
    tries = _Tries(alone)
    while True:
        try:
            async with tries.turn():
                return await ask_once(call())
        except (ReplicaDied, BackPressureError) as error:
            tries.failed(error)
        await tries.pause()


class _Tries:
    """Of one request."""

    def __init__(self, alone: Alone | None) -> None:
        self._alone = alone
        self._deaths = self._excused = 0
        self._lived = False

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None, None]:
        """The next try; the last one begins alone."""
        self._lived = False
        alone = self._alone
        if alone is None or self._deaths < TRIES - 1:
            yield
            return
        await alone.acquire()
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                alone.release()

        def over() -> None:
            self._lived = True
            release()

        timer: asyncio.TimerHandle | None = None
        try:
            with suppress(ReplicaUnavailable, BackPressureError):  # what is asked will say so, too
                await alone.reached()
            timer = asyncio.get_running_loop().call_later(ALONE_S, over)
            yield
        finally:
            if timer is not None:
                timer.cancel()
            release()

    def failed(self, error: Exception) -> None:
        """Raises InvalidRequest where there is no next try, and `error` where it says that the
        queue is full to a request that was never in it: others were accepted, and wait."""
        if not isinstance(error, ReplicaDied):
            if not self._deaths:
                raise error
            return
        if self._lived and self._excused < TRIES:
            self._excused += 1
        else:
            self._deaths += 1
        if self._deaths == TRIES:
            count("lda_replicas_died")
            raise died()
        count("lda_resent")

    async def pause(self) -> None:
        await asyncio.sleep(FIRST_WAIT_S * 2 ** (self._deaths - 1))


def died() -> InvalidRequest:
    return InvalidRequest(
        "", f"{TRIES} replicas in a row died while they held this request", "replicas_died"
    )


class Streamed(Protocol[Item]):
    """An answer that comes in items: a DeploymentResponseGenerator."""

    def __anext__(self) -> Awaitable[Item]: ...

    def cancel(self) -> None: ...


async def ask_each(
    call: Callable[[], "Streamed[T]"], alone: Alone | None = None
) -> AsyncGenerator[T, None]:
    """What `call` answers, item by item; closed, it cancels the call.

    Raises as `ask` does, but asks again only before the first item. After that the answer ends in
    ReplicaDied: what was said cannot be taken back. The last try is alone as in `ask`, at most
    until the first item.
    """
    tries = _Tries(alone)
    while True:
        begun = ended = False
        async with AsyncExitStack() as turn:
            await turn.enter_async_context(tries.turn())
            response = call()
            try:
                while True:
                    item = await ask_once(response.__anext__())
                    begun = True
                    await turn.aclose()
                    yield item
            except StopAsyncIteration:
                ended = True
                return
            except (ReplicaDied, BackPressureError) as error:
                ended = True
                if begun:
                    raise
                tries.failed(error)
            finally:
                if not ended:
                    response.cancel()
        await tries.pause()


async def ask_once(response: Awaitable[T]) -> T:
    """Takes Ray's wrapping off; a replica that died, or whose engine did, is ReplicaDied, a full
    queue QueueFull."""
    try:
        return await response
    except BackPressureError as error:
        raise QueueFull(*error.args) from None
    except (RayTaskError, RayActorError, DeploymentUnavailableError, ReplicaUnavailable) as error:
        cause = unwrapped(error)
        if isinstance(cause, InvalidRequest):
            raise cause from None
        if isinstance(cause, (Overdue, NotReady)):
            raise cause from None
        if isinstance(cause, (RayActorError, ReplicaUnavailable)):
            raise ReplicaDied(type(cause).__name__) from error
        if isinstance(cause, DeploymentUnavailableError):
            raise ReplicaUnavailable(type(cause).__name__) from error
        raise


def unwrapped(error: BaseException) -> BaseException:
    """What went wrong in the service, without the wrapping of the way back."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


async def together(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """All answers in order; when one fails, the others stop, and their rows leave."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
