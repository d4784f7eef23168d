"""Asking again when a replica dies. Serve itself never does.

Safe for anything with a seed: the same request gives the same answer on any replica.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.schemas import InvalidRequest, ReplicaUnavailable

TRIES = 3
FIRST_WAIT_S = 0.2  # then 0.4 s: a dead replica's neighbour can answer at once

T = TypeVar("T")


async def ask(call: Callable[[], Awaitable[T]]) -> T:
    """What `call` answers. Raises ReplicaUnavailable when TRIES replicas in a row could not,
    and the replica's own InvalidRequest as itself; anything else as it comes."""
    wait_s = FIRST_WAIT_S
    for _ in range(TRIES - 1):
        try:
            return await ask_once(call())
        except ReplicaUnavailable:
            await asyncio.sleep(wait_s)
            wait_s *= 2
    return await ask_once(call())


async def ask_once(response: Awaitable[T]) -> T:
    """Takes Ray's wrapping off: a dead replica is ReplicaUnavailable."""
    try:
        return await response
    except RayTaskError as error:
        if isinstance(error.cause, (InvalidRequest, ReplicaUnavailable)):
            raise error.cause from None
        raise
    except (RayActorError, DeploymentUnavailableError) as error:
        raise ReplicaUnavailable(type(error).__name__) from error
