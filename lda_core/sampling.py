"""Drawing a token: temperature, top-k, top-p and noise that depends on nothing but its key.

The Gumbel-max trick: argmax(logits / T + g) with independent standard Gumbel g is a draw from
softmax(logits / T). Here g is a hash of (seed, step, token), so a row draws the same token in
any batch, in any order and after any retry, and a tiny change of the logits (another batch's
rounding) almost never changes the draw. Sources: Gumbel 1954; Maddison et al. 2014, "A*
sampling"; counter-based noise: Salmon et al. 2011, "Parallel random numbers".

Shapes: B rows, V tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# First guess for the number of candidates that hold top_p of the mass.
CANDIDATES = 256
# What e^-x still holds in float32, with room for the noise; and what the noise makes up for.
_MOST_SCALED, _LUCK = 40.0, 25.0
# Beyond the likeliest tokens that are wanted, so many are looked at for equal ones.
_SPARE = 8


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
    total = scaled.logsumexp(dim=-1)  # (R,)
    # At least all of the largest top-k, so that its mass is exact.
    count = min(vocab, max(CANDIDATES, int(top_k.max()) + 1))
    while True:
        best = _largest(scaled, count)  # (R, count)
        kept = _kept(best, total, top_p, top_k)
        # Enough candidates: the last one lies outside, or nothing is left to look at.
        if count == vocab or not bool(kept[:, -1].any()):
            return _last(best, kept).squeeze(-1)
        count = min(vocab, count * 4)


Rows = Tensor | slice  # some rows of a batch, [R] int64, or all
ALL = slice(None)


class Kinds(NamedTuple):
    """Rows by how they draw."""

    greedy: Rows | None
    full: Rows | None  # from the whole vocabulary
    truncated: Rows | None  # with top_p or top_k


def chosen(wanted: Sequence[bool], device: torch.device) -> Rows | None:
    """The rows that are wanted, None if none is."""
    if not any(wanted):
        return None
    if all(wanted):
        return ALL
    return torch.tensor([i for i, yes in enumerate(wanted) if yes], device=device)


class Proposed(NamedTuple):
    """All [B]."""

    tokens: Tensor
    sure: Tensor  # bool; False: `sample` must be asked
    clear: Tensor  # bool; False: too close to call, see `propose`


def propose(
    logits: Tensor,
    peak: Tensor,
    sampling: Sampling,
    step: Tensor,
    kinds: Kinds,
    candidates: int,
    ties: Tensor | None = None,
) -> Proposed:
    """What `sample` draws, without looking at the values on the host.

    Truncated rows look for the last token they keep among their `candidates` best ones (more
    than any top_k). Where it may not be there, a row is not sure. `peak` [B] is the rows' maximum.

    ties: logits [B] by which a row's token must be ahead of the others, and within its support, to
    be clear; None: all are. A token that is not clear may be another than `sample` draws.
    """
    tokens = torch.zeros_like(step)
    sure, clear = torch.ones_like(step, dtype=torch.bool), torch.ones_like(step, dtype=torch.bool)
    by = None  # (B,) as scaled; greedy rows have their own way
    if ties is not None:
        by = torch.where(sampling.temperature > 0, ties / sampling.temperature, 0.0)
    if (rows := kinds.greedy) is not None:
        tokens[rows] = logits[rows].argmax(dim=-1)
        if ties is not None:
            best = logits[rows].topk(2, dim=-1).values  # (R, 2)
            clear[rows] = best[:, 0] - best[:, 1] >= ties[rows]
    if (rows := kinds.full) is not None:
        scaled = (logits[rows] - peak[rows, None]).div_(sampling.temperature[rows, None])
        if by is not None:
            clear[rows] = _told_apart(scaled, by[rows])
        speeds = _speeds(scaled.exp_(), sampling.seed[rows], step[rows])
        tokens[rows] = speeds.argmax(dim=-1)
        if by is not None:
            clear[rows] &= _ahead(speeds, tokens[rows], by[rows])
    if (rows := kinds.truncated) is not None:
        scaled = (logits[rows] - peak[rows, None]).div_(sampling.temperature[rows, None])
        probs = scaled.exp()
        how = sampling.top_p[rows], sampling.top_k[rows], candidates
        if by is None:
            lowest, sure[rows] = support(scaled, probs, *how)
        else:
            lowest, certain, sure[rows] = _margins(scaled, probs, *how, by[rows])
        probs = torch.where(scaled < lowest, 0.0, probs)
        speeds = _speeds(probs, sampling.seed[rows], step[rows])
        tokens[rows] = speeds.argmax(dim=-1)
        if by is not None:
            kept = scaled.gather(-1, tokens[rows, None]) >= certain
            clear[rows] = kept.squeeze(-1) & _told_apart(scaled, by[rows])
            clear[rows] &= _ahead(speeds, tokens[rows], by[rows])
    return Proposed(tokens, sure, clear)


def support(
    scaled: Tensor, probs: Tensor, top_p: Tensor, top_k: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """[R, V] below their maximum, and their exp -> smallest kept value [R, 1], sure [R] bool.

    Where a row is not sure, its last kept token may lie outside the `candidates` best ones.
    """
    best = _largest(scaled, candidates)  # (R, candidates)
    kept = _kept(best, probs.sum(dim=-1).log(), top_p, top_k)
    return _last(best, kept), ~kept[:, -1] | (candidates == scaled.shape[-1])


def _margins(
    scaled: Tensor, probs: Tensor, top_p: Tensor, top_k: Tensor, candidates: int, by: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `support`, where values are known to `by` [R]: the smallest value that may be kept [R, 1],
    the smallest that certainly is [R, 1], sure [R] bool."""
    best = _largest(scaled, candidates)
    total = probs.sum(dim=-1).log()
    # Half of it up for some tokens and down for the others changes the odds of what is beyond
    # top_p by e^by; as much again where two tokens change places; and what a sum rounds.
    beyond, sums = 1 - top_p, 5e-7
    known = (top_p == 1) | (by == 0)  # 1 - (1 - top_p) may be another number than top_p
    low = torch.where(known, top_p, 1 - beyond * (2 * by).exp() - sums)
    high = torch.where(known, top_p, 1 - beyond * (-2 * by).exp() + sums)
    kept, certain = _kept(best, total, high, top_k), _kept(best, total, low, top_k)
    first_out = best.masked_fill(certain, -torch.inf).amax(dim=-1, keepdim=True)  # (R, 1)
    sure = ~kept[:, -1] | (candidates == scaled.shape[-1])
    return _last(best, kept) - by.unsqueeze(-1), first_out + by.unsqueeze(-1), sure


def _speeds(probs: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """[R, V] unnormalised, used up -> [R, V], whose largest value is what is drawn.

    The Gumbel-max trick before its logarithm: the smallest of the waiting times noise / p wins.
    """
    return probs.div_(exponential_noise(seed, step, probs.shape[-1]))


def _ahead(speeds: Tensor, first: Tensor, by: Tensor) -> Tensor:
    """[R, V] used up, [R] the largest -> [R] bool: ahead of the next one by a factor of e^`by`."""
    first = first.unsqueeze(-1)
    best = speeds.gather(-1, first)
    second = speeds.scatter_(-1, first, 0.0).amax(dim=-1, keepdim=True)
    return (second * by.clamp(max=_MOST_SCALED).exp().unsqueeze(-1) <= best).squeeze(-1)


def _told_apart(scaled: Tensor, by: Tensor) -> Tensor:
    """[R, V] below their maximum -> [R] bool: the best is alone where `by` [R] is so much that
    e^scaled, which races, loses who is close; true where it is not."""
    far = by > _MOST_SCALED
    if not bool(far.any()):
        return ~far
    return ~far | ((scaled > -(by + _LUCK).unsqueeze(-1)).sum(dim=-1) == 1)


def _largest(x: Tensor, k: int) -> Tensor:
    """[R, V] -> [R, k] largest values in falling order.

    On a CPU by numpy's partition and sort, which use its vector instructions: a fifth of the time
    of torch's topk, and a tenth where k is in the thousands.
    """
    if x.is_cuda:
        return x.topk(k, dim=-1).values
    best = np.sort(np.partition(x.numpy(), -k, axis=-1)[:, -k:], axis=-1)
    return torch.from_numpy(best[:, ::-1].copy())


def likeliest(logits: Tensor, k: int, *, careful: bool) -> tuple[Tensor, Tensor]:
    """[R, V] float32 -> ids [R, k] of the largest, best first, of equal ones the lower id, and
    whether they are sure [R]. Not `careful`: not sure where many are equal to the last; a tenth of
    the time.
    """
    vocab, some = logits.shape[-1], k + _SPARE
    if careful or some >= vocab:
        ids = torch.arange(vocab, device=logits.device)
        found = vocab - 1 - (_largest(_keys(logits, ids, vocab), k) & 0xFFFFFFFF)
        return found, torch.ones_like(found[:, 0], dtype=torch.bool)
    values, ids = logits.topk(some, dim=-1)
    keys = _keys(values, ids, vocab).sort(dim=-1, descending=True).values
    return vocab - 1 - (keys[:, :k] & 0xFFFFFFFF), values[:, -1] < values[:, k - 1]


def _keys(logits: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """Integers that sort as (logit, -id)."""
    # A float's bits sort as an integer, once those behind the sign of a negative one are turned
    # around. Adding 0 makes -0 to 0, to which it is equal.
    bits = (logits + 0.0).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.long().mul_(2**32).add_(vocab - 1 - ids)


def _last(best: Tensor, kept: Tensor) -> Tensor:
    """[R, C] values in falling order, [R, C] bool with the kept ones first -> [R, 1] the last."""
    return best.gather(-1, kept.sum(dim=-1, keepdim=True) - 1)


def _kept(best: Tensor, total: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[R, C] best tokens in falling order, [R] logsumexp of all -> [R, C] bool: kept ones.

    The first always is: rounding must never leave a row empty.
    """
    k = torch.where(top_k > 0, top_k, best.shape[-1]).unsqueeze(-1)  # (R, 1)
    inside = torch.arange(best.shape[-1], device=best.device) < k
    best = best.masked_fill(~inside, -torch.inf)
    # top-p of what top-k left; without top-k the whole row is what is left.
    mass = torch.where(top_k > 0, best.logsumexp(dim=-1), total)
    probs = (best - mass.unsqueeze(-1)).exp()
    before = probs.cumsum(dim=-1) - probs  # mass of the better tokens
    kept = inside & ((before < top_p.unsqueeze(-1)) | (top_p == 1).unsqueeze(-1))
    kept[:, 0] = True
    return kept


def gumbel_noise(seed: Tensor, step: Tensor, vocab: int) -> Tensor:
    """[B] int64, [B] int64 -> [B, vocab] standard Gumbel noise, float32."""
    return exponential_noise(seed, step, vocab).log_().neg_()


def exponential_noise(seed: Tensor, step: Tensor, vocab: int) -> Tensor:
    """[B] int64, [B] int64 -> [B, vocab] standard exponential noise, float32, above 0."""
    key = _mix32(seed.int())
    key = _mix32(key ^ (seed >> 32).int())
    key = _mix32(key ^ step.int()).unsqueeze(-1)  # (B, 1)
    bits = _mix32(_token_hash(vocab, seed.device) ^ key)  # (B, V)
    v = bits.view(torch.uint32).float().add_(0.5).mul_(2.0**-32)
    # -log(u) of u = 1 - v. Written with log1p, because u itself rounds to 1 in float32 about
    # once in 3e7 numbers, and a waiting time of 0 would win every race. v may round to 1 as
    # well, which would rule the token out: hence the clamp.
    return v.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


@lru_cache(maxsize=8)
def _token_hash(vocab: int, device: torch.device) -> Tensor:
    return _mix32(torch.arange(1, vocab + 1, dtype=torch.int32, device=device))


def _mix32(x: Tensor) -> Tensor:
    """A bijection of the 32-bit integers whose output looks random; int32, in place.

    int32 multiplications wrap around as uint32 ones do; its right shifts are made logical by
    masking the sign's copies away. Constants found by the search of
    github.com/skeeto/hash-prospector.
    """
    shifted = torch.bitwise_right_shift(x, 16).bitwise_and_(0xFFFF)
    x.bitwise_xor_(shifted).mul_(0x21F0AAAD)
    torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
    x.bitwise_xor_(shifted).mul_(0x735A2D97)
    torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
    return x.bitwise_xor_(shifted)
