"""The rows of a batch, and what one step needs of all of them.

Shapes: B live rows, G live prefixes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lda_core.densities import Grid, Top, Watch
from lda_core.errors import DoesNotFit, Overdue
from lda_core.gates import Gates
from lda_core.model_runner import StepInput
from lda_core.request import BOTH, Completion, Request, Role, Roles
from lda_core.sampling import Kinds, Rows, Sampling, chosen
from lda_core.slots import Run
from lda_core.steering import Push, pushes

# The alphas that are one model alone.
_ONLY: dict[float, Role] = {0.0: "after", -1.0: "before"}


@dataclass(eq=False)
class Prefix:
    """A prompt but for its last token, in a prefix slot that its rows share."""

    tokens: tuple[int, ...]
    rows: int = 0  # live ones that read it
    roles: Roles = frozenset()  # models that have read it


@dataclass(eq=False)
class Row:
    """One request on its way through the engine, from `Engine.accept`.

    Setting `left` (any thread may) takes it out at the next step, without a completion.
    At the first step after its `deadline`, on the engine's clock, it is done with what it has
    drawn; one that has drawn nothing is `refused`.
    `on_token` is called in the engine's thread after each step that gave the row a token, and when
    it is out, once for all rows that have the same; it must not raise. A row that starts again
    draws the same tokens a second time.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, ...]] = field(default_factory=list)  # three of each token
    normalisers: list[tuple[float, ...]] = field(default_factory=list)  # (T, K)
    drawn: list[tuple[float, ...]] = field(default_factory=list)  # (T, K)
    watched: list[tuple[float, ...]] = field(default_factory=list)  # (T, W)
    top: list[list[tuple[int, float]]] = field(default_factory=list)  # T of k
    kl: list[float] = field(default_factory=list)  # T
    eos_index: int | None = None
    left: bool = False
    prefix: Prefix | None = None  # while it is live, where prefixes are shared
    # Memory ran out with this row alone, or it waited too long.
    refused: DoesNotFit | Overdue | None = None
    completion: Completion | None = None
    deadline: float = math.inf
    on_token: Callable[[], None] | None = None

    @property
    def position(self) -> int:
        """Of the token that is read next."""
        return len(self.request.prompt_ids) - 1 + len(self.token_ids)

    @property
    def written(self) -> int:
        """Columns of its own slot that hold something."""
        return self.position - (len(self.prefix.tokens) if self.prefix else 0)

    @property
    def own_columns(self) -> int:
        """Columns of its own slot that it may ever fill."""
        return self.request.columns - (len(self.prefix.tokens) if self.prefix else 0)

    @property
    def needs(self) -> Roles:
        """The models without which it cannot go on."""
        only = _ONLY.get(self.request.alpha)
        if only is None or self.request.wants_logprobs or self.request.kl:
            return BOTH
        return frozenset((only,))

    def restart(self) -> None:
        """As it was before its first token."""
        self.token_ids, self.eos_index = [], None
        self.logprobs, self.normalisers, self.drawn, self.watched = [], [], [], []
        self.top, self.kl = [], []


class BatchState(NamedTuple):
    """What a step needs of every live row, on the device. Rebuilt when rows change."""

    tokens: Tensor  # (B,)
    positions: Tensor  # (B,)
    prefixes: Tensor  # (B,)
    step: Tensor  # (B,)
    alpha: Tensor  # (B,)
    sampling: Sampling
    kinds: Kinds
    plain: tuple[Tensor, Tensor] | None  # rows at alpha 0 and at -1, if there are any
    runs: tuple[Run, ...]
    place: Tensor | None
    prefix_width: int
    needs: Roles
    logprobs: Tensor | None  # (B,) bool, if any row wants them
    top_k: int  # the largest
    gates: Gates | None = None  # if they matter to any row
    grid: Grid | None = None
    watch: Watch | None = None
    top: Top | None = None
    kl: Rows | None = None  # rows that want it
    fewest: Tensor | None = None  # (B,) tokens before which no EOS is drawn, if any row has some
    pushes: tuple[Push, ...] = ()
    ties: Tensor | None = None  # (B,) logits that are closer are the same; None: none are

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        prefixes: Sequence[Prefix],
        device: torch.device,
        *,
        lanes: int = 1,
        one_run: bool = False,
        tie: float | None = None,
    ) -> Self:
        """`lanes`: rows the model sees for every row; `one_run`: not split by size; `tie`: logits
        of one model that are closer are the same."""
        requests = [row.request for row in rows]
        ints = torch.tensor(
            [
                [
                    (row.token_ids or r.prompt_ids)[-1],
                    row.position,
                    len(row.prefix.tokens) if row.prefix else 0,
                    len(row.token_ids),
                    r.top_k,
                    r.seed,
                ]
                for row, r in zip(rows, requests, strict=True)
            ],
            device=device,
        )
        floats = torch.tensor(
            [[r.alpha, r.temperature, r.top_p] for r in requests],
            dtype=torch.float32,
            device=device,
        )
        tokens, positions, bases, step, top_k, seed = ints.unbind(-1)
        alpha, temperature, top_p = floats.unbind(-1)
        sampling = Sampling(temperature, top_p, top_k, seed)
        needs: Roles = frozenset().union(*(row.needs for row in rows))
        zero, minus = ([i for i, r in enumerate(requests) if r.alpha == a] for a in (0.0, -1.0))
        runs, place = _runs(rows, prefixes, lanes, one_run, device)
        return cls(
            tokens=tokens,
            positions=positions,
            prefixes=bases,
            step=step,
            alpha=alpha,
            sampling=sampling,
            kinds=_kinds(requests, device),
            plain=(
                (
                    torch.tensor(zero, device=device).long(),
                    torch.tensor(minus, device=device).long(),
                )
                if zero or minus
                else None
            ),
            runs=runs,
            place=place,
            prefix_width=max((len(p.tokens) for p in prefixes), default=0),
            needs=needs,
            logprobs=(
                torch.tensor([r.wants_logprobs for r in requests], device=device)
                if any(r.wants_logprobs for r in requests)
                else None
            ),
            top_k=max(r.top_k for r in requests),
            gates=Gates.of(requests, device) if needs == BOTH else None,
            grid=Grid.of(requests, sampling, device),
            watch=Watch.of(requests, sampling, device),
            top=Top.of(requests, device),
            kl=chosen([r.kl for r in requests], device),
            fewest=(
                torch.tensor([r.min_tokens for r in requests], device=device)
                if any(r.min_tokens for r in requests)
                else None
            ),
            pushes=pushes(requests, device),
            ties=None if tie is None else _ties(requests, tie, device),
        )

    def step_input(self, rows: Sequence[Row], prefixes: Sequence[Prefix]) -> StepInput:
        return StepInput(
            tokens=self.tokens,
            positions=self.positions,
            prefixes=self.prefixes,
            width=max(row.written for row in rows) + 1,
            prefix_count=len(prefixes),
            prefix_width=self.prefix_width,
            runs=self.runs,
            place=self.place,
            pushes=self.pushes,
        )

    def advance(self, tokens: Tensor) -> Self:
        return self._replace(tokens=tokens, positions=self.positions + 1, step=self.step + 1)


def _ties(requests: Sequence[Request], tie: float, device: torch.device) -> Tensor:
    """(B,) what mixing makes of it. A steered row has none: a pass of the row alone, which would
    decide, does not steer."""
    return torch.tensor(
        [0.0 if r.steer else tie * (abs(1 + r.alpha) + abs(r.alpha)) for r in requests],
        device=device,
    )


def _kinds(requests: Sequence[Request], device: torch.device) -> Kinds:
    greedy = [r.temperature == 0 for r in requests]
    truncated = [r.temperature > 0 and (r.top_p < 1 or r.top_k > 0) for r in requests]
    full = [not (g or t) for g, t in zip(greedy, truncated, strict=True)]
    return Kinds(*(chosen(kind, device) for kind in (greedy, full, truncated)))


def _runs(
    rows: Sequence[Row],
    prefixes: Sequence[Prefix],
    lanes: int,
    one_run: bool,
    device: torch.device,
) -> tuple[tuple[Run, ...], Tensor | None]:
    """runs and place of `StepInput`."""
    if [row.prefix for row in rows] == list(prefixes) or not prefixes:
        return (), None
    members: dict[Prefix, list[int]] = {prefix: [] for prefix in prefixes}
    for i, row in enumerate(rows):
        if row.prefix is not None:
            members[row.prefix].append(i)
    runs: list[Run] = []
    place = [0] * (len(rows) * lanes)
    at = start = 0
    all_groups = list(members.values())
    for groups in [all_groups] if one_run else _even(all_groups):
        n = max(len(group) for group in groups)
        gather: list[int] = []
        for group in groups:
            for lane in range(lanes):
                for j, i in enumerate(group):
                    place[i * lanes + lane] = at + len(gather) + j
                gather += [i * lanes + lane for i in group] + [0] * (n - len(group))
        stop = start + len(groups) * lanes
        runs.append(Run(start, stop, torch.tensor(gather, device=device)))
        at, start = at + len(gather), stop
    return tuple(runs), torch.tensor(place, device=device)


def _even(groups: list[list[int]]) -> list[list[list[int]]]:
    """Neighbouring groups together as long as at most half of what they are padded to is padding.

    One prompt with many samples beside many prompts with one would else pad them all to it.
    """
    runs: list[list[list[int]]] = [[groups[0]]]
    for group in groups[1:]:
        run = [*runs[-1], group]
        padded = len(run) * max(len(g) for g in run)
        if padded <= 2 * sum(len(g) for g in run):
            runs[-1] = run
        else:
            runs.append([group])
    return runs
