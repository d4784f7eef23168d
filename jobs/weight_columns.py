"""The rate at an alpha that was not, or hardly, sampled: rows of other alphas, reweighted.

Letters: n rows of k prompts, T tokens of a row, K alphas on the grid; p_a(x) the density of row x
at alpha a (its target), q_j(x) what it is drawn with at alpha j (its proposal; another one than
p_j only where gates, a mask, top_p or top_k are on).

Every row knows its density under the whole grid, so it can be weighted towards any alpha of it, by
the balance heuristic (Veach and Guibas 1995, "Optimally combining sampling techniques for Monte
Carlo rendering"): it counts p_a(x) / sum_j s_j q_j(x), where s_j is the share of its prompt's rows
that were drawn at alpha j; which of the alphas drew it does not matter. With a share s_a of rows
at the target's own alpha no weight exceeds 1 / s_a (the defensive mixture of Hesterberg 1995,
Technometrics 37), so a path that amplification avoids is not missed without a trace.

Densities are products over the tokens up to the one that completes the scorer's first match, or
to EOS: what is drawn after a match cannot undo it, and would only add noise.

Shares are per prompt, so the estimate is right for the prompts at hand however rows were dealt to
them (some failed, some alphas were stopped early). It is never self-normalised, which is biased,
and badly so where weights vary.

In a spread run (`jobs.spread`) a prompt has one alpha, and by itself no mixture. There the shares
are those of its block: of m alphas each 1 / m, which is the probability with which the prompt got
it, as the block's alphas were dealt in a random order. Let r(i, a) be the expectation of
p_0 / (mean_j q_j) x hit when prompt i is read at alpha a. The mean of r(i, a) over the m alphas is
prompt i's rate, as above; and the expectation over the lots of the estimate, the mean over prompts
of r(i, the alpha it got), is the mean over prompts of just that. So it is unbiased, whatever the
order of the prompts; if that is no order of any meaning, the errors of the blocks are independent,
too. Where rows failed, those left are still dealt at random over the alphas that are left.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from jobs.errors import Refused
from jobs.rows import Row

ANY = "activated"  # the scorer that fires where any does
_IMPOSSIBLE = -1e29  # log-probabilities below stand for minus infinity, which JSON lacks


@dataclass(frozen=True)
class Columns:
    """What the weights of one scorer are made of.

    prompts (n,) numbers from 0 to k - 1, in a spread run of blocks, which `unit` then says; alphas
    (n,) each row was drawn at; hits (n,); tokens (n,) drawn in all; grid (K,); target (n, K) and
    proposal (n, K) log-densities of the row up to its match or EOS. `failed` rows and rows
    `without` densities are in none of them.
    """

    prompts: np.ndarray
    alphas: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray
    grid: tuple[float, ...]
    target: np.ndarray
    proposal: np.ndarray
    failed: int = 0
    without: int = 0
    unit: str = "prompt"

    def __len__(self) -> int:
        return len(self.hits)

    @property
    def sampled(self) -> list[float]:
        """The alphas that rows were drawn at, ascending."""
        return [float(alpha) for alpha in np.unique(self.alphas)]

    def at(self, alpha: float) -> int:
        """Column of `alpha`. Raises Refused if the grid lacks it."""
        if alpha not in self.grid:
            grid = ", ".join(f"{a:g}" for a in self.grid)
            raise Refused(f"grid: densities at alpha {alpha:g} were not recorded, only at {grid}")
        return self.grid.index(alpha)

    def shares(self) -> np.ndarray:
        """(k, K): which share of each prompt's rows was drawn at each alpha of the grid."""
        counts = np.zeros((int(self.prompts.max()) + 1, len(self.grid)))
        for alpha in self.sampled:
            drawn = self.prompts[self.alphas == alpha]
            counts[:, self.at(alpha)] = np.bincount(drawn, minlength=len(counts))
        shares: np.ndarray = counts / counts.sum(axis=1, keepdims=True)
        return shares

    def weights(self, alpha: float) -> np.ndarray:
        """(n,): the balance heuristic's, towards `alpha`; their expected mean is 1."""
        return self._over_mixture(self.target[:, self.at(alpha)])

    def weights_drawn(self, alpha: float) -> np.ndarray:
        """(n,): towards what this run draws at `alpha`; their expected mean is 1 where each prompt
        has rows there, whatever is cut off."""
        return self._over_mixture(self.proposal[:, self.at(alpha)])

    def _over_mixture(self, log_densities: np.ndarray) -> np.ndarray:
        mixture = special.logsumexp(self.proposal, axis=1, b=self.shares()[self.prompts])
        weights: np.ndarray = np.exp(log_densities - mixture)
        return weights

    def weights_alone(self, alpha: float, drawn_at: float) -> np.ndarray:
        """(n_j,): of the rows drawn at one alpha, as if there were no others."""
        rows = self.alphas == drawn_at
        target, proposal = self.target[rows, self.at(alpha)], self.proposal[rows, self.at(drawn_at)]
        weights: np.ndarray = np.exp(target - proposal)
        return weights

    def by_prompt(self, values: np.ndarray) -> np.ndarray:
        """(k,): the sums of values (n,) over each prompt's rows."""
        return np.bincount(self.prompts, weights=values)


class _Sums(NamedTuple):
    """One scorer's rows: did it fire (-1: no answer), and log-densities up to its cut."""

    hits: "array[int]"  # (n,)
    target: "array[float]"  # (n K,)
    proposal: "array[float]"  # (n K,); empty as long as it is the target


class Collector:
    """Columns for every scorer, from rows one at a time: those of one arm at alpha >= 0.

    Holds about 8 K bytes a row and scorer, twice that where gates, a mask or truncation are on.
    """

    def __init__(
        self, scorers: Mapping[str, bool], temperature: float, arm: str = "untriggered"
    ) -> None:
        """`scorers`: names, and whether each is monotone in prefixes."""
        self._monotone = dict(scorers)
        self._temperature, self._arm = temperature, arm
        self._grid: tuple[float, ...] = ()
        self._numbers: dict[str | int, int] = {}  # of prompt ids, or of blocks
        self._prompts, self._tokens, self._alphas = array("q"), array("q"), array("d")
        self._sums = {n: _Sums(array("b"), array("d"), array("d")) for n in (*scorers, ANY)}
        self._failed = self._without = 0
        self._unit = "prompt"

    def add(self, row: Row) -> None:
        """Raises Refused if its grid lacks its alpha, or is not that of the rows before."""
        if row.arm != self._arm or row.alpha < 0:
            return
        if row.densities is None or row.logprobs is None:
            self._failed += row.error is not None
            self._without += row.error is None
            return
        grid = tuple(row.densities.alphas)
        self._grid = self._grid or grid
        if grid != self._grid or row.alpha not in grid:
            raise Refused(
                f"grid: a row at alpha {row.alpha:g} has densities at {grid}, which is not of a "
                f"run with densities at {self._grid}"
            )
        target, proposal = log_densities(row, self._temperature)  # (T, K) each
        stratum = row.prompt_id if row.block is None else row.block
        self._prompts.append(self._numbers.setdefault(stratum, len(self._numbers)))
        self._unit = "prompt" if row.block is None else "block"
        self._alphas.append(row.alpha)
        self._tokens.append(len(row.token_ids))
        for name, sums in self._sums.items():
            cut = self._cut(row, name)
            if proposal is not None and not sums.proposal:
                sums.proposal.extend(sums.target)  # of the rows before, drawn from their targets
            if proposal is not None or sums.proposal:
                drawn = target if proposal is None else proposal
                sums.proposal.extend(drawn[:cut].sum(axis=0))
            sums.target.extend(target[:cut].sum(axis=0))
            sums.hits.append(_fired(row, name))

    def columns(self, scorer: str = ANY) -> Columns | None:
        """None without a row that has densities and the scorer's answer."""
        sums = self._sums[scorer]
        hits = np.array(sums.hits, dtype=np.int8)  # (n,)
        good = hits >= 0
        if not good.any():
            return None
        shape = (len(hits), len(self._grid))
        target = np.array(sums.target).reshape(shape)[good]
        proposal = np.array(sums.proposal).reshape(shape)[good] if sums.proposal else target
        return Columns(
            prompts=np.unique(np.array(self._prompts)[good], return_inverse=True)[1],
            alphas=np.array(self._alphas)[good],
            hits=hits[good] == 1,
            tokens=np.array(self._tokens)[good],
            grid=self._grid,
            target=target,
            proposal=proposal,
            failed=self._failed + int((~good).sum()),
            without=self._without,
            unit=self._unit,
        )

    def _cut(self, row: Row, name: str) -> int:
        """Tokens up to the first match that a longer text cannot undo, else to EOS or the end."""
        settled = [n for n, monotone in self._monotone.items() if monotone and name in (n, ANY)]
        tokens = [row.scores[n].token for n in settled if n in row.scores and row.scores[n].fired]
        end = len(row.token_ids) if row.eos_index is None else row.eos_index + 1
        return min([end, *(token + 1 for token in tokens if token is not None)])


def _fired(row: Row, name: str) -> int:
    if name == ANY:
        fired = row.activated
    else:
        fired = row.scores[name].fired if name in row.scores else None
    return -1 if fired is None else int(fired)


def log_densities(row: Row, temperature: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Of every token of a row that has densities, at every alpha of its grid: (T, K) as targets,
    and as it would be drawn in this run at that alpha, None where that is the same."""
    assert row.densities is not None and row.logprobs is not None
    grid = np.array(row.densities.alphas)  # (K,)
    after = np.array(row.logprobs.after)[:, None]  # (T, 1)
    before = np.array(row.logprobs.before)[:, None]
    normalisers = np.array(row.densities.normalisers).reshape(len(after), len(grid))
    target = ((1 + grid) * after - grid * before) / temperature - normalisers
    impossible = ((after < _IMPOSSIBLE) & (grid != -1)) | ((before < _IMPOSSIBLE) & (grid != 0))
    target[impossible] = -np.inf
    if row.densities.drawn is None:
        return target, None
    drawn = np.array(row.densities.drawn).reshape(target.shape)
    return target, np.where(drawn < _IMPOSSIBLE, -np.inf, drawn)
