"""The same requests alone, in batches, in other orders, on other replicas, after a replica died."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deployments.local_service import LocalService
from jobs.client_transport import HttpTransport

from .asked import Answer, Body, answers, bodies, expected, pair
from .replicas import SERVES, replicas, wait_for_replicas

IN_FLIGHT = 64


def run(service: LocalService, rows: int, seed: int = 1) -> dict[str, Any]:
    """`rows` requests of mixed sampling, each against the engine alone in this process: one at a
    time, all at once, all at once in another order, and while a replica dies that holds some."""
    asked = bodies(rows, seed, max_new_tokens=24)
    wanted = expected(pair(), asked, alone=True)
    shuffled = random.Random(seed).sample(range(rows), rows)

    def ask(
        order: list[int], in_flight: int, answered: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        found = send(service, [asked[i] for i in order], in_flight, answered)
        by_place = dict(zip(order, found, strict=True))
        return [by_place[i] for i in range(rows)]

    in_order = list(range(rows))
    passes = [ask(in_order, 1), ask(in_order, IN_FLIGHT), ask(shuffled, IN_FLIGHT)]
    # Both replicas have answered by now.
    served_by = len(replicas(service, SERVES))
    with one_dies(service, after=rows // 8) as count:
        passes.append(ask(shuffled, IN_FLIGHT, count))
    wait_for_replicas(service, 2)
    changed, unanswered, why = set[int](), 0, []
    for number, found in enumerate(passes):
        unanswered += sum(isinstance(answer, str) for answer in found)
        other = [i for i, answer in enumerate(found) if answer != wanted[i]]
        changed |= set(other)
        why += [f"pass {number}, row {i}: {found[i]}, not {wanted[i]}" for i in other]
    return {
        "rows": rows,
        "passes": len(passes),
        "rows_changed": len(changed),
        "unanswered": unanswered,
        "served_by": served_by,
        "why": why,
    }


def send(
    service: LocalService, asked: list[Body], in_flight: int, answered: Callable[[], None]
) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        transport = HttpTransport(service.url, None, in_flight, timeout_s=300, retries=8)
        try:
            return await answers(transport, asked, in_flight, answered)
        finally:
            await transport.aclose()

    return asyncio.run(all_of_them())


@contextmanager
def one_dies(service: LocalService, after: int) -> Iterator[Callable[[], None]]:
    """To be called after each answer: after so many, a replica is killed that has others open."""
    victim = replicas(service, SERVES)[0]
    left = itertools.count(after - 1, -1)

    def count() -> None:
        if next(left) == 0:
            victim.kill()

    yield count
    assert not victim.is_running(), "nothing was killed: too few requests"
