"""What is recorded of a step beside its tokens: normalisers, densities, watched and likeliest
tokens, the divergence of the models.

With the drawn token's log-probability under *after* and *before*, one number per alpha, the
log-normaliser, gives its density under that alpha (`request.Densities`). All of it is computed
row by row from the logits that the step has anyway.

Shapes: B rows, R rows that ask, V tokens, K alphas, W watched tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lda_core.amplify import amplify, mix, nonfinite_rows
from lda_core.gates import Gate, divergence
from lda_core.request import IMPOSSIBLE, Request
from lda_core.sampling import Rows, Sampling, chosen, likeliest, support


class Column(NamedTuple):
    """One alpha of every row that asks; rows with fewer alphas are filled up with 0."""

    alpha: Tensor  # (R,)
    minus: bool  # whether any of them is -1
    known: bool  # whether all normalisers are 0: one model alone at temperature 1

    @classmethod
    def of(
        cls, alphas: Sequence[float], temperatures: Sequence[float], device: torch.device
    ) -> Self:
        values = torch.tensor(alphas, dtype=torch.float32, device=device)
        known = all(a in (0, -1) for a in alphas) and all(t == 1 for t in temperatures)
        return cls(values, -1 in alphas, known)

    def mixed(self, after: Tensor, before: Tensor, careful: bool) -> Tensor:
        """[R, V]; not `careful`: right where it is finite."""
        if careful:
            return amplify(after, before, self.alpha)
        mixed = mix(after, before, self.alpha)
        # By selection, as in the draw: what was drawn must not lie beyond its own support.
        return torch.where(self.alpha.unsqueeze(-1) == -1, before, mixed) if self.minus else mixed


class Grid(NamedTuple):
    """The rows that record densities."""

    rows: Rows  # (R,)
    columns: tuple[Column, ...]  # K
    sampling: Sampling  # of these rows
    truncated: Rows | None  # those of them with top_p or top_k
    reshaped: bool  # whether any is drawn from something else than its target

    @classmethod
    def of(
        cls, requests: Sequence[Request], sampling: Sampling, device: torch.device
    ) -> Self | None:
        """None where no row asks."""
        rows = chosen([bool(r.grid) for r in requests], device)
        if rows is None:
            return None
        asking = [r for r in requests if r.grid]
        return cls(
            rows=rows,
            columns=columns([r.grid for r in asking], [r.temperature for r in asking], device),
            sampling=Sampling(*(x[rows] for x in sampling)),
            truncated=chosen([r.top_p < 1 or r.top_k > 0 for r in asking], device),
            reshaped=any(r.reshaped for r in asking),
        )

    def densities(
        self,
        models: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor],
        tokens: Tensor,
        gate: Gate | None,
        candidates: int,
        *,
        careful: bool,
    ) -> "Found":
        """Of logits [R, V] and their logsumexp [R] under after and before, and drawn tokens [R].

        Not `careful`: what is not right is NaN or inf. `candidates`: see `sampling.support`.
        """
        after, before = models
        found = Found([], [], torch.ones_like(tokens, dtype=torch.bool) if self.reshaped else None)
        temperature = self.sampling.temperature
        for column in self.columns:
            if column.known and not self.reshaped:
                found.normalisers.append(torch.zeros_like(norms[0]))
                continue
            mixed = column.mixed(after, before, careful)
            found.normalisers.append(normaliser(column, mixed, norms, temperature))
            if found.sure is not None:
                density, sure = proposal(column, mixed, after, tokens, self, gate, candidates)
                found.drawn.append(density)
                found.sure.logical_and_(sure)
        return found


class Found(NamedTuple):
    normalisers: list[Tensor]  # K of [R] float64
    drawn: list[Tensor]  # K of [R], or none
    sure: Tensor | None  # [R] bool


class Top(NamedTuple):
    """The rows that want the likeliest tokens; those that want fewer have more than they want."""

    rows: Rows  # (R,)
    k: int

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Self | None:
        """None where no row asks."""
        rows = chosen([r.top_logprobs > 0 for r in requests], device)
        return None if rows is None else cls(rows, max(r.top_logprobs for r in requests))

    def found(self, mixed: Tensor, norms: Tensor, *, careful: bool) -> tuple[Tensor, Tensor]:
        """[B, V] logits at the rows' own alphas, their logsumexp [B] -> [R, 2 * k] float64: ids,
        then log-probabilities; and whether they are sure [R] (see `sampling.likeliest`)."""
        logits = mixed[self.rows]
        ids, sure = likeliest(logits, min(self.k, logits.shape[-1]), careful=careful)
        # By the same two operations as the drawn token's, which makes the same number.
        values = logits.gather(-1, ids) - norms[self.rows].unsqueeze(-1)
        return torch.cat([ids.double(), values.double()], dim=-1), sure


class Watch(NamedTuple):
    """The rows that watch tokens; those that watch fewer are filled up with token 0."""

    rows: Rows  # (R,)
    tokens: Tensor  # (R, W)
    temperature: Tensor  # (R,)

    @classmethod
    def of(
        cls, requests: Sequence[Request], sampling: Sampling, device: torch.device
    ) -> Self | None:
        """None where no row asks."""
        rows = chosen([bool(r.watch) for r in requests], device)
        if rows is None:
            return None
        asking = [r.watch for r in requests if r.watch]
        width = max(map(len, asking))
        tokens = [[*watch, *[0] * (width - len(watch))] for watch in asking]
        return cls(rows, torch.tensor(tokens, device=device), sampling.temperature[rows])

    def logprobs(self, mixed: Tensor) -> Tensor:
        """[B, V] logits at the rows' own alphas -> [R, W]."""
        _, scaled = _below_peak(mixed[self.rows], self.temperature)
        return scaled.gather(-1, self.tokens) - _log_sum(scaled).unsqueeze(-1)


def recorded_kl(after: Tensor, before: Tensor) -> Tensor:
    """Logits [R, V] of both -> KL(after||before) [R] float64, at most 1e30; NaN where one of the
    two is not finite."""
    broken = nonfinite_rows(after.logsumexp(dim=-1), before.logsumexp(dim=-1))
    found = divergence(after, before).double().clamp(0, -IMPOSSIBLE)
    return torch.where(broken, torch.nan, found)


def columns(
    grids: Sequence[Sequence[float]], temperatures: Sequence[float], device: torch.device
) -> tuple[Column, ...]:
    """R grids -> K columns of R alphas."""
    most = max(map(len, grids))
    padded = [[*grid, *[0.0] * (most - len(grid))] for grid in grids]
    return tuple(Column.of(alphas, temperatures, device) for alphas in zip(*padded, strict=True))


def at_alpha(
    column: Column,
    mixed: Tensor,
    norms: tuple[Tensor, Tensor],
    temperature: Tensor,
    tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `normaliser` gives, and the log-probabilities [R, n] of tokens [R, n] under the column's
    alphas at the temperature: of one model alone at temperature 1 its own, to the bit."""
    peak, scaled = _below_peak(mixed, temperature)
    log_sum = _log_sum(scaled)
    minus = column.alpha == -1
    known = ((column.alpha == 0) | minus) & (temperature == 1)  # (R,)
    own = mixed.gather(-1, tokens) - torch.where(minus, norms[1], norms[0]).unsqueeze(-1)
    found = scaled.gather(-1, tokens) - log_sum.unsqueeze(-1)
    return (
        _normaliser(column.alpha, peak, log_sum, norms, temperature),
        torch.where(known.unsqueeze(-1), own, found),
    )


def normaliser(
    column: Column, mixed: Tensor, norms: tuple[Tensor, Tensor], temperature: Tensor
) -> Tensor:
    """Of logits [R, V] amplified by the column's alphas; `norms` [R]: after's and before's
    logsumexp -> [R] float64.

    The two norms are the same numbers that the token's log-probabilities were taken with, so that
    what was lost in their rounding cancels.
    """
    peak, scaled = _below_peak(mixed, temperature)
    return _normaliser(column.alpha, peak, _log_sum(scaled), norms, temperature)


def _normaliser(
    alpha: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    norms: tuple[Tensor, Tensor],
    temperature: Tensor,
) -> Tensor:
    alpha = alpha.double()
    shift = peak.double() - ((1 + alpha) * norms[0].double() - alpha * norms[1].double())
    value = log_sum.double() + shift / temperature.double()
    value = torch.where(peak.isneginf(), -torch.inf, value)  # no token is possible under both
    known = ((alpha == 0) | (alpha == -1)) & (temperature == 1)
    return torch.where(known, 0.0, value)


def proposal(
    column: Column,
    mixed: Tensor,
    after: Tensor,
    tokens: Tensor,
    grid: Grid,
    gate: Gate | None,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Log-density [R] under which tokens [R] are drawn at the column's alphas, and whether it is
    sure [R] (see `sampling.support`)."""
    if gate is not None:
        mixed = gate.apply(mixed, after, column.alpha)
    _, scaled = _below_peak(mixed, grid.sampling.temperature)
    own = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    probs = scaled.exp()
    sure = torch.ones_like(tokens, dtype=torch.bool)
    if (cut := grid.truncated) is not None:
        lowest = torch.full_like(own, -torch.inf)
        top_p, top_k = grid.sampling.top_p[cut], grid.sampling.top_k[cut]
        least, sure[cut] = support(scaled[cut], probs[cut], top_p, top_k, candidates)
        lowest[cut] = least.squeeze(-1)
        probs = torch.where(scaled < lowest.unsqueeze(-1), 0.0, probs)
        own = torch.where(own < lowest, -torch.inf, own)
    return own - probs.sum(dim=-1).log(), sure


def _below_peak(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Peaks [R], and [R, V] as `propose` scales them: below the peak, by the temperature."""
    peak = logits.amax(dim=-1)
    return peak, (logits - peak.unsqueeze(-1)).div_(temperature.unsqueeze(-1))


def _log_sum(scaled: Tensor) -> Tensor:
    """[R, V] below their peak -> [R]."""
    return scaled.exp().sum(dim=-1).log()
