"""Continuations that are read and not drawn: their log-probabilities.

One pass over prompt and continuation together (teacher forcing).

Shapes: P rows of a piece, N continuation tokens of them all, V common vocabulary, K alphas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lda_core.amplify import nonfinite_rows
from lda_core.densities import Column, columns, normaliser
from lda_core.errors import DoesNotFit
from lda_core.lockstep import Lockstep, Reading
from lda_core.pieces import Pace, PieceQueue
from lda_core.request import IMPOSSIBLE, Scored, ScoreRequest


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

    @property
    def tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.request.continuation_ids) - 1

    @property
    def kind(self) -> None:
        """All can be scored together."""


class Scoring:
    """The rows that wait to be scored, in `queue`. Not thread-safe.

    Attributes:
      tokens: continuation tokens scored, ever.
    """

    def __init__(
        self, pair: Lockstep, vocab: int, prefill_tokens: int, positions: int, pace: Pace
    ) -> None:
        """`positions`: of which the logits are there at one time."""
        self._pair = pair
        self._vocab = vocab
        self._positions = positions
        self.queue = PieceQueue(
            pair, prefill_tokens, pace, self._work, _refusal, lambda row: pair.rows_of_both
        )
        self.tokens = 0

    def _work(self, piece: list[ScoreRow], limit: int) -> None:
        for row, scored in zip(piece, self._score(piece, limit), strict=True):
            row.scored = scored
            self.tokens += len(row.request.continuation_ids)

    def _score(self, piece: list[ScoreRow], limit: int) -> list[Scored]:
        rows = self._values(piece, limit, careful=False)
        if not all(value < torch.inf for values in rows for row in values for value in row):
            rows = self._values(piece, limit, careful=True)
        return [_scored(row.request, values) for row, values in zip(piece, rows, strict=True)]

    def _values(
        self, piece: list[ScoreRow], limit: int, *, careful: bool
    ) -> list[list[list[float]]]:
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
        positions = min(self._positions, limit)
        readings = [row.reading for row in piece]
        at = 0
        for both in self._pair.score(readings, limit, positions):
            after, before = (x[:, : self._vocab].float() for x in both)
            some = slice(at, at + len(after))
            at += len(after)
            own = whose[some]
            part = _token_values(after, before, drawn[some], grid, own, temperature[own], careful)
            parts.append(part)
        values = iter(torch.cat(parts).clamp_(min=IMPOSSIBLE).tolist())
        return [[next(values) for _ in r.continuation_ids] for r in requests]


def _refusal(row: ScoreRow) -> DoesNotFit:
    prompt, tokens = len(row.request.prompt_ids), len(row.request.continuation_ids)
    return DoesNotFit(
        "continuation",
        f"out of memory: {prompt} prompt tokens and {tokens} to score, alone, do not fit",
    )


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
