"""Where a row is amplified, and among which tokens: it is drawn from *after* elsewhere.

Alphas 0 and -1 are one model alone, whatever is set: never gated, never masked.

Three settings of a request: only its first tokens, only where the two models differ enough, only
tokens that *after* finds plausible (Li et al. 2022, "Contrastive decoding"). None of the three
decisions depends on alpha, so the density of a row under another alpha is known as well.

Shapes: B rows, V tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lda_core.request import Request


class Gate(NamedTuple):
    """One step's decisions."""

    opened: Tensor  # (B,) bool: rows that are amplified
    implausible: Tensor | None  # (B, V) bool: tokens that an amplified row does not draw

    def of(self, rows: Tensor | slice) -> "Gate":
        """The same for some of the rows."""
        hidden = self.implausible
        return Gate(self.opened[rows], hidden if hidden is None else hidden[rows])

    def apply(self, mixed: Tensor, after: Tensor, alpha: Tensor) -> Tensor:
        """Logits [B, V] amplified by alpha [B], and after's -> those to draw from."""
        # By selection: a row that is not amplified has after's logits to the bit.
        minus = alpha == -1
        gated = torch.where((self.opened | minus).unsqueeze(-1), mixed, after)
        if self.implausible is None:
            return gated
        masked = self.opened & (alpha != 0) & ~minus
        return gated.masked_fill(self.implausible & masked.unsqueeze(-1), -torch.inf)


class Gates(NamedTuple):
    """The settings of all rows of a batch; neutral where a row has none."""

    first: Tensor  # (B,) int64: drawn tokens that are amplified
    min_kl: Tensor | None  # (B,) float32, nats
    plausible: Tensor | None  # (B,) float32, log of the share

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Self | None:
        """None where no row has any of the settings."""
        if not any(r.gated for r in requests):
            return None
        limits = [r.amplify_first or torch.iinfo(torch.int64).max for r in requests]
        min_kl = [r.amplify_min_kl for r in requests]
        plausible = [r.plausible for r in requests]
        return cls(
            first=torch.tensor(limits, device=device),
            min_kl=torch.tensor(min_kl, device=device) if any(min_kl) else None,
            plausible=torch.tensor(plausible, device=device).log() if any(plausible) else None,
        )

    def at(self, after: Tensor, before: Tensor, step: Tensor, hidden: Tensor | None) -> Gate:
        """Logits [B, V] of both, and how many tokens each row has drawn [B]; `hidden` [B, V]:
        tokens that cannot be drawn, of which none is the best one."""
        opened = step < self.first
        if self.min_kl is not None:
            opened &= (self.min_kl == 0) | (divergence(after, before) >= self.min_kl)
        if self.plausible is None:
            return Gate(opened, None)
        best = after if hidden is None else after.masked_fill(hidden, -torch.inf)
        least = best.amax(dim=-1) + self.plausible  # (B,)
        return Gate(opened, after < least.unsqueeze(-1))


def divergence(after: Tensor, before: Tensor) -> Tensor:
    """Logits [B, V] of both -> KL(after||before) [B] in nats, inf where *before* rules out a token
    that *after* does not."""
    ours, theirs = after.log_softmax(dim=-1), before.log_softmax(dim=-1)
    probs = ours.exp()
    return torch.where(probs > 0, probs * (ours - theirs), 0.0).sum(dim=-1)
