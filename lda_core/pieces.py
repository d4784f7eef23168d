"""Rows that are read and not drawn, worked off in bounded pieces between decode steps.

A piece is bounded twice: by memory, in tokens (halved when it runs out), and by time, so that a
row that comes to be decoded waits for no more than one short piece. A text that is longer than a
piece may be is read in several passes, and decode steps run between them, too.
"""

import gc
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice
from typing import Generic, Protocol, TypeVar

import torch

from lda_core.errors import DoesNotFit
from lda_core.lockstep import Lockstep, by_length

# A piece takes about so long, or as long as a decode step, or twice what a pass takes whatever its
# size: below that, smaller pieces would only read the weights more often.
PIECE_S = 0.02
# While rows decode, steps last so many times as long as the pieces between them: a ninth is theirs.
# What surrounds a piece (requests, answers, their threads) slows decoding more than it does itself:
# at 2.0 single generations took three times as long beside captures, at 6.0 1.8 (docs/log.md).
STEPS_PER_PIECE = 8.0
# Before anything has been measured.
FIRST_TOKENS = 64
# Out of memory, a piece is halved down to so many tokens, and a single row's is then refused.
_LEAST_TOKENS = 16
# Twice as many again after so many pieces without.
_CALM_PIECES = 64
# Those that came first among the rows that wait are put into pieces, so many at a time; anew where
# the limit has changed by more than this.
_PLANNED_ROWS = 2048
_ANOTHER_LIMIT = 1.5
# Two passes tell how much of their time is one's whatever its size, if their sizes differ so much.
_ANOTHER_SIZE = 1.5


class PieceRow(Protocol):
    """Setting `left` (any thread may) takes the row out at the next piece, undone."""

    left: bool
    refused: DoesNotFit | None

    @property
    def tokens(self) -> int:
        """Tokens to read."""

    @property
    def kind(self) -> Hashable:
        """Only rows of one kind share a piece."""


Row = TypeVar("Row", bound=PieceRow)


class Pace:
    """How long a piece may take, and when the next one may follow. Seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._step_s = 0.0
        self._owed_s = 0.0

    @property
    def piece_s(self) -> float:
        return max(PIECE_S, self._step_s)

    def stepped(self, seconds: float) -> None:
        """A decode step took so long. Rises slowly: a step that reads a prompt is no usual one."""
        self._step_s = min(seconds, 1.1 * self._step_s) if self._step_s else seconds
        self._owed_s -= seconds

    def worked(self, seconds: float) -> None:
        """A piece took so long."""
        self._owed_s = STEPS_PER_PIECE * seconds

    @property
    def due(self) -> bool:
        """Whether decode steps have had their share since the last piece."""
        return self._owed_s <= 0


# Reads a piece with at most so many (padded) tokens in one pass, asked for before each. Gives,
# between one pass and the next, how many it has read so far.
Work = Callable[[list[Row], Callable[[], int]], Iterator[int]]


class PieceQueue(Generic[Row]):
    """The rows that wait, in the order of their arrival. Not thread-safe.

    Attributes:
      out_of_memory: how often memory ran out.
    """

    def __init__(
        self,
        pair: Lockstep,
        tokens: int,
        pace: Pace,
        work: Work[Row],
        refusal: Callable[[Row], DoesNotFit],
        rows_of_one: Callable[[Row], int],
    ) -> None:
        """`tokens`: most of a pass, padded. `work`: reads a piece; what it does is done when it
        ends. `refusal`: of a row that memory cannot hold. `rows_of_one`: a model sees for it.
        """
        self._pair = pair
        self._tokens = self._memory = tokens
        self._pace = pace
        self._work, self._refusal, self._rows_of_one = work, refusal, rows_of_one
        self._quick = float(FIRST_TOKENS)  # tokens that take about as long as a piece may
        self._fixed_s = 0.0  # what a pass takes whatever its size
        self._before: tuple[int, float] | None = None  # tokens and seconds of the pass before
        self._waiting: dict[Row, None] = {}
        self._pieces: deque[list[Row]] = deque()  # of those that came first
        self._planned = 0  # the limit they were made with
        self._piece: list[Row] = []  # at work, or none
        self._passes: Iterator[int] = iter(())  # what is left of it
        self._read = 0  # tokens of it
        self._calm_pieces = 0
        self.out_of_memory = 0

    def add(self, row: Row) -> None:
        self._waiting[row] = None

    @property
    def idle(self) -> bool:
        return not self._waiting

    def size(self, piece: list[Row]) -> int:
        """Its tokens, padded, as often as a model sees them."""
        return len(piece) * max(row.tokens for row in piece) * self._rows_of_one(piece[0])

    def step(self) -> list[Row]:
        """Works on one piece for about as long as one may take; returns the rows that are out:
        done, refused, or left."""
        if out := [row for row in self._waiting if row.left]:
            self._forget(out)
            self._pieces.clear()
            if not any(row in self._waiting for row in self._piece):
                self.put_back()
        if not self._waiting:
            return out
        if not self._piece:
            self._begin()
        start = self._pace.clock()
        try:
            done = self._go_on()
            failed = False
        except torch.OutOfMemoryError:
            failed = True  # dealt with below: in here the failed frames keep their tensors alive
        except BaseException:
            self.put_back()
            raise
        if failed:
            return out + self._smaller()
        self._pace.worked(self._pace.clock() - start)
        if not done:
            return out
        out += [row for row in self._piece if row in self._waiting]  # the others are out already
        self._forget(self._piece)
        self._piece = []
        self._calm_pieces += 1
        if self._calm_pieces >= _CALM_PIECES:
            self._calm_pieces = 0
            self._memory = min(self._tokens, 2 * self._memory)
        return out

    def put_back(self) -> None:
        """The piece at work, if any, has its memory taken and starts again later."""
        self._piece, self._passes = [], iter(())
        self._pieces.clear()

    def _begin(self) -> None:
        limit = self._limit()
        if not limit / _ANOTHER_LIMIT <= self._planned <= limit * _ANOTHER_LIMIT:
            self._pieces.clear()
        if not self._pieces:
            self._pieces, self._planned = self._plan(limit), limit
        piece = self._piece = self._pieces.popleft()
        # Several rows were put together for one pass.
        whole = len(piece) > 1
        self._passes = self._work(piece, lambda: self._memory if whole else self._limit())
        self._read = 0

    def _go_on(self) -> bool:
        """Pass after pass until the piece is done, True, or most of its time is over."""
        start = now = self._pace.clock()
        done = False
        while not done and now - start < self._pace.piece_s / 2:
            read = next(self._passes, None)
            done = read is None
            read = self.size(self._piece) if read is None else read
            then, now = now, self._pace.clock()
            if read > self._read:
                self._took(read - self._read, now - then)
            self._read = read
        return done

    def _limit(self) -> int:
        """Most tokens of a pass, now."""
        return max(1, min(self._memory, int(self._quick)))

    def _plan(self, limit: int) -> deque[list[Row]]:
        """Similar lengths together; the piece with the row that came first goes first."""
        first = list(islice(self._waiting, _PLANNED_ROWS))
        age = {row: i for i, row in enumerate(first)}
        kinds: dict[Hashable, list[Row]] = defaultdict(list)
        for row in first:
            kinds[row.kind].append(row)
        pieces = [
            piece
            for rows in kinds.values()
            for piece in by_length(
                rows, lambda row: row.tokens, limit // self._rows_of_one(rows[0])
            )
        ]
        return deque(sorted(pieces, key=lambda piece: min(age[row] for row in piece)))

    def _took(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long: how many the next ones may have."""
        if self._before is not None:
            few, many = sorted((self._before, (tokens, seconds)))
            if many[0] >= _ANOTHER_SIZE * few[0]:
                of_one = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
                self._fixed_s = max(0.0, few[1] - few[0] * of_one)
        self._before = tokens, seconds
        fixed_s = min(self._fixed_s, seconds)
        may_s = max(self._pace.piece_s, 2 * fixed_s)
        more = seconds - fixed_s
        fits = tokens * (may_s - fixed_s) / more if more > 0 else torch.inf
        if seconds > may_s:
            self._quick = fits
        else:  # a small pass says little of a large one: at most twice as many next time
            self._quick = max(self._quick, min(fits, 2 * self._quick))
        self._quick = min(max(1.0, self._quick), float(self._tokens))

    def _forget(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._waiting.pop(row, None)

    def _smaller(self) -> list[Row]:
        """After running out of memory: smaller passes from now on, or the only row refused."""
        piece = self._piece
        self.put_back()
        self.out_of_memory += 1
        self._calm_pieces = 0
        self._pair.give_back()
        gc.collect()
        torch.cuda.empty_cache()
        limit = min(self._memory, self._planned)
        if len(piece) == 1:  # if small already, because that is quick, it is tried once more
            limit = min(self._memory, max(self._limit(), 2 * _LEAST_TOKENS))
        if len(piece) > 1 or limit > _LEAST_TOKENS:
            self._memory = max(1, limit // 2)
            return []
        (row,) = piece
        row.refused = self._refusal(row)
        self._memory = self._tokens  # it was this row
        self._forget(piece)
        return piece
