"""Ten times what a service can hold, at once: whoever is accepted is answered, the others are told
so, quickly."""

import asyncio
import statistics
import time
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
MAX_NEW_TOKENS = 120


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
    """`times` as many requests at once as the small service holds; and, while it is full, one more
    after the other."""
    requests = times * HELD
    asked = [
        {**body, "max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True}
        for body in bodies(requests, seed, 8)
    ]
    wanted = expected(pair(), asked, alone=False)
    crowd, more = asyncio.run(_crowd(service, asked))
    good = sum(told.ids == right for told, right in zip(crowd, wanted, strict=True))
    refused = [told.ms for told in crowd if told.refused]
    assert len(more) > 1, "it was never full"
    return {
        "overload_requests": requests,
        "answered": good,
        "refused": len(refused),
        # Neither its own text nor told to come again.
        "overload_lost": requests - good - len(refused),
        "refused_in_the_crowd_ms": _middle_and_p95(refused),
        "refused_ms": _middle_and_p95([told.ms for told in more if told.refused]),
        "refused_alone": len(more),
    }


async def _crowd(service: LocalService, asked: list[Body]) -> tuple[list[Told], list[Told]]:
    """What `asked` are told, sent all at once; then what more are told while the service is full
    of those that it holds."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=service.url,
        timeout=TIMEOUT_S,
        limits=limits,
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
        crowd = [asyncio.ensure_future(ask(body)) for body in asked]
        while sum(not one.done() for one in crowd) > HELD:
            await asyncio.sleep(0.01)
        more: list[Told] = []
        while len(more) < 50 and (told := await ask(asked[0])).refused:
            more.append(told)
        return list(await asyncio.gather(*crowd)), more


def _middle_and_p95(times: list[float]) -> list[float]:
    return [round(t, 1) for t in (statistics.median(times), statistics.quantiles(times, n=20)[-1])]
