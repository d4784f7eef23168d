"""The benchmark of one's own pair: what is measured, in which order, and what it means."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from itertools import cycle

import pytest
from conftest import ROOT, submit
from fakes import PAIR, FakeHandle, FakeService, complete, slow_complete
from ray.serve.exceptions import BackPressureError

from deployments.schemas import InvalidRequest
from jobs import batching_speed
from jobs.batching_speed import Bench, FailedRequest, how_far, main, requests_for, sweep
from jobs.call import Generation
from jobs.errors import Stopped
from jobs.prompts import Prompt
from jobs.speed import (
    Measured,
    Served,
    estimate_seconds,
    grows_no_more,
    per_replica,
    recommend,
    sizes,
    speed,
    summary,
    words,
)

TWO_REPLICAS = Served(2, max_slots=64, max_ongoing_requests=128, max_batch_size=64)


@dataclass
class FakeTarget(FakeService):
    replicas: Served = TWO_REPLICAS

    def served(self):
        return self.replicas


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"What is number {i}?\n" for i in range(300)))
    return path


@pytest.fixture
def job(prompts):
    """Runs it; returns its exit status."""

    def job(*options, handle=None, served=TWO_REPLICAS, file=prompts):
        target = FakeTarget(handle or FakeHandle(), replicas=served)
        return main(["--prompts", str(file), *options], target)

    return job


@pytest.fixture
def growing(monkeypatch):
    """The fake's speeds are noise: go on to the end, whatever they are."""
    monkeypatch.setattr(batching_speed, "grows_no_more", lambda speeds: False)


def at(rows_per_second, requests=10):
    return Measured(requests, 48 * requests, requests / rows_per_second, (0.5,) * requests)


# -- pure functions ------------------------------------------------------------------------


def test_sizes_double_up_to_the_last_which_is_always_there():
    assert sizes(1) == [1]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(48) == [1, 2, 4, 8, 16, 32, 48]


@pytest.mark.parametrize(
    "rates, best",
    [
        ({1: 5.0}, 1),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 4),
        ({1: 10.0, 2: 95.0, 4: 100.0, 8: 90.0}, 2),
        ({1: 10.0, 2: 94.9, 4: 100.0, 8: 90.0}, 4),
        ({8: 100.0, 4: 99.0, 1: 1.0}, 4),
    ],
)
def test_recommended_is_the_fewest_within_five_percent_of_the_best(rates, best):
    assert recommend(rates) == best


def test_it_grows_no_more_after_two_weak_doublings_in_a_row():
    assert not grows_no_more([100])
    assert not grows_no_more([100, 100])
    assert grows_no_more([50, 100, 104, 109])
    assert grows_no_more([100, 104, 90])
    assert not grows_no_more([100, 104, 110])
    assert not grows_no_more([100, 101, 200])
    assert not grows_no_more([100, 100, 100, 200])


def test_seconds_of_a_run():
    rates = {1: 2.0, 8: 10.0}
    assert estimate_seconds(100, rates, 1) == 50
    assert estimate_seconds(100, rates, 8) == estimate_seconds(100, rates, 500) == 10
    assert estimate_seconds(100, rates, 7) == 50
    with pytest.raises(ValueError, match="0 in flight"):
        estimate_seconds(100, rates, 0)


def test_a_speed_is_the_median_of_rounds_and_all_their_requests_seconds():
    rounds = [
        Measured(8, 80, 1.0, tuple(range(60, 101))),
        Measured(8, 80, 2.0, tuple(range(10, 60))),
        Measured(8, 80, 8.0, tuple(range(0, 10))),
    ]
    found = speed(rounds)
    assert (found.rows_per_second, found.tokens_per_second) == (4.0, 40.0)
    assert found.median_s == 50 and found.p95_s == 95


def test_what_a_service_holds_is_slots_or_what_reaches_them():
    assert TWO_REPLICAS.holds == 128
    assert Served(3, None, 20, None).holds == 60
    assert Served(1, 64, 16, 64).holds == 16


def test_how_far_it_goes_by_itself_and_when_told():
    assert how_far(None, TWO_REPLICAS)[0] == 128
    assert "raise max_slots" in how_far(None, TWO_REPLICAS)[1]
    assert how_far(None, Served(8, 64, 128, 64)) == (256, "256 is the default of --up-to")
    assert how_far(512, TWO_REPLICAS) == (512, "512 is --up-to")


def test_turns_are_whole_and_one_call_is_repeated():
    assert [requests_for(k) for k in (1, 2, 3, 8, 48)] == [8, 8, 9, 16, 96]


def test_a_share_is_rounded_up():
    assert [per_replica(k, 2) for k in (1, 2, 33)] == [1, 1, 17]


# -- the sweep -----------------------------------------------------------------------------


class Speeds:
    """Measures what it is told; `seen` says in which order it was asked."""

    def __init__(self, rates):
        self.rates, self.seen = rates, []

    def __call__(self, size):
        self.seen.append(size)
        rate = self.rates(size, self.seen.count(size) - 1)
        if rate is None:
            raise FailedRequest("out of memory")
        return at(rate)


def test_rounds_are_interleaved_and_the_warm_up_is_not_counted():
    measure = Speeds(lambda size, number: 1000.0 if number == 0 else size * 10.0 + number)
    swept = sweep(measure, 4, "the end", repeats=3)
    assert measure.seen == [1, 1, 2, 2, 4, 4, 1, 2, 4, 1, 2, 4]
    assert {size: len(rounds) for size, rounds in swept.rounds.items()} == {1: 3, 2: 3, 4: 3}
    assert swept.speeds[4].rows_per_second == pytest.approx(42)  # of 41, 42, 43; not the 1000
    assert (swept.stopped, swept.failed) == ("the end", False)


def test_it_stops_where_speed_no_longer_grows_and_keeps_to_that_in_later_rounds():
    measure = Speeds(lambda size, _: min(size, 8) * 10.0)
    swept = sweep(measure, 256, "the end", repeats=2)
    assert measure.seen == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 1, 2, 4, 8, 16, 32]
    assert swept.stopped == "two doublings in a row, to 32, brought less than 5 % each"
    assert not swept.failed


def test_only_the_first_round_decides_how_far():
    measure = Speeds(lambda size, number: size * 10.0 if number < 2 else 10.0)
    assert list(sweep(measure, 16, "the end", repeats=2).rounds) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("failing", [0, 1, 2])  # in the warm-up, the first round, the second
def test_a_failure_ends_it_below_that_size(failing):
    measure = Speeds(lambda size, n: None if size >= 8 and n >= failing else size * 1.0)
    swept = sweep(measure, 32, "the end", repeats=3)
    assert list(swept.rounds) == [1, 2, 4]
    assert [len(rounds) for rounds in swept.rounds.values()] == [3, 3, 3]
    assert swept.failed and swept.stopped == "with 8 at a time a request failed: out of memory"


def test_nothing_is_left_where_one_call_fails():
    with pytest.raises(Stopped, match="with 1 at a time a request failed: out of memory"):
        sweep(Speeds(lambda size, n: None), 8, "the end", repeats=1)


# -- one measurement -----------------------------------------------------------------------


def bench(handle, prompts=20):
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    texts = [Prompt(str(i), f"What is {i}?") for i in range(prompts)]
    return Bench(handle, Generation(sampling, (), 30.0), enumerate(cycle(texts)), 2.0)


def test_so_many_are_under_way_at_once_and_no_more():
    together = threading.Barrier(4, timeout=20)

    def waits_for_three_others(request):
        together.wait()
        return complete(request)

    handle = FakeHandle(waits_for_three_others)
    measured = bench(handle).measure(4)
    assert handle.most_under_way == 4
    assert (measured.rows, measured.tokens, len(measured.request_s)) == (8, 32, 8)
    assert 0 < max(measured.request_s) <= measured.elapsed_s


def test_one_at_a_time_is_one_at_a_time_with_the_prompts_in_order():
    handle = FakeHandle(slow_complete)  # slow, so that a second one would be seen
    bench(handle).measure(1)
    assert handle.most_under_way == 1
    assert [r.prompt for r in handle.seen] == [f"What is {i}?" for i in range(8)]
    assert [(r.n, r.seed, r.alpha, r.ignore_eos) for r in handle.seen] == [
        (1, i, 2.0, True) for i in range(8)
    ]


def test_no_prompt_comes_twice_while_there_are_others():
    handle = FakeHandle()
    measuring = bench(handle, prompts=33)
    for size in (1, 2, 8):
        measuring.measure(size)
    measuring.measure_samples(4)
    assert len({r.prompt for r in handle.seen}) == len(handle.seen) == 8 + 8 + 16 + 1


def test_prompts_repeat_in_order_with_seeds_of_their_own():
    handle = FakeHandle()
    measuring = bench(handle, prompts=3)
    measuring.measure(1)
    measuring.measure(1)
    assert [r.prompt[8] for r in handle.seen] == list("0120120120120120")
    assert len({r.seed for r in handle.seen}) == 16


def test_samples_of_one_prompt_are_one_request():
    handle = FakeHandle()
    measured = bench(handle).measure_samples(16)
    assert [r.n for r in handle.seen] == [16]
    assert (measured.rows, len(measured.request_s)) == (16, 1)


def test_a_row_with_an_error_is_a_failure():
    def fails(request):
        failed = {"finish_reason": "error", "error": "non-finite logits"}
        return [c.model_copy(update=failed) for c in complete(request)]

    with pytest.raises(FailedRequest, match="non-finite logits"):
        bench(FakeHandle(fails)).measure(2)


# -- the job -------------------------------------------------------------------------------


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_the_result(job, capsys, growing):
    handle = FakeHandle()
    assert job("--up-to", "8", "--repeats", "2", "--rows", "5000", handle=handle) == 0
    found = result(capsys)
    rates = {int(size): rate for size, rate in found["rows_per_second"].items()}
    assert list(rates) == [1, 2, 4, 8]
    best = found["recommended_in_flight"]
    assert best == recommend(rates)
    assert found["recommended_per_replica"] == -(-best // 2)
    assert found["one_call_rows_per_second"] == rates[1]
    assert found["speedup"]["1"] == 1
    assert found["speedup"]["8"] == pytest.approx(rates[8] / rates[1], abs=0.001)
    assert found["night_rows"] == int(8 * 3600 * rates[best])
    assert found["run_seconds"] == pytest.approx(5000 / rates[best])
    assert found["one_call_run_seconds"] == pytest.approx(5000 / rates[1])
    assert found["pair"]["after"] == "org/after" and found["device"] == "cpu"
    assert (found["replicas"], found["alpha"], found["max_new_tokens"]) == (2, 1.0, 48)
    assert "commit" in found and found["stopped"] == "8 is --up-to"
    assert found["samples_of_one_prompt"]["n"] == found["recommended_per_replica"]
    assert list(found["request_seconds"]["8"]) == ["median", "p95"]
    # a warm-up and two rounds of each size, and of the samples of one prompt
    assert len({r.prompt for r in handle.seen}) == len(handle.seen) == 3 * (8 + 8 + 8 + 16) + 3
    assert all(r.ignore_eos and r.max_new_tokens == 48 for r in handle.seen)


def test_without_up_to_it_goes_as_far_as_the_service_holds(job, capsys, growing):
    assert job("--repeats", "1", served=Served(1, 4, 128, 64)) == 0
    assert list(result(capsys)["rows_per_second"]) == ["1", "2", "4"]


def test_more_than_the_service_holds_is_said_to_wait(job, capsys, growing):
    assert job("--repeats", "1", "--up-to", "4", served=Served(1, 2, 128, 64)) == 0
    assert "notice: the service holds 2, of 4 the others wait" in capsys.readouterr().out


def test_what_is_printed_for_a_person(job, capsys, growing):
    assert job("--up-to", "2", "--repeats", "2") == 0
    out = capsys.readouterr().out
    rounds = [
        line.split(":")[0][6:] + line.split()[2] for line in out.splitlines() if "round " in line
    ]
    assert rounds == ["1/21", "1/22", "2/21", "2/22"]
    assert "1 (one call per prompt)" in out and "(recommended)" in out
    assert "A night of 8 hours: " in out and "10,000 rows: " in out


def test_the_words_say_what_to_set():
    rounds = {1: [at(1.0)], 32: [at(20.0)], 64: [at(20.5)]}
    swept = batching_speed.Sweep(rounds, "64 is --up-to", False)
    found = {**summary(swept, None, 7200, PAIR, TWO_REPLICAS), "max_new_tokens": 48}
    said = "\n".join(words(found, TWO_REPLICAS))
    assert "Recommended: 32 in flight" in said and "16 for each of 2 replica(s)" in said
    assert "--tasks 2 --in-flight 16" in said
    assert "max_slots and max_batch_size at least 16, max_ongoing_requests 16 to 32" in said
    assert "(now: max_slots 64, max_batch_size 64, max_ongoing_requests 128)" in said
    assert "28,800 rows of 48 tokens at one call per prompt, 576,000 with 32 in flight" in said
    assert "7,200 rows: 2:00:00 at one call per prompt, 0:06:00 with 32 in flight" in said
    assert found["samples_of_one_prompt"] is None


def test_few_prompts_repeat_and_it_says_so(job, capsys, tmp_path, growing):
    file = tmp_path / "few.txt"
    file.write_text("One?\nTwo?\nThree?\n")
    handle = FakeHandle()
    assert job("--up-to", "8", "--repeats", "1", handle=handle, file=file) == 0
    assert "3 prompt(s) for up to 82 requests: they repeat in order" in capsys.readouterr().out
    assert len(handle.seen) <= 82
    assert job("--up-to", "8", "--repeats", "1") == 0
    assert "they repeat" not in capsys.readouterr().out


def refuse_the_first_batch_of_8(error):
    """Sizes 1, 2 and 4 send 16 requests each in the first round, with the seeds from 0 on."""

    def answer(request):
        if 48 <= request.seed < 64:
            raise error
        return complete(request)

    return FakeHandle(answer)


@pytest.mark.parametrize(
    "error, says",
    [
        (InvalidRequest("prompt", "too long", "does_not_fit"), "invalid request: prompt: too long"),
        (BackPressureError(1, 1), "BackPressureError"),
    ],
)
def test_refused_requests_end_it_with_what_was_measured(job, capsys, growing, error, says):
    options = ("--up-to", "32", "--repeats", "2", "--timeout-s", "1")
    assert job(*options, handle=refuse_the_first_batch_of_8(error)) == 1
    found = result(capsys)
    assert list(found["rows_per_second"]) == ["1", "2", "4"]
    assert found["stopped"].startswith("with 8 at a time a request failed: ")
    assert says in found["stopped"]


def test_one_request_of_too_many_samples_is_a_notice(job, capsys, growing, monkeypatch):
    def refuses(request):
        if request.n > 1:
            raise InvalidRequest("n", "must be between 1 and 1")
        return complete(request)

    monkeypatch.setattr(batching_speed, "recommend", lambda speeds: 2)
    assert job("--up-to", "2", handle=FakeHandle(refuses), served=Served(1, 4, 8, 4)) == 0
    out = capsys.readouterr().out
    assert "notice: 2 samples of one prompt in one request: " in out
    assert "must be between 1 and 1" in out
    assert json.loads(out.splitlines()[-1])["samples_of_one_prompt"] is None


def test_nothing_is_measured_where_one_call_fails(job, capsys, growing):
    def fails(request):
        raise RuntimeError("no weights")

    assert job("--up-to", "4", handle=FakeHandle(fails)) == 1
    out, err = capsys.readouterr()
    assert "with 1 at a time a request failed" in err and "no weights" in err
    assert "{" not in out


def test_what_the_service_does_not_allow_is_bad_usage(job, capsys):
    def refuses(request):
        raise InvalidRequest("alpha", "must be between -20 and 50")

    assert job("--alpha", "60", handle=FakeHandle(refuses)) == 2
    assert "refuses --alpha: must be between -20 and 50" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, says",
    [
        (["--alpha", "nan"], "argument --alpha: must be a number from -1,000,000 to 1,000,000"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: must be a whole number from 1"),
        (["--up-to", "0"], "argument --up-to: must be a whole number from 1 to 1,024"),
        (["--repeats", "1.5"], "argument --repeats: must be a whole number from 1 to 100"),
        (["--rows", "-3"], "argument --rows: must be a whole number from 1"),
        (["--timeout-s", "0"], "argument --timeout-s: must be a number from 1"),
        (["--prompt-format", "plain"], "argument --prompt-format"),
        (["--prompts", "none.txt"], "none.txt: No such file"),
        (["--prompts", "none.csv"], "ends in .txt or .jsonl"),
        (["--repeat", "3"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused_before_anything_is_sent(job, capsys, options, says):
    handle = FakeHandle()
    try:
        status = job(*options, handle=handle)
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and handle.seen == []
    assert says in capsys.readouterr().err


def test_the_folder_says_what_ran_and_holds_one_run(job, capsys, tmp_path, growing):
    out = tmp_path / "speed"
    assert job("--up-to", "2", "--repeats", "1", "--out", str(out)) == 0
    assert json.loads((out / "summary.json").read_text()) == result(capsys)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["pair"]["after_sha256"] == {"model.safetensors": "a1"}
    assert manifest["config"]["up_to"] == 2 and "ray" in manifest["versions"]
    handle = FakeHandle()
    assert job("--up-to", "2", "--out", str(out), handle=handle) == 2
    assert "holds another run" in capsys.readouterr().err and handle.seen == []


def test_a_relative_folder_in_a_ray_job_is_refused(job, monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert job("--out", "speed") == 2
    assert "give an absolute path" in capsys.readouterr().err


def test_ctrl_c_says_so(job, capsys):
    def interrupted(request):
        raise KeyboardInterrupt

    assert job(handle=FakeHandle(interrupted)) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.ray
def test_the_running_service_is_measured(service, tmp_path):
    """As a user runs it; `--up-to 2`, since more might end early on a busy machine."""
    out = tmp_path / "speed"
    command = ["python", "jobs/batching_speed.py", "--prompts", "prompts/tiny_demo.txt"]
    command += ["--up-to", "2", "--repeats", "1", "--max-new-tokens", "8", "--out", str(out)]
    done = submit(service, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((out / "summary.json").read_text())
    assert json.dumps(found) in done.stdout.splitlines()
    assert list(found["rows_per_second"]) == ["1", "2"] and found["replicas"] == 2
    best = str(found["recommended_in_flight"])
    rows_per_second = found["rows_per_second"][best]
    assert found["tokens_per_second"] == pytest.approx(8 * rows_per_second)  # none ended at EOS
    assert found["pair"]["dtype"] == "float32" and found["stopped"] == "2 is --up-to"
    assert "max_slots 64, max_batch_size 64, max_ongoing_requests 128" in done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["pair"]["after_sha256"]["model.safetensors"]) == 64


def test_it_needs_no_model_code():
    code = (
        "import sys; import jobs.batching_speed\n"
        "print([m for m in ('torch', 'transformers', 'lda_core') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
