"""Ten times what a service can hold, at once: whoever is accepted is answered, the others are told
so, quickly."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from deployments.local_service import LocalService, free_port, local_service

from . import canary
from .asked import ROOT, Body, bodies, expected, pair

ONGOING, QUEUED = 16, 16
HELD = ONGOING + QUEUED
TIMEOUT_S = 120.0
MAX_NEW_TOKENS, LONG = 120, 400
REFUSALS = 50


@contextmanager
def small_service(folder: Path) -> Iterator[LocalService]:
    """The shipped one with one replica that holds ONGOING requests and has QUEUED wait, and with
    the canary's secrets, of which one is the key that it asks for."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    (replica,) = application["deployments"]
    replica |= {
        "num_replicas": 1,
        "max_ongoing_requests": ONGOING,
        "max_queued_requests": QUEUED,
    }
    application["args"]["edge"] = {"keys_file_env": canary.KEYS_FILE}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(config))
    with (
        canary.secrets_in_the_environment(folder),
        local_service(file, port=free_port(), log=folder / "small.log") as service,
    ):
        yield service


@dataclass(frozen=True)
class Told:
    """What one request was told, and how soon; status 0: nothing."""

    status: int
    ids: list[int] | None
    retry_after: str | None
    ms: float

    @property
    def refused(self) -> bool:
        return self.status == 429 and (self.retry_after or "").isdigit()


def run(service: LocalService, times: int = 10, seed: int = 2) -> dict[str, Any]:
    """`times` as many requests at once as the small service holds; and then, while it is kept full,
    one after the other."""
    asked = bodies(times * HELD, seed, MAX_NEW_TOKENS)
    wanted = expected(pair(), asked, alone=False)
    crowd, more = asyncio.run(_told(service, asked))
    good = sum(told.ids == right for told, right in zip(crowd, wanted, strict=True))
    refused = [told.ms for told in crowd if told.refused]
    return {
        "overload_requests": len(asked),
        "answered": good,
        "refused": len(refused),
        # Neither its own text nor told to come again.
        "overload_lost": len(asked) - good - len(refused),
        # A slow machine sends them so slowly that each finds a place.
        "refused_in_the_crowd_ms": _middle_and_p95(refused) if len(refused) > 1 else None,
        "refused_ms": _middle_and_p95(more),
    }


async def _told(service: LocalService, asked: list[Body]) -> tuple[list[Told], list[float]]:
    """What `asked` are told, sent all at once; and how soon one is refused that comes while the
    service holds all it can."""
    async with httpx.AsyncClient(
        base_url=service.url,
        timeout=TIMEOUT_S,
        limits=httpx.Limits(max_connections=None),
        headers=canary.key_header(),
        trust_env=False,
    ) as client:

        async def ask(body: Body) -> Told:
            start = time.perf_counter()
            try:
                answer = await client.post("/v1/lda/generate", json=body)
            except httpx.HTTPError:
                return Told(0, None, None, 0.0)
            ms = 1000 * (time.perf_counter() - start)
            ids = answer.json()[0]["token_ids"] if answer.status_code == 200 else None
            return Told(answer.status_code, ids, answer.headers.get("retry-after"), ms)

        await ask(asked[0])  # warm
        crowd = await asyncio.gather(*map(ask, asked))
        long = {**asked[0], "max_new_tokens": LONG, "ignore_eos": True}
        told: list[Told] = []

        async def hold() -> None:
            """Keep one place taken: of requests that come at once more may be refused than are too
            many, and each that is answered leaves its place."""
            while True:
                told.append(await ask(long))
                if told[-1].refused:
                    await asyncio.sleep(0.05)

        # One more than there are places: one of them is always being refused.
        holding = [asyncio.ensure_future(hold()) for _ in range(HELD + 1)]
        await asyncio.sleep(1)  # until their burst is over
        more: list[Told] = []
        begun = time.perf_counter()
        while sum(one.refused for one in more) < REFUSALS:
            assert time.perf_counter() - begun < TIMEOUT_S, "it was hardly ever full"
            more.append(await ask(asked[0]))
        for one in holding:
            one.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
    statuses = Counter(one.status for one in told + more if not one.refused)
    assert set(statuses) <= {200}, statuses
    return crowd, [one.ms for one in more if one.refused]


def _middle_and_p95(times: list[float]) -> list[float]:
    return [round(t, 1) for t in (statistics.median(times), statistics.quantiles(times, n=20)[-1])]
