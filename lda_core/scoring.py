"""Continuations that are read and not drawn: their log-probabilities, in bounded pieces.

One pass over prompt and continuation together (teacher forcing). Pieces are worked off one at a
time, so that rows that decode wait for no more than one.

Shapes: P rows of a piece, N continuation tokens of them all, V common vocabulary, K alphas.
"""

import gc
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lda_core.amplify import nonfinite_rows
from lda_core.densities import Column, columns, normaliser
from lda_core.errors import DoesNotFit
from lda_core.lockstep import Lockstep, Reading, by_length
from lda_core.request import IMPOSSIBLE, Scored, ScoreRequest

# Out of memory, a piece is halved down to so many tokens, and a single row's is then refused.
_LEAST_TOKENS = 16
# Twice as many again after so many pieces without.
_CALM_PIECES = 64


@dataclass(eq=False)
class ScoreRow:
    """One continuation on its way through the engine, from `Engine.accept_score`.

    Setting `left` (any thread may) takes it out at the next piece, unscored.
    """

    request: ScoreRequest
    left: bool = False
    refused: DoesNotFit | None = None  # memory ran out with this row alone
    scored: Scored | None = None

    @property
    def reading(self) -> Reading:
        prompt, continuation = self.request.prompt_ids, self.request.continuation_ids
        return Reading((*prompt, *continuation[:-1]), len(prompt) - 1)


class Scoring:
    """The rows that wait to be scored. Not thread-safe.

    Attributes:
      tokens: continuation tokens scored, ever.
      out_of_memory: how often memory ran out.
    """

    def __init__(self, pair: Lockstep, vocab: int, prefill_tokens: int, positions: int) -> None:
        """`positions`: of which the logits are there at one time."""
        self._pair = pair
        self._vocab = vocab
        self._prefill_tokens = self._limit = prefill_tokens
        self._positions = positions
        self._waiting: dict[ScoreRow, None] = {}  # in the order of their arrival
        self._pieces: deque[list[ScoreRow]] | None = None  # None: to be planned anew
        self._calm_pieces = 0
        self.tokens = 0
        self.out_of_memory = 0

    def add(self, row: ScoreRow) -> None:
        self._waiting[row] = None
        self._pieces = None

    @property
    def idle(self) -> bool:
        return not self._waiting

    def step(self) -> list[ScoreRow]:
        """Works off one piece; returns the rows that are out: scored, refused, or left."""
        if out := [row for row in self._waiting if row.left]:
            self._forget(out)
            self._pieces = None
        if not self._waiting:
            return out
        if self._pieces is None:
            self._pieces = self._plan()
        piece = self._pieces[0]
        try:
            found = self._score(piece)
        except torch.OutOfMemoryError:
            found = None  # dealt with below: in here the failed frames keep their tensors alive
        if found is None:
            return out + self._smaller(piece)
        for row, scored in zip(piece, found, strict=True):
            row.scored = scored
        self._forget(piece)
        self._pieces.popleft()
        self.tokens += sum(len(row.request.continuation_ids) for row in piece)
        self._calm_pieces += 1
        if self._calm_pieces >= _CALM_PIECES:
            self._calm_pieces = 0
            self._limit = min(self._prefill_tokens, 2 * self._limit)
        return out + piece

    def _plan(self) -> deque[list[ScoreRow]]:
        """Similar lengths together; the piece with the row that came first goes first."""
        age = {row: i for i, row in enumerate(self._waiting)}
        limit = self._limit // self._pair.rows_of_both
        pieces = by_length(self._waiting, lambda row: len(row.reading.tokens), limit)
        return deque(sorted(pieces, key=lambda piece: min(age[row] for row in piece)))

    def _forget(self, rows: Iterable[ScoreRow]) -> None:
        for row in rows:
            self._waiting.pop(row, None)

    def _smaller(self, piece: list[ScoreRow]) -> list[ScoreRow]:
        """After running out of memory: smaller pieces from now on, or the only row refused."""
        self.out_of_memory += 1
        self._calm_pieces = 0
        self._pieces = None
        self._pair.give_back()
        gc.collect()
        torch.cuda.empty_cache()
        if len(piece) > 1 or self._limit > _LEAST_TOKENS:
            self._limit = max(1, self._limit // 2)
            return []
        (row,) = piece
        prompt, tokens = len(row.request.prompt_ids), len(row.request.continuation_ids)
        row.refused = DoesNotFit(
            "continuation",
            f"out of memory: {prompt} prompt tokens and {tokens} to score, alone, do not fit",
        )
        self._limit = self._prefill_tokens  # it was this row
        self._forget(piece)
        return piece

    def _score(self, piece: list[ScoreRow]) -> list[Scored]:
        rows = self._values(piece, careful=False)
        if not all(value < torch.inf for values in rows for row in values for value in row):
            rows = self._values(piece, careful=True)
        return [_scored(row.request, values) for row, values in zip(piece, rows, strict=True)]

    def _values(self, piece: list[ScoreRow], *, careful: bool) -> list[list[list[float]]]:
        """Of every row's tokens: after, before and normalisers. One copy to the host.

        Not `careful`: what is not right is NaN or inf.
        """
        requests = [row.request for row in piece]
        device = self._pair.device
        temperatures = [r.temperature for r in requests]
        grid = columns([r.grid for r in requests], temperatures, device)
        # The continuations' tokens side by side, and whose they are.
        drawn = torch.tensor([t for r in requests for t in r.continuation_ids], device=device)
        whose = torch.tensor(
            [i for i, r in enumerate(requests) for _ in r.continuation_ids], device=device
        )
        temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)
        parts = []
        positions = min(self._positions, self._limit)
        readings = [row.reading for row in piece]
        at = 0
        for both in self._pair.score(readings, self._limit, positions):
            after, before = (x[:, : self._vocab].float() for x in both)
            some = slice(at, at + len(after))
            at += len(after)
            own = whose[some]
            part = _token_values(after, before, drawn[some], grid, own, temperature[own], careful)
            parts.append(part)
        values = iter(torch.cat(parts).clamp_(min=IMPOSSIBLE).tolist())
        return [[next(values) for _ in r.continuation_ids] for r in requests]


def _token_values(
    after: Tensor,
    before: Tensor,
    tokens: Tensor,
    grid: tuple[Column, ...],
    whose: Tensor,
    temperature: Tensor,
    careful: bool,
) -> Tensor:
    """Logits [N, V], the tokens that follow [N], the rows of them [N] and their temperature [N]
    -> [N, 2 + K] float64."""
    norms = after.logsumexp(dim=-1), before.logsumexp(dim=-1)
    picked = tokens.unsqueeze(-1)
    # What is not finite at all is NaN, whichever token follows.
    broken = torch.where(nonfinite_rows(*norms), torch.nan, 0.0)
    found = [
        (logits.gather(-1, picked).squeeze(-1) - norm + broken).double()
        for logits, norm in zip((after, before), norms, strict=True)
    ]
    for column in grid:
        if column.known:
            found.append(torch.zeros_like(found[0]))
            continue
        own = column._replace(alpha=column.alpha[whose])
        found.append(normaliser(own, own.mixed(after, before, careful), norms, temperature))
    return torch.stack(found, dim=-1)


def _scored(request: ScoreRequest, values: list[list[float]]) -> Scored:
    if not all(value < torch.inf for row in values for value in row):
        return Scored([], [], [], error="logits are not finite")
    after, before, *_ = (list(column) for column in zip(*values, strict=True))
    return Scored(after, before, [row[2 : 2 + len(request.grid)] for row in values])
