"""Bodies that are sent by half and then not on: what they cost the other clients."""

import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from deployments.local_service import LocalService

from .asked import bodies

CLIENTS = 4
BODY_TIMEOUT_S = 20.0  # the shipped service's
HALF = (
    b"POST /v1/lda/generate HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    b'{"prompt": "What is'
)


def run(service: LocalService, stalled: int, rounds: int = 6, each: int = 100) -> dict[str, Any]:
    """The 99th percentile of `rounds` x `each` requests with `stalled` connections over that of as
    many without. Rounds with and without take turns, so that a loaded machine is loaded for both;
    before each comes one that does not count, while the service takes connections or lets go.
    """
    with_, without, open_ = list[float](), list[float](), list[int]()
    for _ in range(rounds):
        one_round(service, each)
        without += one_round(service, each)
        begun = time.perf_counter()
        with half_sent(service, stalled) as connections:
            one_round(service, each)
            with_ += one_round(service, each)
            waiting = sum(map(waits, connections))
        if time.perf_counter() - begun < BODY_TIMEOUT_S:  # after it they are to be dropped
            open_.append(waiting)
    assert open_, "no round ended before the bodies' deadline: the machine is too slow"
    p99 = [statistics.quantiles(times, n=100)[-1] for times in (with_, without)]
    p50 = [statistics.median(times) for times in (with_, without)]
    return {
        "stalled": stalled,
        # At the end of each round: a service that dropped them at once would look good.
        "still_open": min(open_),
        "requests_timed": 2 * rounds * each,
        "stalled_p99_ratio": round(p99[0] / p99[1], 3),
        "stalled_p50_ratio": round(p50[0] / p50[1], 3),
        "p99_ms": [round(1000 * seconds, 1) for seconds in p99],
    }


def one_round(service: LocalService, count: int) -> list[float]:
    """Seconds that each request took, CLIENTS at a time."""
    asked = [{**body, "max_new_tokens": 4} for body in bodies(count, 5, 4)]
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:

        def ask(body: dict[str, Any]) -> float:
            start = time.perf_counter()
            client.post("/v1/lda/generate", json=body).raise_for_status()
            return time.perf_counter() - start

        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(ask, asked))


@contextmanager
def half_sent(service: LocalService, count: int) -> Iterator[list[socket.socket]]:
    """So many connections whose body does not come on."""
    address = urlsplit(service.url)
    connections = []
    with ExitStack() as opened:
        for _ in range(count):
            connection = socket.create_connection((address.hostname, address.port), timeout=10)
            opened.enter_context(connection)
            connection.sendall(HALF)
            connections.append(connection)
        yield connections


def waits(connection: socket.socket) -> bool:
    """Neither answered nor closed."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False
