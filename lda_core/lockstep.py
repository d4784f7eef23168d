"""Both models of a pair over their slots, always at the same rows and columns.

Two runners, one for each model (at the same time where they have devices of their own), or one
runner for a stacked pair. A model that no row needs does not run.

Shapes: B rows, V vocabulary, P prompts, T tokens.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lda_core.errors import ConfigError
from lda_core.graphs import StepGraphs
from lda_core.model_runner import ModelRunner, StepInput
from lda_core.pair import ModelPair
from lda_core.prefix_pool import PrefixPool
from lda_core.request import BOTH, Role, Roles
from lda_core.slots import Kept, Layout, PrefixKV

T = TypeVar("T")
Item = TypeVar("Item")


class Wanted(NamedTuple):
    """A prefix that must be in these slots, for these models."""

    tokens: tuple[int, ...]
    slots: list[int]
    roles: Roles


class Reading(NamedTuple):
    """Tokens to read, whose logits are wanted from position `start` on."""

    tokens: tuple[int, ...]
    start: int


class Pass(NamedTuple):
    """One pass over some columns of several rows.

    Attributes:
      read: (padded) tokens read so far, by all passes.
      last: whether there is no other pass.
      outputs: what the models' bodies said to it.
    """

    start: int  # first column
    read: int
    last: bool
    outputs: dict[ModelRunner, Any]


class Computed(NamedTuple):
    """A model, whose rows it computes (in the order of their lanes), and from which layer on: what
    comes before is another's."""

    model: PreTrainedModel
    roles: tuple[Role, ...]
    first_layer: int


class Lockstep:
    """Call under torch.inference_mode.

    Attributes:
      shares_prefixes: rows with one prompt hold it once, in a prefix slot; else each in its own.
      prefilled_tokens: read from prompts, counted once for both models.
    """

    def __init__(
        self,
        pair: ModelPair,
        *,
        share_prefixes: bool = True,
        graphs: bool = False,
        at_once: bool | None = None,
    ) -> None:
        """`at_once`: the two models in two threads; None: if their devices differ."""
        self._trunk = pair.trunk
        with self._shared_trunk():
            if pair.stacked is not None:
                self._runners = [ModelRunner(pair.stacked.model, "after", pair.stacked.switch)]
            else:  # in this order: the layers that both share, *after* computes
                self._runners = [
                    ModelRunner(pair.after, "after"),
                    ModelRunner(pair.before, "before"),
                ]
            can_share = all(runner.shares_prefixes() for runner in self._runners)
        self.shares_prefixes = share_prefixes and can_share
        self._device = pair.device
        if at_once is None:
            at_once = len({runner.device for runner in self._runners}) > 1
        self._thread = ThreadPoolExecutor(1, "lda-before") if at_once else None
        self.kv_bytes_per_token = sum(self.kv_bytes_by_device().values())
        self.prefilled_tokens = 0
        self.graphs = StepGraphs(self._device) if graphs else None
        if graphs and len(self.kv_bytes_by_device()) > 1:
            raise ConfigError("cuda_graphs: both models must be on one device")

    def allocate(self, kv_tokens: int, pool_bytes: int, prefill_tokens: int) -> None:
        """Memory for `kv_tokens` tokens of both models, and the limits of pool and prefill."""
        for runner in self._runners:
            runner.allocate(kv_tokens)
        self.pool = PrefixPool(pool_bytes)
        self._prefill_tokens = prefill_tokens

    def layout(self, layout: Layout, needs: Roles, kept: Kept) -> None:
        self._layout = layout
        for runner in self._runners:
            runner.layout(layout, self._lanes(runner, needs), kept)

    def fits(self, needs: Roles) -> bool:
        """Whether the present layout has lanes for just these models."""
        return all(runner.lanes == self._lanes(runner, needs) for runner in self._runners)

    def held(self, needs: Roles) -> Roles:
        """The models whose columns slots hold where these are needed."""
        return frozenset().union(*(self._lanes(runner, needs) for runner in self._runners))

    @property
    def lanes(self) -> int:
        """Rows a model sees for every row."""
        return max(len(runner.lanes) for runner in self._runners)

    def _lanes(self, runner: ModelRunner, needs: Roles) -> tuple[Role, ...]:
        """A runner of one model keeps it; the stacked one holds what is needed."""
        return tuple(r for r in runner.roles if r in needs or len(runner.roles) == 1)

    def decode(
        self, step: StepInput, needs: Roles, lap: Callable[[str], None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits [B, V] of *after* and of *before*, on after's device; None where not needed."""
        needs = self._with_trunk(needs)
        if self._trunk is not None:  # *before* takes its first layers' output, pushes and all
            shared = self._trunk.layers
            kept = [p for p in step.pushes if p.role == "after" or p.layer >= shared]
            step = step._replace(pushes=tuple(kept))
        if self.graphs is not None and not step.pushes:  # hooks are no part of a graph
            kind = (needs, tuple(runner.lanes for runner in self._runners))
            found = self.graphs(
                step, self._layout, self.lanes, kind, lambda step: self._run(step, needs)
            )
        else:
            found = self._run(step, needs, lap)
        if self.graphs is not None or self._thread is not None:
            lap("after")  # one stage: both at once
        return found.get("after"), found.get("before")

    def _run(
        self, step: StepInput, needs: Roles, lap: Callable[[str], None] | None = None
    ) -> dict[Role, Tensor]:
        def run(runner: ModelRunner) -> dict[Role, Tensor]:
            logits = runner.decode_step(step.to(runner.device))
            if self._thread is None and lap is not None:
                lap(runner.roles[-1])
            return logits

        found: dict[Role, Tensor] = {}
        with self._shared_trunk():
            for logits in self._each(run, [r for r in self._runners if needs & {*r.roles}]):
                found.update({role: x.to(self._device) for role, x in logits.items()})
        return found

    def _shared_trunk(self) -> AbstractContextManager[None]:
        return nullcontext() if self._trunk is None else self._trunk.use()

    def _with_trunk(self, needs: Roles) -> Roles:
        """*before* takes its first layers' output from *after*, where they share them."""
        return BOTH if self._trunk is not None and "before" in needs else needs

    def _each(self, call: Callable[[ModelRunner], T], runners: Sequence[ModelRunner]) -> list[T]:
        if self._thread is None or len(runners) == 1:
            return [call(runner) for runner in runners]
        # Which of the two modes a thread is in, every thread decides for itself.
        other = self._thread.submit(torch.inference_mode()(call), runners[1])
        try:
            first = call(runners[0])
        finally:
            other.exception()  # waits: nothing may still be running when this returns
        return [first, other.result()]

    @property
    def steerable(self) -> bool:
        return all(runner.steerable for runner in self._runners)

    # -- prompts -----------------------------------------------------------------------

    def fill(self, wanted: Iterable[Wanted], *, prefix: bool) -> int:
        """Brings prefixes into prefix slots (or rows' own): from the pool, or read now.

        Returns how many had to be read.
        """
        missing: dict[Roles, list[Wanted]] = defaultdict(list)
        for want in wanted:
            want = want._replace(roles=self._with_trunk(want.roles))
            absent = set(want.roles)
            for role in want.roles:
                if (entry := self.pool.get((role, want.tokens))) is not None:
                    self._copy(entry, role, want.slots, prefix)
                    absent.discard(role)
            if absent:
                # Which may be *before* alone, where its trunk needs both.
                missing[self._with_trunk(frozenset(absent))].append(want)
        for roles, wants in missing.items():
            limit = self._prefill_tokens // self._rows(roles)
            for piece in by_length(wants, lambda want: len(want.tokens), limit):
                self._read(piece, roles, prefix)
        return sum(len(wants) for wants in missing.values())

    def _rows(self, roles: Roles) -> int:
        """Rows that one pass has for every prompt."""
        return max(sum(role in roles for role in runner.roles) for runner in self._runners)

    def _read(self, piece: list[Wanted], roles: Roles, prefix: bool) -> None:
        runners = [r for r in self._runners if not roles.isdisjoint(r.roles)]
        caches = {runner: DynamicCache() for runner in runners}
        # A bare DynamicCache keeps every column; one made from the config would drop real
        # tokens of shorter rows on sliding-window layers.
        tokens = [want.tokens for want in piece]
        # The caches are what is wanted: nothing else is kept.
        deque(self._passes(tokens, roles, caches, lambda: self._prefill_tokens), maxlen=0)
        self.prefilled_tokens += sum(len(want.tokens) for want in piece)
        for runner in runners:
            cache = caches.pop(runner)  # one model's is gone before the other's is copied
            mine = [role for role in runner.roles if role in roles]
            for i, role in enumerate(mine):
                for row, want in enumerate(piece):
                    entry = _row(cache, row * len(mine) + i, len(want.tokens))
                    self.pool.put((role, want.tokens), entry)
                    if role in want.roles:
                        self._copy(entry, role, want.slots, prefix)

    def _passes(
        self,
        rows: Sequence[Sequence[int]],
        roles: Roles,
        caches: Mapping[ModelRunner, DynamicCache],
        limit: Callable[[], int],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[Pass]:
        """Reads rows of tokens [P, T] into the caches, at most `limit` (padded) at a time.

        Each pass is done `within` a context. Between passes anything else may run.
        """
        longest = max(map(len, rows))
        padded = torch.tensor(
            [[*row, *[0] * (longest - len(row))] for row in rows], device=self._device
        )  # (P, T)
        seen = len(rows) * self._rows(roles)  # rows that a model sees
        start = 0
        while start < longest:
            ids = padded[:, start : start + max(1, limit() // seen)]

            def run(runner: ModelRunner, ids: Tensor = ids, start: int = start) -> Any:
                mine = [role for role in runner.roles if role in roles]
                return runner.read(ids.to(runner.device), start, mine, caches[runner])

            with within(), self._shared_trunk():
                outputs = dict(zip(caches, self._each(run, list(caches)), strict=True))
            end = start + ids.shape[1]
            yield Pass(start, end * seen, end == longest, outputs)
            del outputs  # the next pass needs its memory
            start = end

    def _copy(self, entry: PrefixKV, role: Role, slots: Sequence[int], prefix: bool) -> None:
        (runner,) = (r for r in self._runners if role in r.roles)
        for slot in slots:
            runner.slots.fill(slot, runner.lanes.index(role), entry, prefix=prefix)

    # -- continuations -----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where logits come."""
        return self._device

    @property
    def rows_of_both(self) -> int:
        """Rows that one pass over both models has for every row."""
        return self._rows(BOTH)

    def rows_of(self, roles: Roles) -> int:
        """Rows that one pass over these models has for every row."""
        return self._rows(self._with_trunk(roles))

    def computed(self, roles: Roles) -> list[Computed]:
        """The models that run where these are wanted, in the order in which they do."""
        needs = self._with_trunk(roles)
        return [
            Computed(
                runner.model,
                tuple(role for role in runner.roles if role in needs),
                self._trunk.layers if self._trunk is not None and "before" in runner.roles else 0,
            )
            for runner in self._distinct(needs)
        ]

    def _distinct(self, needs: Roles) -> list[ModelRunner]:
        """The runners of these models; of a model that is paired with itself, one."""
        runners = [r for r in self._runners if not needs.isdisjoint(r.roles)]
        return runners[:1] if len({id(r.model) for r in runners}) == 1 else runners

    def wait(self) -> None:
        """Until the devices have done what they were given: what took how long is known then."""
        for device in {runner.device for runner in self._runners}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def read(
        self,
        rows: Sequence[Sequence[int]],
        roles: Roles,
        limit: Callable[[], int],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[Pass]:
        """Reads rows of tokens for those whose hooks see them: the hooks are there `within` each
        pass of at most `limit` (padded) tokens. No logits are made, and no keys and values are
        kept."""
        needs = self._with_trunk(roles)
        caches = {runner: DynamicCache() for runner in self._distinct(needs)}
        for one in self._passes(rows, needs, caches, limit, within):
            yield one._replace(outputs={})

    def score(
        self, piece: Sequence[Reading], limit: Callable[[], int], positions: int
    ) -> Generator[int, None, Iterator[tuple[Tensor, Tensor]]]:
        """Reads P rows -> logits [n, V] of both models, reading by reading and from its `start`
        on, at most `positions` at a time.

        Gives, between one pass and the next, how many (padded) tokens it has read: at most `limit`
        in each, and no keys and values are kept.
        """
        caches = {runner: DynamicCache() for runner in self._runners}
        rows = [row.tokens for row in piece]
        wanted = [(i, j) for i, row in enumerate(piece) for j in range(row.start, len(row.tokens))]
        place = {at: n for n, at in enumerate(wanted)}
        states: dict[ModelRunner, list[Tensor]] = {runner: [] for runner in caches}
        order: list[int] = []
        output: dict[ModelRunner, Any] = {}
        for start, read, last, output in self._passes(rows, BOTH, caches, limit):
            width = next(iter(output.values())).last_hidden_state.shape[1]
            here = [(i, j) for i, j in wanted if start <= j < start + width]
            order += [place[at] for at in here]
            i, j = torch.tensor(here, device=self._device, dtype=torch.long).view(-1, 2).unbind(-1)
            for runner, one in output.items():
                states[runner].append(runner.states(one, i, j - start))
            if not last:
                self.wait()
                yield read
        del caches
        said = {
            r: replace(x, last_hidden_state=None, past_key_values=None) for r, x in output.items()
        }
        del output  # with the keys and values
        # From the order of the passes to that of the readings.
        back = torch.tensor(order, device=self._device).argsort()
        joined = {r: torch.cat(x, dim=1)[:, back.to(r.device)] for r, x in states.items()}
        return self._logits(joined, said, positions)

    def alone(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [V] of both models behind these tokens, read by nobody else's side and without
        anything that is kept: the same at any time."""
        last = Reading(tuple(tokens), len(tokens) - 1)
        passes = self.score([last], lambda: self._prefill_tokens, positions=1)
        while True:
            try:
                next(passes)
            except StopIteration as done:
                ((after, before),) = done.value
                return after[0], before[0]

    def _logits(
        self, states: Mapping[ModelRunner, Tensor], outputs: Mapping[ModelRunner, Any], limit: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of states [m, N, D], the logits [n, V] of both models, at most `limit` at a time."""
        for at in range(0, next(iter(states.values())).shape[1], limit):
            found: dict[Role, Tensor] = {}
            for runner, hidden in states.items():
                logits = runner.logits(outputs[runner], hidden[:, at : at + limit])
                found.update({role: x.to(self._device) for role, x in logits.items()})
            yield found["after"], found["before"]

    # -- slots -------------------------------------------------------------------------

    def move(self, source: int, target: int, used: int, *, prefix: bool = False) -> None:
        for runner in self._runners:
            runner.slots.move(source, target, used, prefix=prefix)

    def clear(self, start: int, stop: int, *, prefix: bool = False) -> None:
        for runner in self._runners:
            runner.slots.clear(start, stop, prefix=prefix)

    def kv_bytes_by_device(self) -> dict[torch.device, int]:
        """Bytes that a token takes on each device, all models and layers on it together."""
        total: Counter[torch.device] = Counter()
        for runner in self._runners:
            total.update(runner.kv_bytes_by_device())
        return dict(total)

    def give_back(self) -> None:
        """Everything that only saves time."""
        self.pool.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def weight_bytes(self, needs: Roles) -> int:
        """Bytes of weights that a decode step reads: all but the input embedding's table."""
        seen: dict[int, int] = {}
        for runner in self._runners:
            if not needs.isdisjoint(runner.roles):
                seen.update(runner.weights_read())
        return sum(seen.values())


def by_length(items: Iterable[Item], length: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """Similar lengths together: less padding. At most `limit` padded tokens, or one item."""
    pieces: list[list[Item]] = []
    for item in sorted(items, key=length):
        if not pieces or (len(pieces[-1]) + 1) * length(item) > limit:
            pieces.append([])
        pieces[-1].append(item)
    return pieces


def _row(cache: DynamicCache, row: int, length: int) -> PrefixKV:
    """A prefix's keys and values out of a pass over several: views [H, T, D]."""
    return [
        (layer.keys[row, :, :length], layer.values[row, :, :length])
        for layer in cache.layers
        if layer.keys is not None
    ]
