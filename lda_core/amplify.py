"""The formula: logit diff amplification.

    amplified = after + alpha * (after - before)

Two identities hold exactly, to the bit: alpha 0 is *after*, alpha -1 is *before*. In between
the models are interpolated, above 0 what the training changed is amplified, below -1 it is
reversed. Source: Aranguri and McGrath, Goodfire, 2025.

Shapes: B rows, V tokens of the common vocabulary.
"""

import torch
from torch import Tensor


def amplify(after: Tensor, before: Tensor, alpha: Tensor) -> Tensor:
    """[B, V], [B, V], [B] -> [B, V] in float32; also [V], [V], [] -> [V].

    A token that either model rules out (-inf) stays ruled out at every alpha but 0 and -1:
    the difference is not defined there, and neither an infinite boost nor NaN is wanted.
    NaN and +inf pass through; whoever draws from the result checks it (`nonfinite_rows`).

    Raises ValueError if the shapes do not fit.
    """
    if after.shape != before.shape or alpha.shape != after.shape[:-1]:
        raise ValueError(
            f"after {tuple(after.shape)}, before {tuple(before.shape)} and alpha "
            f"{tuple(alpha.shape)} must be [B, V], [B, V], [B]"
        )
    after, before, a = after.float(), before.float(), alpha.float().unsqueeze(-1)  # a: (B, 1)
    mixed = after + a * (after - before)  # (B, V)
    mixed = mixed.masked_fill(after.isneginf() | before.isneginf(), -torch.inf)
    # By selection, not by arithmetic: after + -1 * (after - before) would round.
    mixed = torch.where(a == 0, after, mixed)
    return torch.where(a == -1, before, mixed)


def mix(after: Tensor, before: Tensor, alpha: Tensor) -> Tensor:
    """As `amplify` for rows whose alpha is neither 0 nor -1 and whose logits are finite.

    A third of its cost. A row with -inf in it comes out right or not finite, never wrong.
    """
    return (after - before).mul_(alpha.unsqueeze(-1)).add_(after)


def nonfinite_rows(*logsumexps: Tensor) -> Tensor:
    """[B] log-normalisers -> [B] bool: rows of which any has NaN, +inf or no possible token.

    The logsumexp of a row is finite exactly if its logits hold a finite value, no NaN and no
    +inf, so this costs nothing beside the log-probabilities.
    """
    return ~torch.stack(logsumexps).isfinite().all(dim=0)
