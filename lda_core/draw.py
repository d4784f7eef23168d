"""A step's logits become a token for every row, with one copy to the host.

Shapes: B rows, V common vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lda_core.amplify import amplify, mix, nonfinite_rows
from lda_core.batch import BatchState
from lda_core.sampling import CANDIDATES, propose

# After so many draws half as many candidates are tried again.
_FORGET = 64


class Draw(NamedTuple):
    """One step's outcome on the host, one entry per row."""

    tokens: list[int]
    logprobs: list[tuple[float, float, float]]  # after, before, amplified; empty: nobody asked
    failed: list[bool]  # logits were not finite


class Drawer:
    """Draws quickly and checks; where a row was not certain, draws again with care.

    The two agree on every row that was certain, so which one it was cannot be seen.
    """

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
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
        peak = mixed.amax(dim=-1)  # (B,) NaN or infinite as the row's logits are
        candidates = min(self._vocab, max(self._candidates, state.top_k + 1))
        tokens, sure = propose(mixed, peak, state.sampling, state.step, state.kinds, candidates)
        finite = peak.isfinite()
        logprobs: list[Tensor] = []
        if state.logprobs is not None and after is not None and before is not None:
            logprobs, fine = _logprobs((after, before, mixed), tokens, state.logprobs)
            finite &= fine
        drawn, ok, certain, *values = _to_host(tokens, finite, sure, *logprobs)
        if all(ok) and all(certain):
            return tokens, Draw([int(i) for i in drawn], _zip(values), [False] * len(drawn))
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
        failed = nonfinite_rows(mixed.logsumexp(dim=-1))  # (B,)
        # A failed row draws nothing real.
        drawable = torch.where(failed.unsqueeze(-1), 0.0, mixed)
        peak = drawable.amax(dim=-1)
        tokens, _ = propose(drawable, peak, state.sampling, state.step, state.kinds, self._vocab)
        logprobs: list[Tensor] = []
        if state.logprobs is not None and after is not None and before is not None:
            logprobs, fine = _logprobs((after, before, mixed), tokens, state.logprobs)
            failed |= ~fine
        drawn, bad, *values = _to_host(tokens, failed, *logprobs)
        return tokens, Draw([int(i) for i in drawn], _zip(values), [bool(b) for b in bad])


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


def _logprobs(
    distributions: tuple[Tensor, ...], tokens: Tensor, wanted: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The drawn tokens' log-probabilities [B] under each, and whether rows that want them have
    them [B]."""
    norms = [logits.logsumexp(dim=-1) for logits in distributions]
    picked = tokens.unsqueeze(-1)
    values = [
        logits.gather(-1, picked).squeeze(-1) - norm
        for logits, norm in zip(distributions, norms, strict=True)
    ]
    return values, ~(wanted & nonfinite_rows(*norms))


def _to_host(*columns: Tensor) -> list[list[float]]:
    # One transfer. Token ids and float32 values are both exact in float64.
    rows: list[list[float]] = torch.stack([column.double() for column in columns]).tolist()
    return rows


def _zip(values: list[list[float]]) -> list[tuple[float, float, float]]:
    return list(zip(*values, strict=True))
