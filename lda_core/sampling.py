"""Drawing a token: temperature, top-k, top-p and noise that depends on nothing but its key.

The Gumbel-max trick: argmax(logits / T + g) with independent standard Gumbel g is a draw from
softmax(logits / T). Here g is a hash of (seed, step, token), so a row draws the same token in
any batch, in any order and after any retry, and a tiny change of the logits (another batch's
rounding) almost never changes the draw. Sources: Gumbel 1954; Maddison et al. 2014, "A*
sampling"; counter-based noise: Salmon et al. 2011, "Parallel random numbers".

Shapes: B rows, V tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
# First guess for the number of candidates that hold top_p of the mass; doubled until they do.
_CANDIDATES = 256


class Sampling(NamedTuple):
    """How each row draws; all [B].

    temperature float32, 0 is greedy; top_p float32 in (0, 1]; top_k int64, 0 is no limit;
    seed int64 >= 0.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    seed: Tensor


def sample(logits: Tensor, sampling: Sampling, step: Tensor) -> Tensor:
    """[B, V] float32 logits, step [B] int64 -> [B] tokens; [V] with scalars -> one token.

    `step` counts the row's drawn tokens. Order as in transformers: temperature, then top-k,
    then top-p on what is left. Rows must be finite (see `amplify.nonfinite_rows`).
    """
    if logits.dim() == 1:
        row = Sampling(*(value.reshape(1) for value in sampling))
        return sample(logits.unsqueeze(0), row, step.reshape(1))[0]
    greedy = sampling.temperature == 0  # (B,)
    # Below their maximum: dividing it by a tiny temperature must not give inf.
    scaled = logits - logits.amax(dim=-1, keepdim=True)  # (B, V)
    scaled = scaled / torch.where(greedy, 1.0, sampling.temperature).unsqueeze(-1)
    drawn = truncate(scaled, sampling.top_p, sampling.top_k)
    drawn = drawn + gumbel_noise(sampling.seed, step, logits.shape[-1])
    return torch.where(greedy.unsqueeze(-1), logits, drawn).argmax(dim=-1)


def truncate(scaled: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[B, V] -> [B, V] with -inf outside each row's top-k / top-p support.

    The token that crosses top_p is kept. Tokens tied with the last kept one are kept too, so
    that the support does not depend on how a sort breaks ties.
    """
    rows = ((top_p < 1) | (top_k > 0)).nonzero().squeeze(-1)  # (R,) those that truncate
    if rows.numel() == 0:
        return scaled
    part = scaled[rows]
    lowest = _lowest_kept(part, top_p[rows], top_k[rows])  # (R,)
    return scaled.index_copy(0, rows, part.masked_fill(part < lowest.unsqueeze(-1), -torch.inf))


def _lowest_kept(scaled: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[R, V] -> [R]: the smallest value each row keeps; sorts only as far as it must."""
    vocab = scaled.shape[-1]
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)  # (R,)
    total = scaled.logsumexp(dim=-1)  # (R,)
    # At least all of the largest top-k, so that its mass is exact.
    count = min(vocab, max(_CANDIDATES, int(top_k.max()) + 1))
    while True:
        best = scaled.topk(count, dim=-1).values  # (R, count) in falling order
        inside = torch.arange(count, device=scaled.device) < k.unsqueeze(-1)
        best = best.masked_fill(~inside, -torch.inf)
        # top-p of what top-k left; without top-k the whole row is what is left.
        mass = torch.where(top_k > 0, best.logsumexp(dim=-1), total)
        probs = (best - mass.unsqueeze(-1)).exp()
        before = probs.cumsum(dim=-1) - probs  # mass of the better tokens
        kept = inside & ((before < top_p.unsqueeze(-1)) | (top_p == 1).unsqueeze(-1))
        kept[:, 0] = True  # rounding must never leave a row empty
        # Enough candidates: the last one lies outside, or nothing is left to look at.
        if count == vocab or not bool(kept[:, -1].any()):
            last = kept.sum(dim=-1, keepdim=True) - 1
            return best.gather(-1, last).squeeze(-1)
        count = min(vocab, count * 8)


def gumbel_noise(seed: Tensor, step: Tensor, vocab: int) -> Tensor:
    """[B] int64, [B] int64 -> [B, vocab] standard Gumbel noise, float32."""
    key = _mix32(seed & _MASK32)
    key = _mix32(key ^ (seed >> 32))
    key = _mix32(key ^ step)  # (B,)
    token = _mix32(torch.arange(1, vocab + 1, device=seed.device))  # (V,)
    bits = _mix32(key.unsqueeze(-1) ^ token)  # (B, V) in [0, 2^32)
    v = (bits.float() + 0.5).mul_(2.0**-32)
    # u = 1 - v. Written with log1p, because u itself rounds to 1 in float32 about once in
    # 3e7 numbers, and -log(-log(1)) = inf would win every argmax. v may round to 1 as well,
    # which would rule the token out: hence the clamp.
    return v.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _mix32(x: Tensor) -> Tensor:
    """A bijection of [0, 2^32) whose output looks random (int64 tensors, any shape).

    Multiplications by numbers below 2^31 stay inside int64. Constants found by the search of
    github.com/skeeto/hash-prospector.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)
