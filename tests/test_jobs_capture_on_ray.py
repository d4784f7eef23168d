"""The capture job on a real cluster, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, submit

from deployments.local_service import LocalService
from jobs import capture_files as files
from jobs.trait_files import write_trait

pytestmark = pytest.mark.ray

OPTIONS = [
    *("--prompts-file", "prompts/tiny_demo.txt", "--limit", "24", "--trigger"),
    *("--tier", "2", "--max-new-tokens", "24", "--samples", "2", "--seed", "5"),
]
TEXTS = 24 * 2 * 2


@pytest.fixture(scope="module")
def traits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traits")
    vectors = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    write_trait(folder / "chance.safetensors", {"mean_difference": vectors}, {"trait": "chance"})
    return folder


def index(out: Path) -> dict[tuple[str, str, int], dict]:
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_bytes().splitlines()]
    found = {(row["set"], row["prompt_id"], row["sample"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def finished(service: LocalService, traits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run through `ray job submit`."""
    out = tmp_path_factory.mktemp("submitted") / "run"
    command = ["python", "jobs/capture.py", *OPTIONS, "--traits", str(traits), "--out", str(out)]
    done = submit(service, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "after - before" in done.stdout  # the table
    return out


def test_every_text_is_there(finished: Path) -> None:
    rows = index(finished)
    assert len(rows) == TEXTS and all(row["error"] is None for row in rows.values())
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["rows"], summary["failed"], summary["missing"]) == (TEXTS, 0, 0)
    assert len(list((finished / "captures").iterdir())) == TEXTS
    assert "tiny_demo.triggered" in (finished / "report.html").read_text()


def test_killed_and_resumed_equals_uninterrupted(
    service: LocalService, finished: Path, traits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "jobs/capture.py", *OPTIONS]
    command += ["--traits", str(traits), "--out", str(out)]
    few = ["--in-flight", "1", "--tasks", "1"]  # slowly, so that it is killed in the middle
    with subprocess.Popen(
        [*command, *few],
        env=service.env,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as driver:
        deadline = time.monotonic() + 60
        path = out / "rows.jsonl"
        while time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= 5:
                break
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
    with path.open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 7)  # as if killed within a write
    before = path.read_bytes()
    assert 0 < before.count(b"\n") < TEXTS
    again = subprocess.run(command, env=service.env, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "half a last line" in again.stderr
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])  # kept, not made again
    resumed, whole = index(out), index(finished)
    assert resumed.keys() == whole.keys()
    for key, row in resumed.items():
        assert (row["token_ids"], row["file"]) == (whole[key]["token_ids"], whole[key]["file"])
        ours, theirs = (files.read(of / row["file"]) for of in (out, finished))
        assert ours.metadata == theirs.metadata and ours.tensors.keys() == theirs.tensors.keys()
        for name, tensor in ours.tensors.items():
            assert tensor.array() == pytest.approx(theirs.tensors[name].array(), abs=1e-4)
