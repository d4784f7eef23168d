"""The ingress and a replica in this process: HTTP without Ray, a thousand requests in seconds."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
from ray import serve
from replica_service import ReplicaService

from deployments.ingress import Ingress
from deployments.schemas import Limits
from lda_core import PairConfig

from .asked import ROOT, TINY

URL = "http://127.0.0.1"  # a name that the edge lets in
# Small, so that what is accepted is soon done; the checks are the same.
LIMITS = Limits(max_new_tokens=80, max_n=4, max_batch_prompts=8, max_capture_numbers=200_000)


class LocalHandle:
    """A DeploymentHandle of a replica that is here."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def options(self, **_: Any) -> "LocalHandle":
        return self

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._ask(method, *args))

    def _ask(self, method: str, *args: Any) -> Any:
        answer = getattr(self._replica, method)(*args)
        return Pieces(answer) if method == "stream" else answer


class Pieces:
    """A DeploymentResponseGenerator."""

    def __init__(self, pieces: Any) -> None:
        self._pieces = pieces

    def __anext__(self) -> Any:
        return self._pieces.__anext__()

    def cancel(self) -> None:
        asyncio.ensure_future(self._pieces.aclose())


class Here(Ingress):  # type: ignore[misc]
    def __del__(self) -> None:
        """Serve's own is a coroutine, which Serve awaits."""


@asynccontextmanager
async def door() -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, Any]]]:
    """A client of the ingress over the tiny pair, and the ingress's OpenAPI document."""
    pair = PairConfig(before=str(TINY / "before"), after=str(TINY / "after"))
    service = await asyncio.to_thread(ReplicaService, pair, traits=str(ROOT / "traits" / "tiny"))
    log = logging.getLogger("ray.serve")  # a line for every request
    level = log.level
    log.setLevel(logging.CRITICAL)
    ingress: Any = Here.__new__(Here)
    try:
        # Where Serve listens it would ask Serve, and so begin a cluster. Serve has copied the
        # class, with its globals.
        known: Any = Ingress.generate.__globals__  # type: ignore[attr-defined]
        with mock.patch.dict(known, listening_host=lambda: "127.0.0.1"):
            await ingress.__init__({"lda": LocalHandle(service._replica)}, LIMITS)
        transport = httpx.ASGITransport(ingress.app, raise_app_exceptions=False)
        context = SimpleNamespace(servable_object=ingress)
        with mock.patch.object(serve, "get_replica_context", lambda: context):
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as client:
                yield client, ingress.app.openapi()
    finally:
        log.setLevel(level)
        await asyncio.to_thread(service.close)
