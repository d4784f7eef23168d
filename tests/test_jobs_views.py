"""Which rollouts the viewer shows."""

from collections.abc import Iterable

from report_fixture import row

from jobs.rollout_view import viewer_data
from jobs.rows import Row
from jobs.views import VIEWED_EMPTY, VIEWED_PROMPTS, samples

HIT = (6, 19)


def shown(rows: Iterable[Row]) -> list[tuple[str, float, int, bool]]:
    return [(r.prompt_id, r.alpha, r.sample, bool(r.activated)) for r in samples(list(rows))]


def test_a_sample_that_activated_is_shown_before_the_first_one() -> None:
    rows = [
        row(prompt_id="p", alpha=alpha, sample=i, span=HIT if (alpha, i) in hits else None)
        for hits in [{(1.0, 2), (1.0, 4), (2.0, 3), (2.0, 0)}]
        for alpha in (2.0, 0.0, 1.0)
        for i in (3, 0, 4, 1, 2)
    ]
    assert shown(rows) == [("p", 0.0, 0, False), ("p", 1.0, 2, True), ("p", 2.0, 0, True)]
    assert shown(rows[::-1]) == shown(rows)


def test_prompts_of_which_any_sample_activated_come_first() -> None:
    rows = [
        row(prompt_id=str(p), alpha=alpha, sample=i, span=HIT if fired else None)
        for p in range(4)
        for alpha in (0.0, 2.0)
        for i in range(3)
        for fired in [(p, alpha, i) in {(2, 2.0, 1), (3, 0.0, 2)}]
    ]
    assert list(dict.fromkeys(r[0] for r in shown(rows))) == ["3", "2", "0", "1"]


def test_some_prompts_that_never_activated_are_kept() -> None:
    rows = [
        row(prompt_id=str(p), sample=i, span=HIT if p < 100 and i else None)
        for p in range(200)
        for i in range(2)
    ]
    found = shown(rows)
    assert len(found) == VIEWED_PROMPTS
    assert [(sample, hit) for _, _, sample, hit in found] == [(1, True)] * 30 + [(0, False)] * 10


def test_other_arms_and_failed_rows() -> None:
    failed = {"error": "no answer", "activated": None}
    rows = [
        row(prompt_id="p", sample=0, **failed),
        row(prompt_id="p", sample=1),
        row(prompt_id="q", sample=0, **failed),
        row(prompt_id="p", arm="triggered", span=HIT),
        row(prompt_id="p", arm="control", span=HIT),
    ]
    assert shown(rows) == [("p", 0.0, 0, False)]


def test_activated_rollouts_of_the_empty_prompt_are_one_group() -> None:
    rows = [
        row(arm="empty", prompt_id="empty", prompt="", alpha=alpha, sample=i, span=span)
        for alpha in (2.0, 0.0)
        for i in range(30)
        for span in [HIT if i % 5 == 1 else None]
    ]
    found = samples([*rows, row(prompt_id="p")])
    assert [(r.arm, r.alpha, r.sample) for r in found] == (
        [("untriggered", 0.0, 0)]
        + [("empty", 0.0, i) for i in range(1, 30, 5)]
        + [("empty", 2.0, i) for i in (1, 6, 11, 16)]
    )
    assert len(found) == 1 + VIEWED_EMPTY
    *_, last = viewer_data(found)["prompts"]
    assert (last["arm"], last["id"]) == ("empty", "empty")
    assert len(last["rollouts"]) == VIEWED_EMPTY
