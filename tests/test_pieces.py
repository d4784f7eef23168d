"""Pieces between decode steps: how large they are, and how often they come."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import random_pair

from lda_core import CaptureRequest, DoesNotFit, Engine, EngineConfig, Request, ScoreRequest
from lda_core.pieces import PIECE_S, Pace, PieceQueue


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Row:
    tokens: int
    kind: str = ""
    left: bool = False
    refused: DoesNotFit | None = None


class Work:
    """A pass takes `fixed_s`, and `token_s` for each of its padded tokens."""

    def __init__(self, fixed_s: float, token_s: float, most: int = 4096) -> None:
        self.clock = Clock()
        self.pace = Pace(self.clock)
        self.fixed_s, self.token_s = fixed_s, token_s
        self.sizes: list[int] = []
        self.seconds: list[float] = []
        self.pieces: list[list[Row]] = []
        self.queue: PieceQueue[Row] = PieceQueue(
            None,  # type: ignore[arg-type]
            most,
            self.pace,
            self.work,
            lambda row: DoesNotFit("x", "x"),
            lambda row: 1,
        )

    def work(self, piece: list[Row], limit: Callable[[], int]) -> Iterator[int]:
        self.pieces.append(piece)
        size, read = len(piece) * max(row.tokens for row in piece), 0
        while read < size:
            self.sizes.append(min(size - read, max(1, limit() // len(piece)) * len(piece)))
            self.seconds.append(self.fixed_s + self.token_s * self.sizes[-1])
            self.clock.now += self.seconds[-1]
            read += self.sizes[-1]
            if read < size:
                yield read

    def run(self, rows: list[Row]) -> list[Row]:
        """In the order in which they come out."""
        for row in rows:
            self.queue.add(row)
        out = []
        while not self.queue.idle:
            out += self.queue.step()
        return out


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0, 1e-4), (0.004, 1e-5), (0, 1e-3), (0, 1e-6)])
def test_pieces_grow_or_shrink_to_their_time(fixed_s: float, token_s: float) -> None:
    work = Work(fixed_s, token_s)
    work.run([Row(8) for _ in range(8000)])
    late = work.seconds[12:-1]
    assert max(late) < 1.1 * PIECE_S and max(work.sizes) <= 4096
    if token_s > 1e-6:  # else all the tokens that memory holds are quick
        # All but what is left over of those that are planned at a time.
        assert sorted(late)[len(late) // 4] > 0.6 * PIECE_S
    else:
        assert max(work.sizes) == 4096


def test_a_long_row_is_a_piece_of_its_own_and_kinds_do_not_mix() -> None:
    work = Work(0, 1e-3)
    long, *others = rows = [Row(500), *(Row(3, kind) for kind in "abab" * 20)]
    assert set(work.run(rows)) == set(rows) and work.pieces[0] == [long]
    assert all(len({row.kind for row in piece}) == 1 for piece in work.pieces)
    assert sum(map(len, work.pieces)) == len(rows) == len(others) + 1


@pytest.mark.parametrize(
    ("fixed_s", "token_s", "longest_s"), [(0, 1e-3, 0.022), (0.05, 1e-4, 0.11), (0.004, 1e-5, 0.04)]
)
def test_a_long_row_is_read_in_several_steps(
    fixed_s: float, token_s: float, longest_s: float
) -> None:
    """Of about 20 ms each, or twice what a pass takes whatever its size."""
    work = Work(fixed_s, token_s)
    work.queue.add(Row(8000))
    steps = []
    while not work.queue.idle:
        start = work.clock.now
        work.queue.step()
        steps.append(work.clock.now - start)
    assert sum(work.sizes) == 8000 and max(steps[1:]) < longest_s
    assert max(work.sizes) * token_s > 0.4 * max(PIECE_S, 2 * fixed_s) or max(work.sizes) == 4096


def test_rows_that_leave_a_piece_at_work_are_out_once() -> None:
    work = Work(0, 1e-3)
    gone, stays, after = Row(300), Row(300), Row(4)
    for row in (gone, stays, after):
        work.queue.add(row)
    assert work.queue.step() == [] and work.pieces == [[gone]]
    gone.left = True
    assert work.queue.step() == [gone] and work.pieces == [[gone], [stays]]
    work.queue.put_back()  # memory is wanted: it starts again
    out = [row for _ in range(60) for row in work.queue.step()]
    assert out == [stays, after] and work.queue.idle
    assert work.pieces == [[gone], [stays], [stays], [after]]


def test_many_that_wait_are_not_planned_at_every_step() -> None:
    """And whoever comes later does not go first."""
    work = Work(0, 1e-3)
    rows = [Row(5 + i % 7, "ab"[i % 2]) for i in range(16384)]
    for row in rows:
        work.queue.add(row)
    work.queue.step()
    start = time.thread_time()
    out = []
    for _ in range(40):
        work.queue.add(Row(1))
        out += work.queue.step()
    assert (time.thread_time() - start) / 40 < 0.01
    assert len(out) > 40 and set(out) <= set(rows[:2300])


def test_where_a_step_takes_longer_pieces_do_too() -> None:
    work = Work(0, 1e-3)
    for seconds in (0.08, 0.08, 5.0, 0.08):  # one of them reads a prompt
        work.pace.stepped(seconds)
    work.run([Row(1) for _ in range(2000)])
    assert 0.06 < max(work.seconds[5:]) < 0.09


def test_pieces_get_a_ninth_of_the_time_while_rows_decode() -> None:
    pair = random_pair()
    engine = Engine(pair, EngineConfig(max_slots=4))
    clock = engine._pace.clock = Clock()
    for i in range(4):
        engine.enqueue(engine.accept(Request((5, 6 + i), max_new_tokens=100, ignore_eos=True)))
    for _ in range(1200):
        engine.enqueue_score(engine.accept_score(ScoreRequest((5,) * 30, (6,) * 30)))
    advance, work = engine._advance, engine._scoring.queue._work

    def slow_advance() -> object:
        clock.now += 0.01
        return advance()

    def slow_work(piece: Any, limit: Callable[[], int]) -> Iterator[int]:
        yield from work(piece, limit)
        clock.now += 0.014

    engine._advance = slow_advance  # type: ignore[assignment, method-assign]
    engine._scoring.queue._work = slow_work
    total = steps = 0
    after: list[int] = []  # decode steps between pieces
    while engine.live_rows or not total:
        engine.step()
        total, steps = total + 1, steps + 1
        before = clock.now
        engine.piece_step()
        if clock.now > before:
            after.append(steps)
            steps = 0
    assert len(after) > 6
    assert set(after[1:-1]) == {12}  # of 10 ms each, for a piece of 14 ms


@pytest.mark.parametrize("what", ["score", "capture"])
def test_rows_decode_between_the_passes_of_one_long_text(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And see neither its hooks nor the attention that gives its weights."""
    pair = random_pair()
    engine = Engine(pair, EngineConfig(max_slots=4, prefill_tokens=16))
    engine._pace.clock = Clock()
    monkeypatch.setattr(engine._pace, "_step_s", 1e-9)
    prompt, rest = (5,) * 60, (6,) * 60
    row = Request((5, 6), max_new_tokens=40, ignore_eos=True)
    alone = Engine(pair).generate([row])[0].token_ids
    scored, captured = ScoreRequest(prompt, rest), CaptureRequest(prompt, rest, layer=1, mean=True)
    whole_score = Engine(pair).score([scored])[0]
    whole_capture = Engine(pair).capture([captured])[0]
    monkeypatch.setattr(PieceQueue, "_go_on", one_pass)
    decoding = engine.accept(row)
    engine.enqueue(decoding)
    of_score, of_capture = engine.accept_score(scored), engine.accept_capture(captured)
    if what == "score":
        engine.enqueue_score(of_score)
    else:
        engine.enqueue_capture(of_capture)
    between = 0
    while not engine.idle:
        engine.step()
        engine.piece_step()
        between += engine.live_rows > 0 and not (of_score.scored or of_capture.captured)
        for model in (pair.after, pair.before):
            assert model.config._attn_implementation == "sdpa"
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers)
    assert between >= 7  # 120 tokens, 16 in a pass
    assert decoding.completion is not None and decoding.completion.token_ids == alone
    if what == "score":
        assert of_score.scored is not None
        torch.testing.assert_close(
            torch.tensor(of_score.scored.after), torch.tensor(whole_score.after)
        )
    else:
        assert of_capture.captured is not None
        torch.testing.assert_close(of_capture.captured.tensors, whole_capture.tensors)


def one_pass(queue: PieceQueue[Any]) -> bool:
    """Time is up after each."""
    return next(queue._passes, None) is None


def test_a_piece_at_work_gives_way_to_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory runs out in a step; and comes all the same."""
    pair = random_pair()
    engine = Engine(pair, EngineConfig(max_slots=4, prefill_tokens=16))
    monkeypatch.setattr(PieceQueue, "_go_on", one_pass)
    row = engine.accept_score(ScoreRequest((5,) * 60, (6,) * 60))
    engine.enqueue_score(row)
    engine.piece_step()
    queue = engine._scoring.queue
    assert queue._piece == [row]
    advance = engine._advance
    failed: list[int] = []

    def fails_once() -> Any:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("injected")
        return advance()

    monkeypatch.setattr(engine, "_advance", fails_once)
    engine.step()
    assert queue._piece == [] and row.scored is None
    while not engine.idle:
        engine.piece_step()
    assert row.scored is not None and row.scored.error is None
