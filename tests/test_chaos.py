"""The short form of the harness, figure by figure; see `chaos`. `make chaos` is all of it."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos import canary, fuzz, killer, oom, overload, same_text, soak, stalled
from chaos.__main__ import JSON_LINE, lines
from chaos.asked import bodies, expected, judged
from chaos.door import door
from chaos.figures import Line, upper_bound
from chaos.soak import growth_of

from deployments.local_service import LocalService
from lda_core import ModelPair


def test_the_bound_of_none_in_n_is_exact() -> None:
    assert upper_bound(1500) == pytest.approx(0.001995, rel=1e-3)
    assert (1 - upper_bound(60)) ** 60 == pytest.approx(0.05)
    assert "0.2 %" in str(Line("lost", 0, 1500)) and "%" not in str(Line("lost", 1, 1500))


def test_what_is_lost_or_wrong_is_counted() -> None:
    found = [[1, 2], "Unanswered: gone", [1, 3]]
    assert judged(found, [[1, 2]] * 3) == (["Unanswered: gone"], 1)


def test_the_table_has_a_line_for_each_figure_that_is_there() -> None:
    found = {"requests": 1500, "lost": 1, "wrong": 2, "kills": 9, "fuzz_cases": 7, "fuzz_5xx": 0}
    killed, fuzzed = lines({**found, "statuses": {400: 7}}, long=False)
    assert (killed.found, killed.n, killed.note) == (3, 1500, "kills 9")
    assert (fuzzed.found, fuzzed.n) == (0, 7)
    assert len(set(JSON_LINE)) == 14


def test_memory_that_grows_is_told_from_memory_that_warms_up() -> None:
    seconds = [float(i) for i in range(101)]
    warm = [(s, 100 if s < 10 else 200) for s in seconds]
    grows = [(s, int(1000 + s)) for s in seconds]
    assert growth_of(warm, 100.0) == pytest.approx(0, abs=1e-9)
    assert growth_of(grows, 100.0) == pytest.approx(90 / 1010, rel=0.01)
    assert growth_of(warm[50:], 100.0) is None and growth_of(warm[:50], 100.0) is None


def test_a_leak_is_found_in_plain_and_in_base64() -> None:
    import base64

    key = canary.KEYS["HF_TOKEN"]
    for said in (key.encode(), *(base64.b64encode(b"x" * i + key.encode()) for i in range(4))):
        assert canary.leaks("serve.log", b"..." + said + b"...") == ["HF_TOKEN"]
    assert canary.leaks("serve.log", canary.PROMPT.encode()) == ["prompt"]
    assert canary.leaks("run/rows.jsonl", canary.PROMPT.encode()) == []
    assert canary.leaks("run/rows.jsonl", b"nothing") == []


def test_out_of_memory_loses_no_row() -> None:
    found = oom.run(stride=797)
    assert found["oom_rows_lost"] == 0 and found["oom_faults"] > 10


def test_a_fault_of_the_service_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the ingress cannot know."""
    from deployments.replica import LDAReplica

    async def broken(self: Any, *args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(LDAReplica, "generate", broken)

    async def ask() -> int:
        async with door() as (client, _):
            answer = await client.post("/generate_lda", json={"prompt": "Hi"})
            return answer.status_code

    assert asyncio.run(ask()) == 500


@pytest.mark.ray
@pytest.mark.slow
class TestOnTheShippedService:
    def test_no_5xx_without_a_cause(self, service: LocalService) -> None:
        found = fuzz.run(service, cases=2_000, over_http=300)
        assert found["fuzz_5xx"] == 0, found["why"]
        assert found["fuzz_cases"] >= 2_000
        assert min(found["statuses"].get(status, 0) for status in (200, 400)) > 200

    def test_texts_are_the_same_alone_in_batches_in_any_order_and_after_a_death(
        self, service: LocalService
    ) -> None:
        found = same_text.run(service, rows=96)
        assert found["rows_changed"] == found["unanswered"] == 0, found
        assert found["served_by"] == 2

    def test_stalled_bodies_do_not_stop_the_others(self, service: LocalService) -> None:
        found = stalled.run(service, stalled=100, rounds=2, each=60)
        assert found["stalled_p50_ratio"] < 3, found

    def test_nothing_is_lost_while_replicas_are_killed(self, service: LocalService) -> None:
        found = killer.run(service, requests=1_500)
        assert found["lost"] == found["wrong"] == 0, found
        assert found["kills"] > 1

    def test_a_small_soak(self, service: LocalService, tmp_path: Path) -> None:
        found = soak.run(service, tmp_path / "soak", rows=400, every_s=0.5)
        assert found["soak_rows"] == 400 and found["soak_processes"] > 3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """A service that can hold little, with secrets in its environment."""
    with canary.secrets_in_the_environment():
        with overload.small_service(tmp_path_factory.mktemp("small")) as running:
            yield running


@pytest.mark.ray
@pytest.mark.slow
def test_overload_is_refused_and_loses_nothing(small: LocalService) -> None:
    found = overload.run(small)
    assert found["overload_lost"] == 0, found
    assert found["answered"] >= overload.HELD and found["refused"] > 100, found


@pytest.mark.ray
@pytest.mark.slow
def test_no_secret_is_in_any_output(small: LocalService, tmp_path: Path) -> None:
    found = canary.run(small, tmp_path)
    assert found["canary_found"] == 0, found["why"]
    assert found["outputs"] > 80
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").open()]
    assert all(canary.PROMPT in json.dumps(row) for row in rows[:1])  # it was really asked


def test_the_reference_texts_differ_by_request(tiny_pair: ModelPair) -> None:
    """Or nothing could be told to be wrong."""
    asked = bodies(40, seed=0, max_new_tokens=8)
    drawn = expected(tiny_pair, asked, alone=False)
    assert drawn == expected(tiny_pair, asked, alone=True)
    assert len({tuple(ids) for ids in drawn}) > 30
