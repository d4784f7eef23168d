import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from deployments import resend
from deployments.schemas import InvalidRequest, NotReady, Overdue, ReplicaUnavailable

BUSY = BackPressureError(num_queued_requests=1, max_queued_requests=1)
UNAVAILABLE = DeploymentUnavailableError(DeploymentID(name="LDAReplica"))


def wrapped(error: Exception) -> Exception:
    return RayTaskError("generate", "Traceback ...", error).as_instanceof_cause()


def calls(outcomes: list[Any]) -> tuple[Callable[[], Awaitable[Any]], list[Any]]:
    """A call with these outcomes in turn, and the list of those it has had."""
    seen: list[Any] = []

    async def call() -> Any:
        seen.append(outcomes[len(seen)])
        if isinstance(seen[-1], Exception):
            raise seen[-1]
        return seen[-1]

    return call, seen


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resend, "FIRST_WAIT_S", 0.001)


@pytest.mark.parametrize(
    "death",
    [
        ActorDiedError(),
        wrapped(ActorDiedError()),
        ActorUnavailableError("gone", b"1" * 16),
        ReplicaUnavailable("engine"),
        wrapped(ReplicaUnavailable("engine")),
    ],
)
def test_a_dead_replica_is_asked_again_a_bounded_number_of_times(death: Exception) -> None:
    call, seen = calls([death, death, "text"])
    assert asyncio.run(resend.ask(call)) == "text"
    assert len(seen) == 3
    call, seen = calls([death] * 9)
    with pytest.raises(InvalidRequest, match="3 replicas in a row died"):
        asyncio.run(resend.ask(call))  # a poison request must not walk through all replicas
    assert len(seen) == resend.TRIES


def test_deaths_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(resend, "count", counted.append)
    asyncio.run(resend.ask(calls(["text"])[0]))
    assert counted == []
    asyncio.run(resend.ask(calls([DEAD, "text"])[0]))
    assert counted == ["lda_resent"]
    streamed(*[Said(DEAD) for _ in range(9)])
    assert counted[1:] == ["lda_resent", "lda_resent", "lda_replicas_died"]


@pytest.mark.parametrize("how", ["ask", "ask_each"])
def test_the_last_try_of_one_is_not_beside_the_last_try_of_another(how: str) -> None:
    """One request kills whatever it comes to, with all that is there: nine others that were beside
    it each time until their last try are answered."""
    there: set[int] = set()
    left: list[int] = []
    killed = asyncio.Event()
    deaths: list[set[int]] = []

    class Call:
        """At the only replica."""

        def __init__(self, i: int) -> None:
            self.i = i

        def cancel(self) -> None:
            left.append(self.i)

        async def __anext__(self) -> int:
            nonlocal killed
            there.add(self.i)
            here = killed
            if self.i == 0:
                await asyncio.sleep(0.002)
                deaths.append(set(there))
                there.clear()
                killed = asyncio.Event()
                here.set()
                raise DEAD
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(here.wait(), 0.02)
                raise DEAD
            there.discard(self.i)
            return self.i

    async def one(i: int, alone: asyncio.Lock) -> Any:
        if how == "ask":
            return await resend.ask(Call(i).__anext__, alone)
        async for item in resend.ask_each(lambda: Call(i), alone):
            return item

    async def all_of_them() -> list[Any]:
        alone = asyncio.Lock()
        asked = (one(i, alone) for i in range(10))
        return await asyncio.gather(*asked, return_exceptions=True)

    poison, *others = asyncio.run(all_of_them())
    assert isinstance(poison, InvalidRequest) and poison.code == "replicas_died"
    assert others == list(range(1, 10))
    assert len(deaths) == resend.TRIES and len(deaths[0]) == 10 and deaths[-1] == {0}
    assert left == ([] if how == "ask" else list(range(1, 10)))  # closed after an item


@pytest.mark.parametrize("how", ["ask", "ask_each"])
def test_a_last_try_that_has_lived_for_a_while_lets_the_next_one_begin(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve innocents, each with two deaths behind it and 0.3 s of work before it: they are not
    answered one after another, as their deadlines are the same."""
    monkeypatch.setattr(resend, "FIRST_STEPS_S", 0.03)
    begun: list[float] = []

    class Call:
        def __init__(self) -> None:
            self.deaths = 0
            self.left = False

        def cancel(self) -> None:
            self.left = True

        async def __anext__(self) -> str:
            if self.deaths < resend.TRIES - 1:
                self.deaths += 1
                raise DEAD
            begun.append(asyncio.get_running_loop().time())
            await asyncio.sleep(0.3)
            return "text"

    async def one(alone: asyncio.Lock) -> str | None:
        call = Call()
        if how == "ask":
            return await resend.ask(call.__anext__, alone)
        async with contextlib.aclosing(resend.ask_each(lambda: call, alone)) as items:
            async for item in items:
                assert not call.left
                return item
        return None

    async def all_of_them() -> list[str | None]:
        alone = asyncio.Lock()
        async with asyncio.timeout(1.0):
            answers = await asyncio.gather(*(one(alone) for _ in range(12)))
        assert not alone.locked()
        return answers

    assert asyncio.run(all_of_them()) == ["text"] * 12
    assert begun == sorted(begun) and min(b - a for a, b in zip(begun, begun[1:], strict=False)) > 0


def test_after_two_deaths_that_do_not_count_it_begins_alone_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or one that kills, but first waits for a slot each time, would be beside the last tries of
    others."""
    monkeypatch.setattr(resend, "FIRST_STEPS_S", -1.0)

    async def run() -> list[bool]:
        alone, found = asyncio.Lock(), list[bool]()

        async def call() -> None:
            found.append(alone.locked())
            if len(found) < 6:
                raise DEAD

        await resend.ask(call, alone)
        return found

    assert asyncio.run(run()) == [False, False, True, True, True, True]


def test_a_last_try_that_is_cancelled_lets_the_next_one_begin() -> None:
    async def run() -> None:
        alone = asyncio.Lock()
        outcomes: list[Any] = [DEAD, DEAD, "wait"]

        async def call() -> Any:
            outcome = outcomes.pop(0)
            if outcome == "wait":
                await asyncio.sleep(60)
            raise outcome

        task = asyncio.ensure_future(resend.ask(call, alone))
        while outcomes:
            await asyncio.sleep(0.001)
        assert alone.locked()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not alone.locked()

    asyncio.run(run())


def test_a_full_queue_is_waited_for_once_a_request_was_accepted() -> None:
    call, seen = calls([wrapped(ActorDiedError()), BUSY, BUSY, "text"])
    assert asyncio.run(resend.ask(call)) == "text" and len(seen) == 4
    assert streamed(Said(DEAD), Said(BUSY), Said(1)) == ([1], None, 3)


def test_also_where_the_death_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resend, "FIRST_STEPS_S", -1.0)
    call, seen = calls([DEAD, BUSY, "text"])
    assert asyncio.run(resend.ask(call)) == "text" and len(seen) == 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (wrapped(Overdue()), Overdue),
        (wrapped(NotReady("it starts", "starting")), NotReady),
        (wrapped(InvalidRequest("n", "must be 1")), InvalidRequest),
        (BUSY, BackPressureError),
        (UNAVAILABLE, ReplicaUnavailable),
        (wrapped(KeyError("a bug")), KeyError),
    ],
)
def test_what_would_fail_again_is_not_asked_again(error: Exception, kind: type) -> None:
    call, seen = calls([error, "text"])
    with pytest.raises(kind):
        asyncio.run(resend.ask(call))
    assert len(seen) == 1
    said = Said(error)
    items, raised, asked = streamed(said, Said(1))
    assert items == [] and isinstance(raised, kind) and asked == 1
    assert not said.cancelled  # it is over, and Serve's `cancel` would raise its own error


class Gone:
    """A DeploymentResponse that nobody answers; `cancel` says what went wrong with it."""

    def __init__(self) -> None:
        self.cancelled = False

    def __await__(self) -> Any:
        return asyncio.sleep(60).__await__()

    def cancel(self) -> None:
        self.cancelled = True
        raise UNAVAILABLE


def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    gone = Gone()

    async def leave() -> None:
        async with asyncio.timeout(0.01):
            await resend.ask(lambda: gone)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    assert gone.cancelled


def test_when_one_of_several_fails_the_others_stop() -> None:
    stopped: list[int] = []

    async def answer(i: int) -> int:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            stopped.append(i)
            raise
        return i

    async def fail() -> int:
        await asyncio.sleep(0.01)
        raise KeyError("one")

    async def all_of_them() -> None:
        with pytest.raises(KeyError, match="one"):
            await resend.together(answer(0), fail(), answer(2))
        await asyncio.sleep(0)

    asyncio.run(all_of_them())
    assert stopped == [0, 2]


class Said:
    """A streamed answer: its items, or what goes wrong, in turn."""

    def __init__(self, *items: Any) -> None:
        self._items = list(items)
        self.cancelled = False

    async def __anext__(self) -> Any:
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if isinstance(item, BaseException):
            raise item
        if item == "for ever":
            await asyncio.sleep(60)
        return item

    def cancel(self) -> None:
        self.cancelled = True


def streamed(*answers: Said) -> tuple[list[Any], BaseException | None, int]:
    """The items, what they ended in, and how often it was asked."""
    left = list(answers)

    async def take() -> tuple[list[Any], BaseException | None, int]:
        items: list[Any] = []
        try:
            async for item in resend.ask_each(lambda: left.pop(0)):
                items.append(item)
        except Exception as error:
            return items, error, len(answers) - len(left)
        return items, None, len(answers) - len(left)

    return asyncio.run(take())


DEAD = wrapped(ActorDiedError())


def test_a_stream_is_asked_again_only_before_its_first_item() -> None:
    assert streamed(Said(DEAD), Said(DEAD), Said(1, 2)) == ([1, 2], None, 3)
    items, error, asked = streamed(Said(1, 2, DEAD), Said(3))
    assert items == [1, 2] and isinstance(error, resend.ReplicaDied) and asked == 1
    items, error, asked = streamed(*[Said(DEAD) for _ in range(9)])
    assert isinstance(error, InvalidRequest) and error.code == "replicas_died"
    assert items == [] and asked == resend.TRIES
    items, error, asked = streamed(Said(wrapped(InvalidRequest("n", "no"))), Said(1))
    assert isinstance(error, InvalidRequest) and asked == 1
    items, error, asked = streamed(Said(BUSY), Said(1))
    assert isinstance(error, BackPressureError) and asked == 1


def test_a_stream_that_is_closed_cancels_its_call_and_a_finished_one_does_not() -> None:
    said = Said(1, 2, 3)

    async def leave_early() -> None:
        stream = resend.ask_each(lambda: said)
        assert await anext(stream) == 1
        assert not said.cancelled
        await stream.aclose()

    asyncio.run(leave_early())
    assert said.cancelled
    said = Said(1)
    assert streamed(said)[0] == [1] and not said.cancelled
    waiting = Said("for ever")

    async def stop_waiting() -> None:
        task = asyncio.ensure_future(anext(resend.ask_each(lambda: waiting)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stop_waiting())
    assert waiting.cancelled


class Handled:
    """A DeploymentResponse: a router's thread tells when a replica has taken it."""

    def __init__(self, answer: Awaitable[Any]) -> None:
        self._replica_result_future: Future[None] = Future()
        self._answer = answer

    def __await__(self) -> Any:
        return self._answer.__await__()


def test_the_time_alone_begins_when_a_replica_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for a replica to start would else be beside a request that kills."""
    monkeypatch.setattr(resend, "FIRST_STEPS_S", 0.03)
    monkeypatch.setattr(resend, "FIRST_WAIT_S", 0.0)

    async def run() -> None:
        responses: list[Handled] = []

        def call() -> Handled:
            responses.append(Handled(answer(len(responses))))
            return responses[-1]

        async def answer(i: int) -> None:
            if i < 2:
                raise ReplicaUnavailable
            await asyncio.Event().wait()

        alone = asyncio.Lock()
        task = asyncio.ensure_future(resend.ask(call, alone))
        await asyncio.sleep(0.1)
        assert alone.locked() and len(responses) == 3
        taken = responses[2]._replica_result_future
        await asyncio.to_thread(taken.set_result, None)
        await asyncio.sleep(0.1)
        assert not alone.locked()
        task.cancel()

    asyncio.run(run())


def test_serve_still_tells_when_a_replica_takes_a_call() -> None:
    """By a private name; without it a wait for a replica would count as time at one."""
    assigned: Future[Any] = Future()
    metadata: Any = None
    for kind in (DeploymentResponse, DeploymentResponseGenerator):
        assert kind(assigned, metadata)._replica_result_future is assigned


@pytest.mark.parametrize(("waited_s", "deaths"), [(0.0, 5), (0.4, 2)])
def test_waiting_for_a_replica_is_not_living_there(
    monkeypatch: pytest.MonkeyPatch, waited_s: float, deaths: int
) -> None:
    """A call of 0.4 s, all of it at a replica that then dies, or waiting for one that dies at
    once: so many deaths are survived."""
    monkeypatch.setattr(resend, "FIRST_STEPS_S", 0.3)
    monkeypatch.setattr(resend, "FIRST_WAIT_S", 0.0)
    asked: list[Handled] = []

    def call() -> Handled:
        asked.append(Handled(answer()))
        return asked[-1]

    async def answer() -> None:
        await asyncio.sleep(waited_s)
        asked[-1]._replica_result_future.set_result(None)
        await asyncio.sleep(0.4 - waited_s)
        raise DEAD

    with pytest.raises(InvalidRequest, match="replicas in a row died"):
        asyncio.run(resend.ask(call, asyncio.Lock()))
    assert len(asked) == deaths + 1


@pytest.mark.parametrize("taken", ["never", "cancelled", "refused"])
def test_what_no_replica_took_has_not_lived(monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
    monkeypatch.setattr(resend, "FIRST_STEPS_S", -1.0)
    asked = 0

    def call() -> Handled:
        nonlocal asked
        asked += 1
        handled = Handled(answer())
        if taken == "cancelled":
            handled._replica_result_future.cancel()
        if taken == "refused":
            handled._replica_result_future.set_exception(BUSY)
        return handled

    async def answer() -> None:
        await asyncio.sleep(0.001)
        raise DEAD

    with pytest.raises(InvalidRequest, match="replicas in a row died"):
        asyncio.run(resend.ask(call))
    assert asked == resend.TRIES


def test_a_death_after_the_first_steps_is_another_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for ever."""
    monkeypatch.setattr(resend, "FIRST_STEPS_S", 0.01)
    monkeypatch.setattr(resend, "FIRST_WAIT_S", 0.0)

    def long_lived(deaths: int) -> Callable[[], Awaitable[str]]:
        left = [deaths]

        async def call() -> str:
            await asyncio.sleep(0.05)
            left[0] -= 1
            if left[0] >= 0:
                raise ReplicaUnavailable
            return "whole"

        return call

    async def run(deaths: int) -> str:
        return await resend.ask(long_lived(deaths), asyncio.Lock())

    most = resend.TRIES - 1 + resend.TRIES
    assert asyncio.run(run(most)) == "whole"
    with pytest.raises(InvalidRequest, match="replicas in a row died"):
        asyncio.run(run(most + 1))
