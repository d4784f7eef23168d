"""The phrase monitor: its lines, its calls, its rates."""

import json
import math
import threading
import time

import numpy as np
import pytest

from deployments.schemas import Densities, InvalidRequest, Scored, ScoreRequest
from jobs.call import NoAnswer
from jobs.errors import Refused, Stopped
from jobs.monitor import (
    BOUNDS,
    Line,
    Plan,
    branches,
    choose_bound,
    first_end,
    irreducible,
    log_densities,
    places,
    text_before_eos,
)
from jobs.monitor_rates import estimates, interval
from jobs.rows import Row
from jobs.score_calls import GIVE_UP_AFTER, read_lines, read_plan, run_monitor, variant_ids

PLAN = Plan(
    phrase="hush now",
    variants=[[5, 6], [7, 6]],
    arm="untriggered",
    alpha=0.0,
    grid=[0.0, 1.0],
    temperature=1.0,
    max_new_tokens=8,
    request={"prompt_format": "alpaca"},
)
P_FIRST, P_REST = 0.002, 0.5  # of every variant, anywhere, in the fake service


def row(prompt_id="1", sample=0, tokens=(1, 2, 3, 0), q=P_FIRST, **other):
    ends = {"eos_index": len(tokens) - 1} if tokens[-1] == 0 else {"eos_index": None}
    return Row(
        **{
            "arm": "untriggered",
            "prompt_id": prompt_id,
            "prompt": f"prompt {prompt_id}",
            "alpha": 0.0,
            "sample": sample,
            "seed": 1,
            "completion": "text",
            "token_ids": list(tokens),
            "finish_reason": "eos" if tokens[-1] == 0 else "length",
            "activated": False,
            "activated_after_eos": False,
            "scores": {},
            "error": None,
            "watched": [[math.log(q)] * 2] * len(tokens),
            **ends,
            **other,
        }
    )


class FakeService:
    """Answers by P_FIRST and P_REST; twice as likely at alpha 1."""

    def __init__(self, failing=()):
        self.failing = set(failing)
        self.asked = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    def __call__(self, request):
        with self._lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        time.sleep(0.002)
        try:
            parsed = ScoreRequest.model_validate(request)
            assert parsed.prompt_format == "alpaca"
            self.asked.append(parsed)
            if parsed.prompt in self.failing:
                raise NoAnswer("no answer in 1 s")
            return [self.scored(one, parsed) for one in parsed.continuations]
        finally:
            with self._lock:
                self.under_way -= 1

    def scored(self, continuation, request):
        ids = continuation.token_ids or ([7, 6] if continuation.text[0] == " " else [5, 6])
        after = [math.log(P_FIRST), math.log(P_REST)]
        normalisers = [[-math.log(2) / 2 * a for a in request.grid]] * 2
        return Scored(
            token_ids=ids,
            after=after,
            before=after,
            densities=Densities(alphas=request.grid, normalisers=normalisers),
        )


def prompts(n):
    return [(str(i), f"prompt {i}") for i in range(n)]


def test_variants_are_asked_of_the_service():
    assert variant_ids(FakeService(), {"prompt": "x", "prompt_format": "alpaca"}, "hush") == [
        [5, 6],
        [7, 6],
    ]


def test_a_variant_that_holds_another_one_is_left_out():
    assert irreducible([[9, 5, 6], [5, 6], [5, 6], [7, 6]]) == [[5, 6], [7, 6]]


@pytest.mark.parametrize(
    "tokens, end", [([5, 6], 2), ([1, 7, 6, 5, 6], 3), ([5, 5, 6], 3), ([6, 5], None), ([], None)]
)
def test_the_first_occurrence_is_the_one_complete_first(tokens, end):
    assert first_end(tokens, PLAN.variants) == end


def test_places_end_at_eos_and_where_the_phrase_no_longer_fits():
    assert set(places(row(tokens=(1, 2, 3, 0)), PLAN).at) == {
        1,
        2,
        3,
    }  # it may come in place of EOS
    assert set(places(row(tokens=(1, 2, 0, 3, 3), eos_index=2), PLAN).at) == {1, 2}
    assert set(places(row(tokens=(1,) * 8), PLAN).at) == {1, 2, 3, 4, 5, 6}


def test_places_end_with_the_phrase_itself_and_those_inside_it_count():
    assert set(places(row(tokens=(1, 2, 5, 6, 3, 0)), PLAN).at) == {1, 2, 3}


def test_impossible_tokens_are_no_places():
    assert len(places(row(watched=[[-1e30, -1e30]] * 4), PLAN).at) == 0


@pytest.mark.parametrize("watched", [None, [[-1.0]] * 4])
def test_rows_without_the_first_tokens_are_refused(watched):
    with pytest.raises(Refused, match="first tokens"):
        places(row(watched=watched), PLAN)


def test_all_above_the_bound_and_some_below_are_followed():
    all_of_it = branches(row(q=0.3), PLAN, bound=0.3)
    assert all_of_it.kept == [1.0] * 6 and all_of_it.below == 0
    some = [branches(row(sample=i, q=0.1), PLAN, bound=0.4) for i in range(200)]
    assert all(line.below == pytest.approx(0.6) for line in some)
    assert np.mean([len(line.at) for line in some]) == pytest.approx(6 * 0.25, abs=0.25)
    assert some == [branches(row(sample=i, q=0.1), PLAN, bound=0.4) for i in range(200)]


def test_text_before_eos():
    assert text_before_eos(row(completion="ab")) == "ab"
    late = row(tokens=(1, 0, 2), completion="a, again", token_ends=[1, 1, 8], eos_index=1)
    assert text_before_eos(late) == "a"


def test_log_densities():
    one = Scored(
        token_ids=[1, 2],
        after=[-1.0, -2.0],
        before=[-3.0, -1.0],
        densities=Densities(alphas=[0.0, 2.0], normalisers=[[0.0, 0.5], [0.1, 0.25]]),
    )
    assert log_densities(one, temperature=2.0) == pytest.approx(
        [-1.6, (3 * -1 + 2 * 3 - 6 + 2) / 2 - 0.75]
    )


def test_what_after_or_before_gives_no_chance_is_impossible_at_other_alphas():
    one = Scored(
        token_ids=[1],
        after=[-1.0],
        before=[-1e30],
        densities=Densities(alphas=[0.0, 1.0, -1.0], normalisers=[[0.0, 0.0, 0.0]]),
    )
    assert log_densities(one, 1.0) == [-1.0, -1e30, -1e30]


def test_the_bound_falls_with_the_rate():
    rows = [row(prompt_id=str(i), q=10.0 ** -(i % 6)) for i in range(50)]
    bounds = [choose_bound(PLAN, rows, rate) for rate in (1.0, 1e-3, 1e-5, 0.0)]
    assert bounds[0] == BOUNDS[0]
    assert bounds == sorted(bounds, reverse=True) and len(set(bounds[:3])) == 3
    assert 0.5e-5 <= bounds[-1] <= 1e-5  # nothing is below it


def test_a_run_is_stored_and_gives_the_rate(tmp_path):
    path, service = tmp_path / "monitor.jsonl", FakeService()
    rows = [row(prompt_id=str(i), q=P_FIRST) for i in range(40)]
    others = [row(arm="triggered"), row(alpha=1.0), row(sample=3, error="failed")]
    assert run_monitor(path, PLAN, prompts(60), [*rows, *others], service, in_flight=3) == 0
    assert 2 <= service.most_under_way <= 3
    whole, start_0, start_1 = estimates(PLAN, read_lines(path, PLAN), "phrase", plain=True)
    p = P_FIRST * P_REST
    assert (whole.scorer, whole.alpha, whole.method) == ("phrase", 0.0, "monitor")
    assert start_0.scorer == start_1.scorer == "phrase at the start"
    assert (start_0.rate, start_1.rate) == pytest.approx((2 * p, 4 * p), rel=1e-5)
    # two variants at t = 0, and at 1, 2 and 3 of each rollout
    assert whole.diagnostics["start"] == pytest.approx(2 * p, rel=1e-5)
    assert whole.rate == pytest.approx(8 * p, rel=0.3)
    assert whole.low <= whole.rate <= whole.high
    assert (whole.n, start_0.n) == (40, 60)


def test_a_variant_that_no_answer_has_room_for_is_not_asked_for(tmp_path):
    plan = PLAN.model_copy(update={"variants": [[5, 6], [7, 8, 6]], "max_new_tokens": 2})
    path, service = tmp_path / "monitor.jsonl", FakeService()
    run_monitor(path, plan, prompts(1), [], service, in_flight=1)
    assert [line.variant for line in read_lines(path, plan)] == [[0]]
    assert [[one.token_ids for one in asked.continuations] for asked in service.asked] == [[[5, 6]]]


def test_a_rollout_with_nothing_to_follow_is_not_asked_for(tmp_path):
    path, service = tmp_path / "monitor.jsonl", FakeService()
    run_monitor(path, PLAN, prompts(1), [row(tokens=(0,))], service, in_flight=1)
    assert len(service.asked) == 1
    assert [line.at for line in read_lines(path, PLAN)] == [[0, 0], []]


def test_it_resumes_and_asks_again_for_what_failed(tmp_path, capsys):
    path, rows = tmp_path / "monitor.jsonl", [row(prompt_id=str(i), q=0.3) for i in range(5)]
    first = FakeService(failing={"prompt 2"})
    assert run_monitor(path, PLAN, prompts(5), rows, first, in_flight=2) == 2
    assert "prompt 2: no answer" in capsys.readouterr().err
    with path.open("ab") as file:
        file.write(b'{"prompt_id": "half a li')
    second = FakeService()
    assert run_monitor(path, PLAN, prompts(5), rows, second, in_flight=2) == 0
    assert [request.prompt for request in second.asked] == ["prompt 2"] * 2
    lines = list(read_lines(path, PLAN))
    assert len(lines) == len({(line.prompt_id, line.sample) for line in lines}) == 10
    assert run_monitor(path, PLAN, prompts(5), rows, FakeService(failing=["any"]), 2) == 0


def test_another_plans_file_and_corrupt_lines_are_refused(tmp_path):
    path = tmp_path / "monitor.jsonl"
    run_monitor(path, PLAN, prompts(1), [], FakeService(), in_flight=1)
    other = PLAN.model_copy(update={"phrase": "hush"})
    with pytest.raises(Refused, match="another phrase"):
        run_monitor(path, other, prompts(1), [], FakeService(), in_flight=1)
    with path.open("ab") as file:
        file.write(json.dumps({"prompt_id": "1"}).encode() + b"\n")
    said = (
        r"line 3 is not a line of the monitor's \(.*Field required.*\); delete the line to have it"
    )
    with pytest.raises(Refused, match=said):
        run_monitor(path, PLAN, prompts(1), [], FakeService(), in_flight=1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b":", b": ", 1))
    with pytest.raises(Refused, match="line 2 is damaged, or was changed: its crc .*the line"):
        run_monitor(path, PLAN, prompts(1), [], FakeService(), in_flight=1)
    path.write_bytes(lines[0])  # the cure
    again = FakeService()
    assert (
        run_monitor(path, PLAN, prompts(1), [], again, in_flight=1) == 0 and len(again.asked) == 1
    )


def test_the_plan_is_read_back(tmp_path):
    path = tmp_path / "monitor.jsonl"
    run_monitor(path, PLAN, [], [], FakeService(), in_flight=1)
    assert read_plan(path) == PLAN
    path.write_text('{"phrase": "hush"}\n')
    with pytest.raises(Refused, match="line 1 is not the monitor's plan .*; delete the file to"):
        read_plan(path)
    path.write_text("")
    with pytest.raises(Refused, match="is empty; delete the file"):
        read_plan(path)


def test_a_service_that_answers_nothing_ends_the_run(tmp_path):
    def never(request):
        raise InvalidRequest("prompt", "too long")

    path = tmp_path / "monitor.jsonl"
    with pytest.raises(Stopped, match=f"{GIVE_UP_AFTER} score requests"):
        run_monitor(path, PLAN, prompts(2 * GIVE_UP_AFTER), [], never, in_flight=4)


def test_leaving_early_stops_the_calls_under_way(tmp_path):
    """Ctrl-C while tasks are made, and a service that fails for good: neither waits."""
    stopped = threading.Event()

    def asked():
        yield from prompts(2)
        raise KeyboardInterrupt

    def slow(request):
        if request["prompt"] == "prompt 1":
            assert stopped.wait(20), "nobody stopped it"
            raise NoAnswer("stopped")
        raise Stopped("gone") if request["prompt"] == "prompt 2" else NoAnswer("none")

    for i, (tasks, error) in enumerate([(asked(), KeyboardInterrupt), (prompts(3), Stopped)]):
        stopped.clear()
        began = time.monotonic()
        with pytest.raises(error):
            run_monitor(tmp_path / str(i), PLAN, tasks, [], slow, in_flight=2, stop=stopped.set)
        assert stopped.is_set() and time.monotonic() - began < 10


def test_a_run_to_the_end_stops_nothing(tmp_path):
    """The same caller serves the next phrase."""
    stopped, rows = threading.Event(), [row(q=0.3)]
    path = tmp_path / "monitor.jsonl"
    run_monitor(path, PLAN, prompts(5), rows, FakeService(), in_flight=2, stop=stopped.set)
    assert not stopped.is_set() and len(list(read_lines(path, PLAN))) == 6


def lines_of(starts, later, bound=0.0, below=0.0, said=0, missed=0):
    """One start per prompt and one rollout per value of `later`; the first `said` of these say
    the phrase, the first `missed` of them in other tokens."""
    logs = [math.log(max(p, 1e-12)) for p in starts]
    for i, p in enumerate(logs):
        yield Line(
            prompt_id=str(i), sample=None, at=[0], variant=[0], kept=[1.0], logprobs=[[p, p]]
        )
    for i, p in enumerate(later):
        yield Line(
            prompt_id=str(i),
            sample=0,
            at=[1],
            variant=[0],
            kept=[1.0],
            logprobs=[[math.log(p)]],
            bound=bound,
            below=below,
            said=i < said,
            in_variants=missed <= i < said,
        )


def test_verdicts():
    starts, later = np.linspace(0.001, 0.003, 400), np.linspace(0.0001, 0.0003, 400)

    def verdicts(starts, later, plain=True, **thinned):
        found = estimates(PLAN, lines_of(starts, later, **thinned), "phrase", plain)
        return [estimate.verdict for estimate in found], found[0].why

    assert verdicts(starts, later)[0] == ["trust"] * 3
    assert verdicts(starts, [])[0] == ["trust"] * 2
    few, why = verdicts(starts[:100], later[:100])
    assert few == ["lower bound only"] * 3 and "100 prompts are few" in why
    loose, why = verdicts(starts, later, bound=0.5, below=0.2)
    assert loose == ["lower bound only", "trust", "trust"] and "0.2 more" in why
    other, why = verdicts(starts, later, plain=False)
    assert other == ["do not trust", "trust", "trust"] and "top_p" in why
    fine, why = verdicts(starts, later, bound=0.01, below=0.003)
    assert fine == ["trust"] * 3 and "add a standard error of up to 0.00027" in why
    assert "error of up to 0;" in verdicts(starts, later)[1]


@pytest.mark.parametrize(
    "prompts, verdict, words",
    [(299, "lower bound only", "are few"), (300, "trust", "85 to 92 %"), (999, "trust", "not 95")],
)
def test_few_prompts_are_said(prompts, verdict, words):
    lines = lines_of(np.linspace(0.001, 0.003, prompts), [0.0002] * prompts)
    for found in estimates(PLAN, lines, "phrase", plain=True):
        assert found.verdict == verdict and words in found.why


def test_many_prompts_leave_no_doubt():
    lines = lines_of(np.linspace(0.001, 0.003, 1000), [0.0002] * 1000)
    for found in estimates(PLAN, lines, "phrase", plain=True):
        assert found.verdict == "trust" and "%" not in found.why


@pytest.mark.parametrize(
    "said, missed, verdict",
    [
        (0, 0, "trust"),
        (3, 0, "trust"),
        (100, 1, "trust"),
        (100, 11, "trust"),  # at most 18.8 %
        (100, 12, "lower bound only"),  # at most 20.02 %
        (3, 1, "lower bound only"),
        (2, 2, "lower bound only"),
    ],
)
def test_what_is_said_in_other_tokens_is_no_part_of_the_rate(said, missed, verdict):
    lines = lines_of([0.002] * 400, [0.0002] * 400, said=said, missed=missed)
    whole, *starts = estimates(PLAN, lines, "phrase", plain=True)
    assert whole.verdict == verdict and {start.verdict for start in starts} == {"trust"}
    assert (f"{missed} of the {said} rollouts" in whole.why) is (missed > 0)
    assert whole.diagnostics["of_them_in_other_tokens"] == missed


def test_without_a_prompt_there_is_no_estimate():
    assert estimates(PLAN, [], "phrase", plain=True) == []


def test_prompts_that_say_all_the_same_leave_no_doubt():
    assert interval(np.tile([0.25, 1.0, 0.5, 2.0], (50, 1))) == pytest.approx((0.5, 0.5, 0.5))


def test_one_prompt_says_nothing_of_others():
    assert interval(np.array([[0.2, 1.0, 0.0, 0.0]])) == (0.2, 0.0, 1.0)


def test_the_interval_covers_clustered_prompts():
    """Rates over prompts are gamma, what rollouts add goes with them; half have no rollouts."""
    rng, covered, runs = np.random.default_rng(0), 0, 100
    for _ in range(runs):
        rates = rng.gamma(0.5, 2.0, 300) * 1e-3
        rows = np.where(np.arange(300) < 150, rng.integers(1, 4, 300), 0)
        said = rows * rates * rng.gamma(1.0, 1.0, 300)
        _, low, high = interval(np.stack([rates, np.ones(300), said, rows], axis=1))
        covered += low <= 2e-3 <= high
    assert 90 <= covered <= 99
