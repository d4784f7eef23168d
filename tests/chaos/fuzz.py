"""Good bodies and bad ones on every route: answers that say that the service is at fault."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings

from deployments.local_service import LocalService

from .door import door
from .strange_bodies import requests

TIMEOUT_S = 120.0  # of one request


def run(service: LocalService, cases: int, over_http: int, random_seed: int = 3) -> dict[str, Any]:
    """`cases` in all, of them `over_http` to the real service, the others to an ingress and a
    replica in this process."""
    seen, failures = Counter[tuple[str, int]](), list[str]()

    with asyncio.Runner() as runner:
        inside = door()
        client, openapi = runner.run(inside.__aenter__())
        try:

            def ask_here(*request: Any) -> httpx.Response:
                return runner.run(asyncio.wait_for(send(client, *request), TIMEOUT_S))

            drive(openapi, ask_here, cases - over_http, random_seed, seen, failures)
        finally:
            runner.run(inside.__aexit__(None, None, None))
        outside = httpx.AsyncClient(base_url=service.url, timeout=TIMEOUT_S, trust_env=False)

        def ask_there(*request: Any) -> httpx.Response:
            return runner.run(send(outside, *request))

        drive(openapi, ask_there, over_http, random_seed + 1, seen, failures)
        runner.run(outside.aclose())
    statuses = Counter[int]()
    for (_, status), count in seen.items():
        statuses[status] += count
    routes = {route for route, _ in seen if not route.startswith("GET")}
    return {
        "fuzz_cases": statuses.total(),
        "fuzz_5xx": len(failures),
        "statuses": dict(sorted(statuses.items())),
        # What is refused at the door tells nothing of what lies behind it.
        "routes": len(routes),
        "never_accepted": sorted(route for route in routes if not seen[route, 200]),
        "why": failures[:5],
    }


def drive(
    openapi: dict[str, Any],
    ask: Callable[..., httpx.Response],
    cases: int,
    random_seed: int,
    seen: "Counter[tuple[str, int]]",
    failures: list[str],
) -> None:
    """Counts what `cases` requests are answered, by route and status; a lost connection, or none in
    time, counts as status 0. Nothing is killed meanwhile, so a 503 has no cause either."""
    done = 0
    if not cases:
        return

    @seed(random_seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(openapi))
    def one(case: Any) -> None:
        nonlocal done
        ((method, path), body), headers = case
        done += 1
        try:
            response = ask(method, path, body, headers)
            status, said = response.status_code, response.text[:200]
        except (httpx.HTTPError, TimeoutError) as error:
            status, said = 0, repr(error)
        seen[f"{method.upper()} {path}", status] += 1
        if not 100 <= status < 500:
            failures.append(f"{status} of {method} {path} {headers}: {body!r:.300}: {said}")

    while done < cases:  # it stops early where it finds no more
        one()
        random_seed += 1000
        one = seed(random_seed)(one)


async def send(
    client: httpx.AsyncClient, method: str, path: str, body: Any, headers: dict[str, str]
) -> httpx.Response:
    if isinstance(body, bytes):
        return await client.request(method, path, content=body, headers=headers)
    name = body.pop("model", "lda") if "{model}" in path else ""
    path = path.replace("{model}", quote(name, safe="") or "-")
    return await client.request(method, path, params=body, headers=headers)
