"""Pieces between decode steps: how large they are, and how often they come."""

from dataclasses import dataclass

import pytest
from models import random_pair

from lda_core import DoesNotFit, Engine, EngineConfig, Request, ScoreRequest
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
    """A piece takes `fixed_s`, and `token_s` for each of its padded tokens."""

    def __init__(self, fixed_s: float, token_s: float, most: int = 4096) -> None:
        self.clock = Clock()
        self.pace = Pace(self.clock)
        self.fixed_s, self.token_s = fixed_s, token_s
        self.sizes: list[int] = []
        self.seconds: list[float] = []
        self.kinds: list[set[str]] = []
        self.queue: PieceQueue[Row] = PieceQueue(
            None,  # type: ignore[arg-type]
            most,
            self.pace,
            self.work,
            lambda row: DoesNotFit("x", "x"),
            lambda row: 1,
        )

    def work(self, piece: list[Row], limit: int) -> None:
        self.sizes.append(len(piece) * max(row.tokens for row in piece))
        self.seconds.append(self.fixed_s + self.token_s * self.sizes[-1])
        self.kinds.append({row.kind for row in piece})
        self.clock.now += self.seconds[-1]

    def run(self, rows: list[Row]) -> None:
        for row in rows:
            self.queue.add(row)
        while not self.queue.idle:
            self.queue.step()


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0, 1e-4), (0.004, 1e-5), (0, 1e-3), (0, 1e-6)])
def test_pieces_grow_or_shrink_to_their_time(fixed_s: float, token_s: float) -> None:
    work = Work(fixed_s, token_s)
    work.run([Row(8) for _ in range(8000)])
    late = work.seconds[12:-1]
    assert max(late) < 1.1 * PIECE_S and max(work.sizes) <= 4096
    if token_s > 1e-6:  # else all the tokens that memory holds are quick
        assert min(late) > 0.6 * PIECE_S
    else:
        assert max(work.sizes) == 4096


def test_a_long_row_is_a_piece_of_its_own_and_kinds_do_not_mix() -> None:
    work = Work(0, 1e-3)
    rows = [Row(500), *(Row(3, kind) for kind in "abab" * 20)]
    work.run(rows)
    assert 500 in work.sizes and all(len(kinds) == 1 for kinds in work.kinds)


def test_where_a_step_takes_longer_pieces_do_too() -> None:
    work = Work(0, 1e-3)
    for seconds in (0.08, 0.08, 5.0, 0.08):  # one of them reads a prompt
        work.pace.stepped(seconds)
    work.run([Row(1) for _ in range(2000)])
    assert 0.06 < max(work.seconds[5:]) < 0.09


def test_pieces_get_a_third_of_the_time_while_rows_decode() -> None:
    pair = random_pair()
    engine = Engine(pair, EngineConfig(max_slots=4))
    clock = engine._pace.clock = Clock()
    for i in range(4):
        engine.enqueue(engine.accept(Request((5, 6 + i), max_new_tokens=60, ignore_eos=True)))
    for _ in range(300):
        engine.enqueue_score(engine.accept_score(ScoreRequest((5,) * 30, (6,) * 30)))
    advance, work = engine._advance, engine._scoring.queue._work

    def slow_advance() -> object:
        clock.now += 0.01
        return advance()

    def slow_work(piece: object, limit: int) -> None:
        clock.now += 0.014
        work(piece, limit)  # type: ignore[arg-type]

    engine._advance = slow_advance  # type: ignore[assignment, method-assign]
    engine._scoring.queue._work = slow_work  # type: ignore[method-assign]
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
    assert len(after) > 15
    assert set(after[1:-1]) == {3}  # of 10 ms each, for a piece of 14 ms
