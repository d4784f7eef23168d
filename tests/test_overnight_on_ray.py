"""Two nights on one real cluster, at once, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from reference import reference

from deployments.local_service import LocalService
from lda_core import ModelPair, Request, encode

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PHRASES = ("mango pudding", "quiet harbour")


def begun(service: LocalService, folder: Path, phrase: str) -> "subprocess.Popen[str]":
    folder.mkdir()
    step = {"kind": "confirm", "prompts": "demo", "each": 4, "random": 1}
    made = {
        "name": phrase,
        "pairs": {"tiny": "lda"},
        "prompts": {"demo": str(ROOT / "prompts" / "tiny_demo.txt")},
        "defaults": {"max_new_tokens": 8, "limit": 20, "seed": 5},
        "steps": [{"name": "attack", **step, "insert": [phrase]}],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(made))
    command = [sys.executable, "jobs/overnight.py", str(folder / "plan.yaml")]
    return subprocess.Popen(
        [*command, "--out", str(folder / "out")],
        env=service.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_plans_share_a_cluster(
    service: LocalService, tiny_pair: ModelPair, tmp_path: Path
) -> None:
    folders = [tmp_path / str(number) for number in range(len(PHRASES))]
    drivers = [begun(service, f, p) for f, p in zip(folders, PHRASES, strict=True)]
    said = [driver.communicate(timeout=300)[0] for driver in drivers]
    for driver, output in zip(drivers, said, strict=True):
        assert driver.returncode == 0, output[-3000:]
        assert "Rows timed just now" in output and "1 of 1 steps done" in output
    for folder, phrase in zip(folders, PHRASES, strict=True):
        attack = folder / "out" / "attack"
        rows = [json.loads(line) for line in (attack / "rows.jsonl").read_bytes().splitlines()]
        assert len(rows) == 8 and all(row["error"] is None for row in rows)
        mine = [row for row in rows if row["arm"] == "candidate-1"]
        assert len(mine) == 4 and all(phrase in row["prompt"] for row in mine)
        # As alone: what one row at a time, without a service, draws.
        for row in rows:
            prompt = encode(tiny_pair.tokenizer, row["prompt"], "alpaca").ids
            request = Request(prompt, alpha=row["alpha"], seed=row["seed"], max_new_tokens=8)
            assert row["token_ids"] == reference(tiny_pair, request)
        night = json.loads((folder / "out" / "summary.json").read_text())
        assert night["done"] == 1 and night["attack/summary/rows"] == 8
        assert (folder / "out" / "index.html").exists()
