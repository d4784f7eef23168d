"""Continuations that are read and not drawn: their log-probabilities.

One pass over prompt and continuation together (teacher forcing).

Shapes: P rows of a piece, N continuation tokens of them all, V common vocabulary, K alphas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lda_core.amplify import nonfinite_rows
from lda_core.densities import Column, Top, at_alpha, columns
from lda_core.errors import DoesNotFit
from lda_core.lockstep import Lockstep, Reading
from lda_core.pieces import Pace, PieceQueue
from lda_core.request import IMPOSSIBLE, Scored, ScoreRequest
from lda_core.sampling import chosen, likeliest


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
        k = min(self._vocab, max(row.request.top for row in piece))
        rows = self._values(piece, limit, k, careful=False)
        if not all(value < torch.inf for values in rows for row in values for value in row):
            rows = self._values(piece, limit, k, careful=True)
        return [_scored(row.request, k, values) for row, values in zip(piece, rows, strict=True)]

    def _values(
        self, piece: list[ScoreRow], limit: int, k: int, *, careful: bool
    ) -> list[list[list[float]]]:
        """What `_token_values` gives, of every row's tokens. One copy to the host.

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
        wants = [r.top > 0 for r in requests for _ in r.continuation_ids]
        parts = []
        positions = min(self._positions, limit)
        readings = [row.reading for row in piece]
        at = 0
        for both in self._pair.score(readings, limit, positions):
            after, before = (x[:, : self._vocab].float() for x in both)
            some = slice(at, at + len(after))
            at += len(after)
            own = whose[some]
            columns_here = [column._replace(alpha=column.alpha[own]) for column in grid]
            top = Top(rows, k) if (rows := chosen(wants[some], device)) is not None else None
            parts.append(
                _token_values(
                    after, before, drawn[some], columns_here, temperature[own], top, k, careful
                )
            )
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
    grid: Sequence[Column],
    temperature: Tensor,
    top: Top | None,
    k: int,
    careful: bool,
) -> Tensor:
    """Logits [N, V], the tokens that follow [N], and for each place its alphas, its temperature [N]
    and whether the likeliest tokens are wanted -> [N, 2 + K * (2 + 2 * k)] float64.

    Those are after, before, and for each alpha the normaliser, the token's own log-probability, k
    ids and their log-probabilities, which are 0 where nobody wants them.
    """
    norms = after.logsumexp(dim=-1), before.logsumexp(dim=-1)
    picked = tokens.unsqueeze(-1)
    # What is not finite at all is NaN, whichever token follows.
    broken = torch.where(nonfinite_rows(*norms), torch.nan, 0.0)
    both = [
        logits.gather(-1, picked).squeeze(-1) - norm + broken
        for logits, norm in zip((after, before), norms, strict=True)
    ]
    found = [torch.stack(both, dim=-1).double()]
    for column in grid:
        minus = column.alpha == -1  # (N,)
        if column.known and top is None:
            own = torch.where(minus, both[1], both[0])
            found.append(torch.stack([torch.zeros_like(own), own], dim=-1).double())
            found.append(after.new_zeros((len(tokens), 2 * k), dtype=torch.float64))
            continue
        if column.known:
            mixed = torch.where(minus.unsqueeze(-1), before, after)
        else:
            mixed = column.mixed(after, before, careful)
        wanted, best = picked, after.new_zeros((len(tokens), 2 * k), dtype=torch.float64)
        if top is not None:
            ids, sure = likeliest(mixed[top.rows], k, careful=careful)
            wanted = torch.cat([picked, picked.new_zeros((len(tokens), k))], dim=-1)
            wanted[top.rows, 1:] = ids
        norm, values = at_alpha(column, mixed, norms, temperature, wanted)
        if top is not None:
            # What is not sure is NaN: then it is done with care.
            values[top.rows, 1:] += torch.where(sure, 0.0, torch.nan).unsqueeze(-1)
            best[top.rows] = torch.cat([ids.double(), values[top.rows, 1:].double()], dim=-1)
        found.append(torch.stack([norm, values[:, 0].double()], dim=-1))
        found.append(best)
    return torch.cat(found, dim=-1)


def _scored(request: ScoreRequest, k: int, values: list[list[float]]) -> Scored:
    """`values` (T, 2 + K * (2 + 2 * k)): those of `_token_values`."""
    if not all(value < torch.inf for row in values for value in row):
        return Scored([], [], [], error="logits are not finite")
    after, before, *_ = (list(column) for column in zip(*values, strict=True))
    width, own = 2 + 2 * k, min(k, request.top)
    starts = [2 + i * width for i in range(len(request.grid))]
    top = None
    if request.top:
        top = [
            [
                [(int(row[i]), row[i + k]) for i in range(start + 2, start + 2 + own)]
                for start in starts
            ]
            for row in values
        ]
    return Scored(
        after,
        before,
        [[row[start] for start in starts] for row in values],
        at=[[row[start + 1] for start in starts] for row in values],
        top=top,
    )
