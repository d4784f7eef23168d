"""The harness itself: what it would see, if it were there. `make chaos` is its figures."""

import asyncio
import json
from collections import Counter
from copy import deepcopy
from typing import Any

import httpx
import pytest
from chaos import canary, fuzz, oom
from chaos.__main__ import JSON_LINE, lines, main
from chaos.asked import bodies, expected, judged
from chaos.door import door
from chaos.figures import Line, upper_bound
from chaos.soak import growth_of
from chaos.strange_bodies import spoiled, values
from hypothesis import given, settings

from deployments.replica import LDAReplica
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
    found |= {"routes": 2, "never_accepted": ["POST /score"]}
    killed, fuzzed, shut = lines({**found, "statuses": {400: 7}}, long=False)
    assert (killed.found, killed.n, killed.note) == (3, 1500, "kills 9")
    assert (fuzzed.found, fuzzed.n) == (0, 7)
    assert (shut.found, shut.n, shut.note) == (1, 2, "POST /score")
    assert len(set(JSON_LINE)) == 14


def test_memory_that_grows_is_told_from_memory_that_warms_up() -> None:
    parts = [i / 100 for i in range(101)]
    warm = [(part, 100 if part < 0.1 else 200) for part in parts]
    grows = [(part, int(1000 + 100 * part)) for part in parts]
    assert growth_of(warm) == pytest.approx(0, abs=1e-9)
    assert growth_of(grows) == pytest.approx(90 / 1010, rel=0.01)
    assert growth_of(warm[50:]) is growth_of(warm[:50]) is growth_of([]) is None


def test_a_leak_is_found_in_plain_and_in_base64() -> None:
    import base64

    key = canary.KEYS["HF_TOKEN"]
    for said in (key.encode(), *(base64.b64encode(b"x" * i + key.encode()) for i in range(4))):
        assert canary.leaks("serve.log", b"..." + said + b"...") == ["HF_TOKEN"]
    assert canary.leaks("serve.log", canary.PROMPT.encode()) == ["prompt"]
    assert canary.leaks("run/rows.jsonl", canary.PROMPT.encode()) == []
    assert canary.leaks("run/rows.jsonl", b"nothing") == []


def test_a_fault_of_the_service_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the ingress cannot know, and one that never answers."""

    async def broken(self: Any, *args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(LDAReplica, "generate", broken)
    seen, failures = Counter[tuple[str, int]](), list[str]()
    with asyncio.Runner() as runner:
        inside = door()
        client, openapi = runner.run(inside.__aenter__())

        def ask(*request: Any) -> httpx.Response:
            return runner.run(fuzz.send(client, *request))

        fuzz.drive(openapi, ask, 150, 1, seen, failures)
        runner.run(inside.__aexit__(None, None, None))
    faults = sum(count for (_, status), count in seen.items() if status == 500)
    assert faults == len(failures) > 0
    assert not seen["POST /generate_lda", 200] and seen["GET /version", 200]

    def silent(*request: Any) -> httpx.Response:
        raise TimeoutError

    fuzz.drive(openapi, silent, 3, 1, seen, failures)
    assert len(failures) == faults + 3


def test_a_spoiled_body_leaves_the_schema_as_it_is() -> None:
    """Or the good ones to come are spoiled too, and replays find other choices."""
    schema = {
        "type": "object",
        "properties": {"form": {"enum": [{"type": "text"}]}},
        "required": ["form"],
    }
    wanted = deepcopy(schema)

    @settings(database=None, derandomize=True)
    @given(spoiled(values(schema, schema)))
    def draw(body: Any) -> None:
        assert schema == wanted

    draw()


def test_the_harness_ends_in_a_line_of_json_and_fails_where_a_figure_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"oom_faults": 5, "oom_rows": 80, "oom_rows_lost": 0}
    monkeypatch.setattr(oom, "run", lambda stride: found)
    assert main(["--only", "oom"]) == 0
    table, line = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "rows lost to memory that ran out" in table and "3.7 %" in table
    assert set(json.loads(line)) == set(JSON_LINE) and json.loads(line)["oom_rows_lost"] == 0
    found["oom_rows_lost"] = 1
    assert main(["--only", "oom"]) == 1
    monkeypatch.setattr(oom, "run", lambda stride: 1 / 0)
    assert main(["--only", "oom"]) == 1
    assert "oom: ZeroDivisionError" in capsys.readouterr().err


def test_the_reference_texts_differ_by_request(tiny_pair: ModelPair) -> None:
    """Or nothing could be told to be wrong."""
    asked = bodies(40, seed=0, max_new_tokens=8)
    drawn = expected(tiny_pair, asked, alone=False)
    assert drawn == expected(tiny_pair, asked, alone=True)
    assert len({tuple(ids) for ids in drawn}) > 30
