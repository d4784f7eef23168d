import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments import resend
from deployments.schemas import InvalidRequest, ReplicaUnavailable

BUSY = BackPressureError(num_queued_requests=1, max_queued_requests=1)


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


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (wrapped(InvalidRequest("n", "must be 1")), InvalidRequest),
        (BUSY, BackPressureError),
        (DeploymentUnavailableError(DeploymentID(name="LDAReplica")), ReplicaUnavailable),
        (wrapped(KeyError("a bug")), KeyError),
    ],
)
def test_what_would_fail_again_is_not_asked_again(error: Exception, kind: type) -> None:
    call, seen = calls([error, "text"])
    with pytest.raises(kind):
        asyncio.run(resend.ask(call))
    assert len(seen) == 1


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
