"""A step's logits become a token for every row, with one copy to the host.

Shapes: B rows, V common vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lda_core.amplify import amplify, mix, nonfinite_rows
from lda_core.batch import BatchState
from lda_core.densities import recorded_kl
from lda_core.gates import Gate
from lda_core.request import IMPOSSIBLE
from lda_core.sampling import CANDIDATES, Rows, propose

# After so many draws half as many candidates are tried again.
_FORGET = 64


class Draw(NamedTuple):
    """One step's outcome on the host, one entry per row; empty lists: nobody asked.

    Normalisers and so on have as many numbers as the row that asked for most; a row's own come
    first.
    """

    tokens: list[int]
    logprobs: list[tuple[float, ...]]  # after, before, amplified
    failed: list[bool]  # logits were not finite
    normalisers: list[tuple[float, ...]]
    drawn: list[tuple[float, ...]]
    watched: list[tuple[float, ...]]
    kl: list[tuple[float, ...]]
    top: list[tuple[float, ...]]  # ids, then log-probabilities
    close: Sequence[int] = ()  # rows of which another rounding may draw another token


class Drawer:
    """Draws quickly and checks; where a row was not certain, draws again with care.

    The two agree on every row that was certain, so which one it was cannot be seen.
    """

    def __init__(self, vocab: int, eos_ids: Iterable[int] = ()) -> None:
        self._vocab = vocab
        self._eos_ids = sorted(i for i in eos_ids if i < vocab)
        self._eos: Tensor | None = None
        self._candidates = CANDIDATES
        self._draws = 0

    def __call__(
        self, after: Tensor | None, before: Tensor | None, state: BatchState
    ) -> tuple[Tensor, Draw]:
        """[B, V+] logits, None where no row needs the model -> tokens [B] on the device, and all
        of it on the host."""
        after, before = (x if x is None else x[:, : self._vocab].float() for x in (after, before))
        self._draws += 1
        if self._draws % _FORGET == 0:  # the rows that needed so many may have gone
            self._candidates = max(CANDIDATES, self._candidates // 2)
        mixed = _mixed(after, before, state)
        gate, proposed = self._proposed(after, before, mixed, state)
        peak = proposed.amax(dim=-1)  # (B,) NaN or infinite as the row's logits are
        candidates = min(self._vocab, max(self._candidates, state.top_k + 1))
        how = state.sampling, state.step, state.kinds
        tokens, sure, clear = propose(proposed, peak, *how, candidates, state.ties)
        finite = peak.isfinite()
        if proposed is not mixed:
            finite &= mixed.amax(dim=-1).isfinite()
        record = _record(after, before, mixed, gate, tokens, state, candidates, careful=False)
        if record.fine is not None:
            finite &= record.fine
        if record.sure is not None:
            sure &= record.sure
        columns = tokens, finite, sure, clear, *record.columns
        drawn, ok, certain, clearly, *values = _to_host(*columns)
        if all(ok) and all(certain):
            return tokens, record.on_host(drawn, values, [False] * len(drawn), clearly)
        if not all(certain):
            self._candidates = min(self._vocab, 2 * self._candidates)
        return self._with_care(after, before, state)

    def _with_care(
        self, after: Tensor | None, before: Tensor | None, state: BatchState
    ) -> tuple[Tensor, Draw]:
        if after is None or before is None:
            mixed = _mixed(after, before, state)
        else:
            mixed = amplify(after, before, state.alpha)
        gate, proposed = self._proposed(after, before, mixed, state)
        failed = nonfinite_rows(mixed.logsumexp(dim=-1))  # (B,)
        if proposed is not mixed:
            failed |= nonfinite_rows(proposed.logsumexp(dim=-1))
        # A failed row draws nothing real.
        drawable = torch.where(failed.unsqueeze(-1), 0.0, proposed)
        peak = drawable.amax(dim=-1)
        how = state.sampling, state.step, state.kinds
        tokens, _, clear = propose(drawable, peak, *how, self._vocab, state.ties)
        record = _record(after, before, mixed, gate, tokens, state, self._vocab, careful=True)
        if record.fine is not None:
            failed |= ~record.fine
        columns = tokens, failed, clear | failed, *record.columns
        drawn, bad, clearly, *values = _to_host(*columns)
        return tokens, record.on_host(drawn, values, [bool(b) for b in bad], clearly)

    def _proposed(
        self, after: Tensor | None, before: Tensor | None, mixed: Tensor, state: BatchState
    ) -> tuple[Gate | None, Tensor]:
        """This step's gate, if any row has one, and the logits [B, V] to draw from."""
        hidden = self._hidden(state)
        gate, proposed = None, mixed
        if state.gates is not None and after is not None and before is not None:
            gate = state.gates.at(after, before, state.step, hidden)
            proposed = gate.apply(mixed, after, state.alpha)
        if hidden is not None:
            proposed = proposed.masked_fill(hidden, -torch.inf)
        return gate, proposed

    def _hidden(self, state: BatchState) -> Tensor | None:
        """[B, V] bool: every EOS of the rows that are too short for one; None if none has to be."""
        if state.fewest is None:
            return None
        if self._eos is None:
            eos = torch.zeros(self._vocab, dtype=torch.bool)
            eos[self._eos_ids] = True
            self._eos = eos.to(state.fewest.device)
        return self._eos & (state.step < state.fewest).unsqueeze(-1)


def _mixed(after: Tensor | None, before: Tensor | None, state: BatchState) -> Tensor:
    """[B, V] amplified, where nothing is -inf."""
    if after is None or before is None:
        only = before if after is None else after
        assert only is not None
        return only
    mixed = mix(after, before, state.alpha)
    if state.plain is not None:
        # By selection, not by arithmetic: after + -1 * (after - before) would round.
        zero, minus = state.plain
        mixed[zero] = after[zero]
        mixed[minus] = before[minus]
    return mixed


class Record(NamedTuple):
    """What rows asked for beside their token."""

    columns: list[Tensor]  # each (B,): logprobs, normalisers, drawn, watched, kl, top
    widths: tuple[int, ...]  # how many of each
    fine: Tensor | None  # (B,) bool: rows have all they asked for; None: nobody asked
    sure: Tensor | None  # (B,) bool, as in `propose`; None: all are

    def on_host(
        self,
        tokens: list[float],
        values: list[list[float]],
        failed: list[bool],
        clear: list[float],
    ) -> Draw:
        parts, at = [], 0
        for width in self.widths:
            parts.append(list(zip(*values[at : at + width], strict=True)))
            at += width
        logprobs, normalisers, drawn, watched, kl, top = parts
        tokens_ = [int(i) for i in tokens]
        close = [i for i, clearly in enumerate(clear) if not clearly]
        return Draw(tokens_, logprobs, failed, normalisers, drawn, watched, kl, top, close)


def _record(
    after: Tensor | None,
    before: Tensor | None,
    mixed: Tensor,
    gate: Gate | None,
    tokens: Tensor,
    state: BatchState,
    candidates: int,
    *,
    careful: bool,
) -> Record:
    """`mixed`: at the rows' own alphas, without the gate."""
    columns: list[list[Tensor]] = [[], [], [], [], [], []]
    fine = sure = None
    if state.logprobs is not None and after is not None and before is not None:
        norms = [logits.logsumexp(dim=-1) for logits in (after, before, mixed)]
        columns[0] = _logprobs((after, before, mixed), norms, tokens)
        fine = ~(state.logprobs & nonfinite_rows(*norms))
        if (top := state.top) is not None:
            best, exact = top.found(mixed, norms[2], careful=careful)
            columns[5] = list(_scatter(best, top.rows, tokens).unbind(-1))
            fine &= _scatter(exact, top.rows, tokens, fill=1.0) > 0
        if (grid := state.grid) is not None:
            rows = grid.rows
            found = grid.densities(
                (after[rows], before[rows]),
                (norms[0][rows], norms[1][rows]),
                tokens[rows],
                None if gate is None else gate.of(rows),
                candidates,
                careful=careful,
            )
            columns[1] = [_scatter(x, rows, tokens) for x in found.normalisers]
            columns[2] = [_scatter(x, rows, tokens) for x in found.drawn]
            if found.sure is not None:
                sure = _scatter(found.sure, rows, tokens, fill=1.0) > 0
    if (watch := state.watch) is not None:
        columns[3] = [_scatter(x, watch.rows, tokens) for x in watch.logprobs(mixed).unbind(-1)]
    if state.kl is not None and after is not None and before is not None:
        rows = state.kl
        columns[4] = [_scatter(recorded_kl(after[rows], before[rows]), rows, tokens)]
    if values := [x for part in columns[1:] for x in part]:
        # -inf is an impossible token; where quickly mixed logits are not right, it is NaN or inf.
        possible = (torch.stack(values) < torch.inf).all(dim=0)
        fine = possible if fine is None else fine & possible
    widths = tuple(len(part) for part in columns)
    return Record([x for part in columns for x in part], widths, fine, sure)


def _scatter(values: Tensor, rows: Rows, tokens: Tensor, fill: float = 0.0) -> Tensor:
    """[R, ...] of some rows -> [B, ...] float64."""
    if isinstance(rows, slice):
        return values.double()
    shape = (len(tokens), *values.shape[1:])
    full = torch.full(shape, fill, dtype=torch.float64, device=tokens.device)
    full[rows] = values.double()
    return full


def _logprobs(
    distributions: tuple[Tensor, ...], norms: list[Tensor], tokens: Tensor
) -> list[Tensor]:
    """The drawn tokens' log-probabilities [B] under each."""
    picked = tokens.unsqueeze(-1)
    return [
        logits.gather(-1, picked).squeeze(-1) - norm
        for logits, norm in zip(distributions, norms, strict=True)
    ]


def _to_host(*columns: Tensor) -> list[list[float]]:
    # One transfer. Token ids and float32 values are both exact in float64.
    values = torch.stack([column.double() for column in columns])
    rows: list[list[float]] = values.clamp_(min=IMPOSSIBLE).tolist()
    return rows
