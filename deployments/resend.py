"""Asking again when a replica dies. Serve itself never does.

Safe for anything with a seed: the same request gives the same answer on any replica.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.ingress_metrics import count
from deployments.schemas import InvalidRequest, NotReady, Overdue, ReplicaUnavailable

TRIES = 3
FIRST_WAIT_S = 0.2  # then 0.4 s: a dead replica's neighbour can answer at once
# A request that kills does so at its first steps. Longer turns alone would take the innocent, one
# after another, past their deadlines.
FIRST_STEPS_S = 2.0

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class QueueFull(BackPressureError):  # type: ignore[misc]  # Any, to mypy
    """Our own: Serve answers its own over HTTP itself, whatever handler the app has for it, with
    503 and no word of when to come again."""


class ReplicaDied(ReplicaUnavailable):
    """It held the request when it went."""


async def ask(call: Callable[[], Awaitable[T]], alone: asyncio.Lock | None = None) -> T:
    """What `call` answers. After TRIES replicas that died of it, or with it, raises
    InvalidRequest: whatever the reason, it must not walk on through all replicas.

    A death more than FIRST_STEPS_S after its replica took the request is another one's, and does
    not count (TRIES times). `alone`: held for as long, by all requests to the same replicas, from
    the third try on, so that the innocent are not beside the one that kills.

    Cancelled, it cancels the call.

    A replica's own InvalidRequest comes out as itself, anything else as it comes.
    """
    tries = _Tries(alone)
    while True:
        try:
            async with tries.turn():
                response = call()
                tries.watch(response)
                try:
                    return await ask_once(response)
                except asyncio.CancelledError:  # Serve would let it run to its end
                    _cancel(response)
                    raise
        except (ReplicaDied, BackPressureError) as error:
            tries.failed(error)
        await tries.pause()


class _Tries:
    """Of one request."""

    def __init__(self, alone: asyncio.Lock | None) -> None:
        self._alone = alone
        self._deaths = self._excused = 0
        self._taken_at: float | None = None
        self._release: Callable[[], None] | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None, None]:
        """The next try; from the third on they begin alone."""
        self._taken_at = None
        alone = self._alone
        # Those that do not count, too: one that kills may have waited for a slot before it did.
        if alone is None or self._deaths + self._excused < TRIES - 1:
            yield
            return
        await alone.acquire()

        def release() -> None:
            if self._release is release:  # and not the next try's
                self._release = None
                alone.release()

        self._release = release
        try:
            yield
        finally:
            release()

    def watch(self, response: object) -> None:
        """Its time begins when a replica takes it: until then it waits for one to start, or to have
        room."""
        loop = asyncio.get_running_loop()

        def taken() -> None:
            self._taken_at = loop.time()
            if self._release is not None:
                loop.call_later(FIRST_STEPS_S, self._release)

        def tell(assigned: "Future[Any]") -> None:  # in the router's thread
            if not assigned.cancelled() and assigned.exception() is None:
                with suppress(RuntimeError):  # nobody waits any more, and the loop is closed
                    loop.call_soon_threadsafe(taken)

        # Serve has no public word for it.
        assigned = getattr(response, "_replica_result_future", None)
        if assigned is None:
            taken()
        else:
            assigned.add_done_callback(tell)

    def failed(self, error: Exception) -> None:
        """Raises InvalidRequest where there is no next try, and `error` where it says that the
        queue is full to a request that was never in it: others were accepted, and wait."""
        if not isinstance(error, ReplicaDied):
            if not (self._deaths or self._excused):
                raise error
            return
        now = asyncio.get_running_loop().time()
        lived = self._taken_at is not None and now - self._taken_at > FIRST_STEPS_S
        if lived and self._excused < TRIES:
            self._excused += 1
        else:
            self._deaths += 1
        if self._deaths == TRIES:
            count("lda_replicas_died")
            raise died()
        count("lda_resent")

    async def pause(self) -> None:
        await asyncio.sleep(FIRST_WAIT_S * max(1, self._deaths))


def died() -> InvalidRequest:
    return InvalidRequest(
        "", f"{TRIES} replicas in a row died while they held this request", "replicas_died"
    )


class Streamed(Protocol[Item]):
    """An answer that comes in items: a DeploymentResponseGenerator."""

    def __anext__(self) -> Awaitable[Item]: ...

    def cancel(self) -> None: ...


async def ask_each(
    call: Callable[[], "Streamed[T]"], alone: asyncio.Lock | None = None
) -> AsyncGenerator[T, None]:
    """What `call` answers, item by item; closed, it cancels the call.

    Raises as `ask` does, but asks again only before the first item. After that the answer ends in
    ReplicaDied: what was said cannot be taken back. The third try and those after it are alone as
    in `ask`, at most until the first item.
    """
    tries = _Tries(alone)
    while True:
        begun = ended = False
        async with AsyncExitStack() as turn:
            await turn.enter_async_context(tries.turn())
            response = call()
            tries.watch(response)
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
            except Exception:  # said by the replica, or by Serve
                ended = True
                raise
            finally:
                if not ended:
                    _cancel(response)
        await tries.pause()


def _cancel(response: object) -> None:
    """What nobody waits for any more. Serve raises what went wrong with it, if it ended meanwhile:
    that must not take the place of the reason to leave."""
    with suppress(Exception):
        if cancel := getattr(response, "cancel", None):
            cancel()


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
