"""Rows that are read and not drawn, worked off in bounded pieces between decode steps.

A piece is bounded twice: by memory, in tokens (halved when it runs out), and by time, so that a
row that comes to be decoded waits for no more than one short piece.
"""

import gc
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Protocol, TypeVar

import torch

from lda_core.errors import DoesNotFit
from lda_core.lockstep import Lockstep, by_length

# A piece takes about so long, or as long as a decode step: below that, smaller pieces would only
# read the weights more often.
PIECE_S = 0.02
# While rows decode, steps last so many times as long as the pieces between them: a third is theirs.
STEPS_PER_PIECE = 2.0
# Before anything has been measured.
FIRST_TOKENS = 64
# Out of memory, a piece is halved down to so many tokens, and a single row's is then refused.
_LEAST_TOKENS = 16
# Twice as many again after so many pieces without.
_CALM_PIECES = 64
# The rows that wait are put into pieces anew where the limit has changed by more than this.
_ANOTHER_LIMIT = 1.5


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
        work: Callable[[list[Row], int], None],
        refusal: Callable[[Row], DoesNotFit],
        rows_of_one: Callable[[Row], int],
    ) -> None:
        """`tokens`: most of a piece, padded. `work`: does a piece, with at most so many tokens in
        one pass. `refusal`: of a row that memory cannot hold. `rows_of_one`: a model sees for it.
        """
        self._pair = pair
        self._tokens = self._memory = tokens
        self._pace = pace
        self._work, self._refusal, self._rows_of_one = work, refusal, rows_of_one
        self._quick = float(FIRST_TOKENS)  # tokens that take about as long as a piece may
        self._waiting: dict[Row, None] = {}
        self._pieces: deque[list[Row]] | None = None  # None: to be planned anew
        self._planned = 0  # the limit they were made with
        self._calm_pieces = 0
        self.out_of_memory = 0

    def add(self, row: Row) -> None:
        self._waiting[row] = None
        self._pieces = None

    @property
    def idle(self) -> bool:
        return not self._waiting

    def step(self) -> list[Row]:
        """Works off one piece; returns the rows that are out: done, refused, or left."""
        if out := [row for row in self._waiting if row.left]:
            self._forget(out)
            self._pieces = None
        if not self._waiting:
            return out
        limit = max(1, min(self._memory, int(self._quick)))
        if not limit / _ANOTHER_LIMIT <= self._planned <= limit * _ANOTHER_LIMIT:
            self._pieces = None
        if self._pieces is None:
            self._pieces, self._planned = self._plan(limit), limit
        piece = self._pieces[0]
        start = self._pace.clock()
        try:
            self._work(piece, self._memory)
            failed = False
        except torch.OutOfMemoryError:
            failed = True  # dealt with below: in here the failed frames keep their tensors alive
        if failed:
            return out + self._smaller(piece)
        self._took(piece, self._pace.clock() - start)
        self._forget(piece)
        self._pieces.popleft()
        self._calm_pieces += 1
        if self._calm_pieces >= _CALM_PIECES:
            self._calm_pieces = 0
            self._memory = min(self._tokens, 2 * self._memory)
        return out + piece

    def _plan(self, limit: int) -> deque[list[Row]]:
        """Similar lengths together; the piece with the row that came first goes first."""
        age = {row: i for i, row in enumerate(self._waiting)}
        kinds: dict[Hashable, list[Row]] = defaultdict(list)
        for row in self._waiting:
            kinds[row.kind].append(row)
        pieces = [
            piece
            for rows in kinds.values()
            for piece in by_length(
                rows, lambda row: row.tokens, limit // self._rows_of_one(rows[0])
            )
        ]
        return deque(sorted(pieces, key=lambda piece: min(age[row] for row in piece)))

    def _took(self, piece: list[Row], seconds: float) -> None:
        self._pace.worked(seconds)
        size = len(piece) * max(row.tokens for row in piece) * self._rows_of_one(piece[0])
        fits = size * self._pace.piece_s / seconds if seconds > 0 else torch.inf
        if seconds > self._pace.piece_s:
            self._quick = fits
        else:  # a small piece says little of a large one: at most twice as many next time
            self._quick = max(self._quick, min(fits, 2 * self._quick))
        self._quick = min(max(1.0, self._quick), float(self._tokens))

    def _forget(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._waiting.pop(row, None)

    def _smaller(self, piece: list[Row]) -> list[Row]:
        """After running out of memory: smaller pieces from now on, or the only row refused."""
        self.out_of_memory += 1
        self._calm_pieces = 0
        self._pieces = None
        self._pair.give_back()
        gc.collect()
        torch.cuda.empty_cache()
        limit = self._memory if len(piece) == 1 else min(self._memory, self._planned)
        if len(piece) > 1 or limit > _LEAST_TOKENS:
            self._memory = max(1, limit // 2)
            return []
        (row,) = piece
        row.refused = self._refusal(row)
        self._memory = self._tokens  # it was this row
        self._forget(piece)
        return piece
