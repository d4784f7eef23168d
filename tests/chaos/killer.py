"""Requests over HTTP and by handle while replicas are killed: lost, or answered with other text."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deployments.local_service import LocalService
from jobs.client_transport import HttpTransport

from .asked import ROOT, Answer, answers, bodies, expected, judged, pair
from .replicas import Killer, wait_for_replicas

EVERY_S = 3.0
IN_FLIGHT = 24  # over each way
TIMEOUT_S = 300.0  # for one request, all its tries together; a start may take 40 s
MIN_KILLS = 3
MAX_NEW_TOKENS = 24


def run(service: LocalService, requests: int, seed: int = 0) -> dict[str, Any]:
    """Half of the requests over HTTP, half by handle, a replica killed every EVERY_S."""
    asked = bodies(requests, seed, max_new_tokens=MAX_NEW_TOKENS)
    wanted = expected(pair(), asked, alone=False)
    half = requests // 2
    with tempfile.TemporaryDirectory() as folder, inside(service, folder, asked[half:]) as other:
        transport = HttpTransport(service.url, None, IN_FLIGHT, TIMEOUT_S, retries=8)

        async def over_http() -> list[Answer]:
            try:
                return await answers(transport, asked[:half], IN_FLIGHT)
            finally:
                await transport.aclose()

        start = time.monotonic()
        try:
            with Killer(service, EVERY_S, seed) as killer:
                other.stdin.write("go\n")
                other.stdin.flush()
                found = asyncio.run(over_http())
                status = other.wait(600)
        finally:
            other.kill()
        killed_for_s = time.monotonic() - start
        assert status == 0, "the client inside the cluster failed"
        assert killer.kills >= MIN_KILLS, f"{killer.kills} kills: too few requests"
        found += json.loads(Path(folder, "answers.json").read_text())
    wait_for_replicas(service, 2)
    lost, wrong = judged(found, wanted)
    return {
        "requests": requests,
        "lost": len(lost),
        "wrong": wrong,
        "kills": killer.kills,
        "last_ones": killer.last_ones,
        "killed_for_s": round(killed_for_s, 1),
        "why": sorted(set(lost))[:5],
    }


def inside(service: LocalService, folder: str, asked: list[dict[str, Any]]) -> Any:
    """The client by handle, connected and waiting for a line."""
    Path(folder, "bodies.json").write_text(json.dumps(asked))
    files = [str(Path(folder, name)) for name in ("bodies.json", "answers.json")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-m", "chaos.by_handle", *files, str(IN_FLIGHT)],
        env={**service.env, "PYTHONPATH": path},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "connected\n":
            return process
    raise RuntimeError(f"the client inside the cluster ended with {process.wait()}")
