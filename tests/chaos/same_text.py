"""The same requests alone, in batches, in other orders, on other replicas, after a replica died."""

import asyncio
import random
import threading
import time
from typing import Any

from deployments.local_service import LocalService
from jobs.client_transport import HttpTransport

from .asked import Answer, Body, answers, bodies, expected, judged, pair
from .replicas import SERVES, replicas, wait_for_replicas

IN_FLIGHT = 64


def run(service: LocalService, rows: int, seed: int = 1) -> dict[str, Any]:
    """`rows` requests of mixed sampling, each against the engine alone in this process: one at a
    time, all at once, all at once in another order, and while a replica dies that holds some."""
    asked = bodies(rows, seed, max_new_tokens=24)
    wanted = expected(pair(), asked, alone=True)
    shuffled = random.Random(seed).sample(range(rows), rows)

    def ask(order: list[int], in_flight: int) -> list[Answer]:
        found = send(service, [asked[i] for i in order], in_flight)
        by_place = dict(zip(order, found, strict=True))
        return [by_place[i] for i in range(rows)]

    in_order = list(range(rows))
    passes = [ask(in_order, 1), ask(in_order, IN_FLIGHT), ask(shuffled, IN_FLIGHT)]
    # Both replicas have answered by now.
    served_by = len(replicas(service, SERVES))
    passes.append(while_one_dies(service, lambda: ask(shuffled, IN_FLIGHT)))
    wait_for_replicas(service, 2)
    changed, unanswered = set[int](), 0
    for found in passes:
        lost, _ = judged(found, wanted)
        unanswered += len(lost)
        changed |= {i for i, answer in enumerate(found) if answer != wanted[i]}
    return {
        "rows": rows,
        "passes": len(passes),
        "rows_changed": len(changed),
        "unanswered": unanswered,
        "served_by": served_by,
    }


def send(service: LocalService, asked: list[Body], in_flight: int) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        transport = HttpTransport(service.url, None, in_flight, timeout_s=120, retries=8)
        try:
            return await answers(transport, asked, in_flight)
        finally:
            await transport.aclose()

    return asyncio.run(all_of_them())


def while_one_dies(service: LocalService, ask: Any) -> Any:
    victim = replicas(service, SERVES)[0]

    def kill() -> None:
        time.sleep(0.15)
        victim.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        return ask()
    finally:
        thread.join()
