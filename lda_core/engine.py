"""The engine: both models decode every row in lockstep, rows join and leave at any step.

`step` is the system in a few lines. A row's tokens depend on its request alone: not on its
neighbours, its slot, or when it joined.

Shapes: B live rows, V common vocabulary, G live prefixes.
"""

import gc
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lda_core import capture, memory
from lda_core.batch import BatchState, Prefix, Row
from lda_core.capture import Captured, CaptureRequest, CaptureRow, Capturing
from lda_core.config import EngineConfig
from lda_core.detokenize import (
    Pieces,
    Text,
    completion_text,
    cut_at_stop,
    hits_stop,
    stop_floor,
    token_ends,
)
from lda_core.draw import Draw, Drawer
from lda_core.errors import ConfigError, ContextLengthExceeded, DoesNotFit, Overdue, RequestError
from lda_core.lockstep import Lockstep, Wanted
from lda_core.memory import Budget
from lda_core.pair import ModelPair
from lda_core.pieces import Pace, PieceQueue
from lda_core.request import (
    BOTH,
    Completion,
    Densities,
    FinishReason,
    Request,
    Roles,
    Scored,
    ScoreRequest,
    Steer,
    TokenLogprobs,
)
from lda_core.scoring import ScoreRow, Scoring
from lda_core.slots import Kept, Layout
from lda_core.stages import StageClock

# Slots are laid out in steps of this many columns, so that a slightly longer row seldom
# moves everything.
_COLUMN_STEP = 32
# Prefix slots at first; twice as many as needed later.
_PREFIX_SLOTS = 8
# Memory on a CPU, where the config names none; on a GPU see `lda_core.memory`.
_CPU_KV_BYTES = 2 * 1024**3
_CPU_POOL_BYTES = 256 * 1024**2
# What is known of a float32 logit's noise at least, and how many times the noise two logits must be
# apart. Their distance changes by twice the noise; where that was found of eight rows, ten
# thousand rows had five times as much (docs/log.md).
_NOISE, _TIE = 6e-6, 8
# After running out of memory fewer rows decode together; twice as many again after so many steps
# without.
_CALM_STEPS = 4096


@dataclass
class EngineStats:
    """Totals since the engine was made."""

    steps: int = 0
    tokens: int = 0
    prefix_lookups: int = 0  # prefixes that new rows needed, live ones included
    prefix_hits: int = 0  # of them, those that nobody had to read again
    prefilled_tokens: int = 0
    scored_tokens: int = 0
    captured_tokens: int = 0  # counted once for both models
    out_of_memory: int = 0
    ties: int = 0  # draws that were too close, decided by a pass of their row alone
    overdue: int = 0  # rows that their deadline ended, or that were still waiting at it
    busy_s: float = 0.0  # time of all steps, prompts read in them too
    floor_bytes: int = 0  # that these steps had to read at least


class Engine:
    """Decodes requests on a pair. Not thread-safe: `EngineThread` is, on top of it.

    Attributes:
      clock: set to a StageClock, it is told where the time of every step goes.
      budget: what of the memory is for what.
      stats: totals since the engine was made.
    """

    def __init__(
        self, pair: ModelPair, config: EngineConfig | None = None, noise: float = 0.0
    ) -> None:
        """`noise`: what matrix products of another shape change of a float32 logit of one model on
        a CPU (`noise_floor`), where it is more than the tiny pair's. Draws that are within it are
        decided by a pass of their row alone."""
        self.pair = pair
        self.config = config or EngineConfig()
        self.context_length = min(
            pair.context_length, self.config.context_length or pair.context_length
        )
        self.clock: StageClock | None = None
        self._stats = EngineStats()
        with torch.inference_mode():
            self._pair = Lockstep(
                pair,
                share_prefixes=self.config.share_prefixes,
                graphs=self.config.cuda_graphs,
            )
            self.budget = self._budget()
            self._pair.allocate(self.kv_tokens, self.budget.prefix_pool, self.config.prefill_tokens)
        self._draw = Drawer(pair.vocab_size, pair.eos_ids)
        # 16-bit logits are apart by more than that, and a GPU's pass alone rounds differently.
        exact = {model.dtype for model in (pair.after, pair.before)} == {torch.float32}
        self._tie = _TIE * max(noise, _NOISE) if exact and pair.device.type == "cpu" else None
        self._pieces = Pieces(pair.tokenizer)
        # The logits of as many positions at a time as a decode step has rows.
        limits = self.config.prefill_tokens, self.config.max_slots
        self._pace = Pace()
        self._scoring = Scoring(self._pair, pair.vocab_size, *limits, self._pace)
        self._capturing = Capturing(self._pair, self.config.prefill_tokens, self._pace)
        # In turn: what is scored and what is captured.
        self._queues: deque[PieceQueue[Any]] = deque([self._scoring.queue, self._capturing.queue])
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []  # row i lives in slot i
        self._prefixes: list[Prefix] = []  # prefix i lives in prefix slot i
        self._state: BatchState | None = None
        self._joining: list[Row] = []  # taken from those waiting, not yet in a slot
        self._layout: Layout | None = None  # None: to be made before the next step
        self._most_rows = self.config.max_slots  # fewer for a while after running out of memory
        self._calm_steps = 0
        self._failures = 0  # out of memory, in a row

    # -- what callers do ---------------------------------------------------------------

    def accept(self, request: Request, within_s: float = math.inf) -> Row:
        """The request as a row to `enqueue`. Raises RequestError if it can never be served.

        `within_s` from now it ends with what it has drawn, with finish_reason "length".

        Any thread may call this. A row is a checked request: past here nothing is checked again.
        """
        prompt = request.prompt_ids
        self._need_known(prompt, "prompt")
        self._need_known(request.watch, "watch")
        if request.steer is not None:
            self._need_steerable(request.steer)
        if len(prompt) + request.max_new_tokens > self.context_length:
            raise ContextLengthExceeded(
                "prompt" if len(prompt) >= self.context_length else "max_new_tokens",
                f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones do not fit "
                f"in the context of {self.context_length}",
            )
        if request.columns > self.kv_tokens:
            raise DoesNotFit(
                "max_new_tokens",
                f"{len(prompt)} prompt tokens and {request.max_new_tokens} new ones need "
                f"{request.columns} tokens of key/value memory, {self.kv_tokens} are there",
            )
        return Row(request, deadline=self._pace.clock() + within_s)

    def accept_score(self, request: ScoreRequest) -> ScoreRow:
        """The request as a row for `enqueue_score`. Raises RequestError if it can never be served.

        Any thread may call this.
        """
        prompt, continuation = request.prompt_ids, request.continuation_ids
        self._need_known(prompt, "prompt")
        self._need_known(continuation, "continuation")
        if len(prompt) + len(continuation) > self.context_length:
            raise ContextLengthExceeded(
                "prompt" if len(prompt) >= self.context_length else "continuation",
                f"{len(prompt)} prompt tokens and {len(continuation)} to score do not fit in the "
                f"context of {self.context_length}",
            )
        return ScoreRow(request)

    def accept_capture(self, request: CaptureRequest) -> CaptureRow:
        """The request as a row for `enqueue_capture`. Raises RequestError if it can never be
        served.

        Any thread may call this.
        """
        self._need_known(request.prompt_ids, "prompt")
        self._need_known(request.completion_ids, "completion")
        return capture.accept(request, self.pair, self.context_length)

    def _need_known(self, ids: Sequence[int], field: str) -> None:
        last = self.pair.vocab_size - 1
        if not all(0 <= token <= last for token in ids):
            raise RequestError(field, f"token ids must be between 0 and {last}")

    def _need_steerable(self, steer: Steer) -> None:
        for role in sorted(steer.roles):
            config = getattr(self.pair, role).config
            layers, size = config.num_hidden_layers, config.hidden_size
            if steer.layer >= layers:
                raise RequestError("steer.layer", f"must be between 0 and {layers - 1}")
            if len(steer.vector) != size:
                raise RequestError(
                    "steer.vector", f"has {len(steer.vector)} numbers, the models' width is {size}"
                )
        if not self._pair.steerable:
            raise RequestError("steer", "the layers of this architecture are not known")
        trunk = self.pair.trunk
        if trunk is not None and steer.layer < trunk.layers and steer.roles != BOTH:
            raise RequestError(
                "steer.models",
                f"must be both at layers below {trunk.layers}, which the models share",
            )

    def enqueue(self, row: Row) -> None:
        self._waiting.append(row)

    def enqueue_score(self, row: ScoreRow) -> None:
        self._scoring.queue.add(row)

    def enqueue_capture(self, row: CaptureRow) -> None:
        self._capturing.queue.add(row)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Completions in the order of the requests. Raises RequestError before any work.

        A row whose logits are not finite comes back with finish_reason "error".
        """
        rows = [self.accept(request) for request in requests]
        for row in rows:
            self.enqueue(row)
        try:
            while self._rows or self._waiting:
                self.step()
        except BaseException:  # Ctrl-C in a notebook: the next call must not decode these along
            for row in rows:
                row.left = True
            raise
        return [row.completion for row in rows if row.completion is not None]

    def score(self, requests: Iterable[ScoreRequest]) -> list[Scored]:
        """What both models give the tokens of continuations, in the order of the requests.

        Raises RequestError before any work; DoesNotFit, when all others are done, if memory runs
        out with one alone. One whose logits are not finite comes back with an `error`.
        """
        rows = [self.accept_score(request) for request in requests]
        for row in rows:
            self.enqueue_score(row)
        self._finish(self._scoring.queue, rows)
        return [row.scored for row in rows if row.scored is not None]

    def capture(self, requests: Iterable[CaptureRequest]) -> list[Captured]:
        """What both models' residual streams hold at every token, in the order of the requests.

        Raises as `score` does. One whose activations are not finite comes back with an `error`.
        """
        rows = [self.accept_capture(request) for request in requests]
        for row in rows:
            self.enqueue_capture(row)
        self._finish(self._capturing.queue, rows)
        return [row.captured for row in rows if row.captured is not None]

    @torch.inference_mode()
    def _finish(self, queue: PieceQueue[Any], rows: Sequence[ScoreRow | CaptureRow]) -> None:
        try:
            while not queue.idle:
                self._piece(queue)
        except BaseException:  # Ctrl-C in a notebook: the next call must not read these along
            for row in rows:
                row.left = True
            raise
        for row in rows:
            if row.refused is not None:
                raise row.refused

    @property
    def idle(self) -> bool:
        """Nothing to decode, to score or to capture."""
        return not (self._rows or self._waiting) and all(queue.idle for queue in self._queues)

    @property
    def live_rows(self) -> int:
        return len(self._rows)

    @property
    def waiting_rows(self) -> int:
        return len(self._waiting)

    @property
    def kv_tokens(self) -> int:
        """Tokens of keys and values that live rows may need together."""
        return self.budget.kv_tokens

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._stats,
            prefilled_tokens=self._pair.prefilled_tokens,
            scored_tokens=self._scoring.tokens,
            captured_tokens=self._capturing.tokens,
            out_of_memory=self._stats.out_of_memory
            + sum(queue.out_of_memory for queue in self._queues),
        )

    def floor_bytes(self) -> int:
        """Bytes that the next step must read at least: weights, and live keys and values once."""
        needs = frozenset().union(*(row.needs for row in self._rows))
        columns = sum(row.written for row in self._rows)
        columns += sum(len(prefix.tokens) for prefix in self._prefixes)
        return self._pair.weight_bytes(needs) + columns * self._pair.kv_bytes_per_token

    # -- the loop ----------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One token for every live row; returns the rows that are out: finished, or left."""
        start, busy = self._pace.clock(), bool(self._rows or self._waiting)
        if self.clock is not None:
            self.clock.start()
        # 1. Rows whose caller has gone leave, and those whose time is over.
        out = self._leave(start)
        try:
            out += self._advance()
        except torch.OutOfMemoryError:
            failed = True  # dealt with below: in here the failed frames keep their tensors alive
        except BaseException:  # Ctrl-C in a notebook
            self._wait_again()
            raise
        else:
            failed = False
        if failed:
            out += self._make_room()
        else:
            self._calm()
        if busy:
            self._pace.stepped(self._pace.clock() - start)
            self._stats.busy_s += self._pace.clock() - start
        for told in {row.on_token for row in (*self._rows, *out)}:
            if told is not None:
                told()
        return out

    @torch.inference_mode()
    def piece_step(self) -> list[ScoreRow | CaptureRow]:
        """One bounded piece of what waits to be scored or captured, if anything does and it is its
        turn, to be called between steps; returns the rows that are out: done, refused, or left."""
        if (self._rows or self._waiting) and not self._pace.due:
            return []
        for _ in range(len(self._queues)):
            queue = self._queues[0]
            self._queues.rotate()
            if not queue.idle:
                return self._piece(queue)
        return []

    def _piece(self, queue: PieceQueue[Any]) -> list[Any]:
        if self.clock is not None:
            self.clock.start()
        out = queue.step()
        self._lap("score" if queue is self._scoring.queue else "capture")
        return out

    def _advance(self) -> list[Row]:
        # 2. Waiting rows join, as far as slots and memory go.
        self._join()
        self._lap("prefill")
        if not self._rows:
            return []
        if self._layout is None:  # memory ran out while layers changed theirs
            self._lay_out(self._rows, self._prefixes)
        state = self._state or BatchState.of(
            self._rows,
            self._prefixes,
            self.pair.device,
            lanes=self._pair.lanes,
            one_run=self.config.cuda_graphs,
            tie=self._tie,
        )
        self._state = state
        self._lap("bookkeeping")
        # 3. The models read the last token of every row.
        after, before = self._pair.decode(
            state.step_input(self._rows, self._prefixes), state.needs, self._lap
        )
        # 4. The logits are mixed and a token is drawn; one copy to the host.
        tokens, draw = self._draw(after, before, state)
        if draw.close:
            self._decide(draw.close, after, before)
            tokens, draw = self._draw(after, before, state._replace(ties=None))
        self._state = state.advance(tokens)
        self._lap("mix_and_sample")
        self._stats.floor_bytes += self.floor_bytes()
        # 5. Rows take their token; those that are done leave. Nothing here needs memory on the
        # device, so a step that runs out of it has taken nothing and can be done again.
        done = [i for i, row in enumerate(self._rows) if self._take(row, draw, i)]
        finished = [self._rows[i] for i in done]
        self._remove(done)
        self._stats.steps += 1
        self._stats.tokens += len(draw.tokens)
        self._lap("bookkeeping")
        if self.clock is not None:
            self.clock.steps += 1
        return finished

    def _decide(self, close: Sequence[int], after: Tensor | None, before: Tensor | None) -> None:
        """Replaces logits [B, V] of these rows by those of a pass of each row alone: what their
        neighbours' shapes rounded must not decide what is drawn."""
        read: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # greedy samples are equal
        for i in close:
            row = self._rows[i]
            tokens = (*row.request.prompt_ids, *row.token_ids)
            if tokens not in read:
                read[tokens] = self._pair.alone(tokens)
            for logits, own in zip((after, before), read[tokens], strict=True):
                if logits is not None:
                    logits[i] = own
        self._stats.ties += len(close)

    def _lap(self, stage: str) -> None:
        if self.clock is not None:
            self.clock.lap(stage)

    def _leave(self, now: float) -> list[Row]:
        gone = [i for i, row in enumerate(self._rows) if row.left or row.deadline <= now]
        out = [self._rows[i] for i in gone]
        self._remove(gone)
        if waiting := [row for row in self._waiting if row.left or row.deadline <= now]:
            out += waiting
            gone_too = set(waiting)
            self._waiting = deque(row for row in self._waiting if row not in gone_too)
        for row in out:
            if not row.left:
                self._end_at_deadline(row)
        return out

    def _end_at_deadline(self, row: Row) -> None:
        self._stats.overdue += 1
        if row.token_ids:
            row.completion = self._complete(row, "length")
        else:  # nobody may take it for an empty text
            row.refused = Overdue("still waiting for a slot at its deadline")
            row.completion = self._complete(row, "error", str(row.refused))

    # -- joining -----------------------------------------------------------------------

    def _join(self) -> None:
        """First come, first served: a row that does not fit yet holds back those behind it."""
        free = self._most_rows - len(self._rows)
        # A prefill interrupts everyone, so it waits until it is worth it.
        worth_it = not self._rows or free >= len(self._waiting) or free >= self._most_rows // 8
        if not (self._waiting and free > 0 and worth_it):
            return
        new = self._joining
        prefixes = {prefix.tokens: prefix for prefix in self._prefixes}
        own, longest = _extent(self._rows, self._prefixes)
        while self._waiting and len(new) < free:
            row = self._waiting[0]
            tokens = row.request.prompt_ids[:-1] if self._pair.shares_prefixes else ()
            rows = len(self._rows) + len(new) + 1
            wider = max(own, row.request.columns - len(tokens))
            longer = max(longest, len(tokens))
            count = len(prefixes.keys() | {tokens}) if self._pair.shares_prefixes else 0
            if rows * wider + count * longer > self.kv_tokens:
                break
            if self._pair.shares_prefixes:
                row.prefix = prefixes.setdefault(tokens, Prefix(tokens))
            own, longest = wider, longer
            new.append(self._waiting.popleft())
        if not new:
            return
        live = list(prefixes.values())
        self._lay_out(self._rows + new, live)
        self._pair.clear(len(self._rows), len(self._rows) + len(new))
        self._pair.clear(len(self._prefixes), len(live), prefix=True)
        self._fill(new, live)
        for row in new:
            if row.prefix is not None:
                row.prefix.rows += 1
        self._rows += new
        self._prefixes = live
        self._joining, self._state = [], None

    def _lay_out(self, rows: Sequence[Row], prefixes: Sequence[Prefix]) -> None:
        """Room for these rows and prefixes, which are within the budget."""
        needs: Roles = frozenset().union(*(row.needs for row in rows))
        own, longest = _extent(rows, prefixes)
        now = self._layout
        if (
            now is not None
            and len(rows) <= now.slots
            and own <= now.columns
            and len(prefixes) <= now.prefixes
            and longest <= now.prefix_columns
            and self._pair.fits(needs)
        ):
            return
        self._layout = None  # while layers differ
        for prefix in self._prefixes:  # a lane that goes takes what was in it along
            prefix.roles &= self._pair.held(needs)
        new = self._new_layout(len(rows), own, len(prefixes), longest)
        kept = Kept(
            rows=len(self._rows),
            columns=max((row.written for row in self._rows), default=0),
            prefixes=len(self._prefixes),
            prefix_columns=max((len(p.tokens) for p in self._prefixes), default=0),
        )
        self._pair.layout(new, needs, kept)
        self._layout = new

    def _new_layout(self, rows: int, own: int, prefixes: int, longest: int) -> Layout:
        """With room to spare where the budget has it, as many slots as it has."""
        columns, prefix_columns = (-(-x // _COLUMN_STEP) * _COLUMN_STEP for x in (own, longest))
        spare = max(_PREFIX_SLOTS, 2 * prefixes) if prefixes else 0
        choices = (
            (columns, spare, prefix_columns),
            (columns, prefixes, prefix_columns),
            (own, prefixes, longest),
        )
        for columns, prefixes, prefix_columns in choices:
            slots = (self.kv_tokens - prefixes * prefix_columns) // columns
            if slots >= rows:
                break
        return Layout((), min(self.config.max_slots, slots), columns, prefixes, prefix_columns)

    def _fill(self, new: Sequence[Row], live: Sequence[Prefix]) -> None:
        """Each distinct prompt of the new rows is read once, all but its last token: that is the
        first step's. What a live row has had read already is there."""
        wanted: dict[tuple[int, ...], Wanted] = {}
        for slot, row in enumerate(new, start=len(self._rows)):
            tokens, prefix = row.request.prompt_ids[:-1], row.prefix
            before = wanted.get(tokens, Wanted(tokens, [], frozenset()))
            slots = [*before.slots, slot] if prefix is None else [live.index(prefix)]
            wanted[tokens] = Wanted(tokens, slots, before.roles | row.needs)
        there = {prefix.tokens: prefix.roles for prefix in live}
        todo = [
            want._replace(roles=want.roles - there.get(tokens, frozenset()))
            for tokens, want in wanted.items()
            if tokens  # a prompt of one token has no prefix
        ]
        read = self._pair.fill(
            [want for want in todo if want.roles], prefix=self._pair.shares_prefixes
        )
        self._stats.prefix_lookups += len(todo)
        self._stats.prefix_hits += len(todo) - read
        for prefix in live:
            if prefix.tokens in wanted:
                prefix.roles |= wanted[prefix.tokens].roles

    # -- leaving -----------------------------------------------------------------------

    def _take(self, row: Row, draw: Draw, i: int) -> bool:
        """Appends the drawn token to its row; True if the row is done."""
        request = row.request
        if draw.failed[i]:
            row.completion = self._complete(row, "error", "logits are not finite")
            return True
        token = draw.tokens[i]
        row.token_ids.append(token)
        if request.wants_logprobs:
            row.logprobs.append(draw.logprobs[i])
        if request.grid:
            row.normalisers.append(draw.normalisers[i][: len(request.grid)])
            if request.reshaped:
                row.drawn.append(draw.drawn[i][: len(request.grid)])
        if request.watch:
            row.watched.append(draw.watched[i][: len(request.watch)])
        if request.top_logprobs:
            ids, values = _halves(draw.top[i])
            best = zip(map(int, ids), values, strict=True)
            row.top.append(list(islice(best, request.top_logprobs)))
        if request.kl:
            row.kl.append(draw.kl[i][0])
        if row.eos_index is None and token in self.pair.eos_ids:
            row.eos_index = len(row.token_ids) - 1
            if not request.ignore_eos:
                row.completion = self._complete(row, "eos")
                return True
        tokenizer = self.pair.tokenizer
        if request.stop and hits_stop(tokenizer, request, row.token_ids, row.eos_index):
            row.completion = self._complete(row, "stop")
        elif len(row.token_ids) == request.max_new_tokens:
            row.completion = self._complete(row, "length")
        return row.completion is not None

    def _complete(self, row: Row, reason: FinishReason, error: str | None = None) -> Completion:
        request = row.request
        text = completion_text(self.pair.tokenizer, request, row.token_ids, row.eos_index)
        if reason == "stop":
            floor = stop_floor(self.pair.tokenizer, request, row.token_ids)
            text = cut_at_stop(text, request.stop, floor)
        elif reason == "length":
            # Half a character at the end is not text; its bytes stay in token_ids.
            whole = text.text.rstrip("\ufffd")
            offset = text.eos_offset
            text = Text(whole, offset if offset is None else min(offset, len(whole)))
        logprobs = densities = ends = None
        if request.wants_logprobs:
            columns = list(zip(*row.logprobs, strict=True)) or [(), (), ()]
            logprobs = TokenLogprobs(*(list(column) for column in columns))
            ends = token_ends(self._pieces, request, row.token_ids, row.eos_index, text.text)
        if request.grid:
            drawn = [list(x) for x in row.drawn] if request.reshaped else None
            densities = Densities(list(request.grid), [list(x) for x in row.normalisers], drawn)
        return Completion(
            text=text.text,
            token_ids=row.token_ids,
            finish_reason=reason,
            eos_index=row.eos_index,
            eos_text_offset=text.eos_offset,
            seed=request.seed,
            alpha=request.alpha,
            prompt_tokens=len(request.prompt_ids),
            logprobs=logprobs,
            error=error,
            densities=densities,
            watched=[list(x) for x in row.watched] if request.watch else None,
            token_ends=ends,
            top_logprobs=[list(x) for x in row.top] if request.top_logprobs else None,
            kl=list(row.kl) if request.kl else None,
        )

    def _remove(self, gone: Sequence[int]) -> None:
        """Takes rows out; the last row moves into each hole, so that slots stay dense."""
        for i in sorted(gone, reverse=True):
            row, last = self._rows[i], self._rows.pop()
            if i < len(self._rows):
                self._pair.move(len(self._rows), i, last.written)
                self._rows[i] = last
            if row.prefix is not None:
                self._release(row.prefix)
                row.prefix = None
        if gone:
            self._state = None

    def _release(self, prefix: Prefix) -> None:
        """One row less reads it; after the last one its slot is filled by the last prefix."""
        prefix.rows -= 1
        if prefix.rows:
            return
        i, last = self._prefixes.index(prefix), self._prefixes.pop()
        if i < len(self._prefixes):
            self._pair.move(len(self._prefixes), i, len(last.tokens), prefix=True)
            self._prefixes[i] = last

    # -- memory ------------------------------------------------------------------------

    def _calm(self) -> None:
        """After a step that found its memory."""
        self._failures = 0
        self._calm_steps += 1
        if self._calm_steps >= _CALM_STEPS:
            self._calm_steps = 0
            self._most_rows = min(self.config.max_slots, 2 * self._most_rows)

    def _make_room(self) -> list[Row]:
        """After running out of memory: new rows wait again, and fewer decode together from now on.

        The live rows go on where they were. If they alone run out of memory again, half of them
        start again later: nothing is lost and no text changes, because a token's noise depends on
        its row and step alone. A row that is alone and cannot be helped is refused.
        """
        self._stats.out_of_memory += 1
        self._failures += 1
        self._calm_steps = 0
        new = self._wait_again()
        self._pair.give_back()
        for queue in self._queues:
            queue.put_back()
        gc.collect()
        torch.cuda.empty_cache()
        tried = len(self._rows) + len(new)
        self._most_rows = max(1, tried // 2)
        if self._failures < 2:
            return []
        if tried == 1:
            return [self._refuse(new)]
        if not new:
            self._restart(self._rows[len(self._rows) // 2 :])
        return []

    def _wait_again(self) -> list[Row]:
        """Rows that were about to join wait as before, and are returned."""
        new, self._joining, self._state = self._joining, [], None
        for row in new:
            row.prefix = None
        self._waiting.extendleft(reversed(new))
        return new

    def _refuse(self, new: Sequence[Row]) -> Row:
        """The only row, which memory ran out with twice."""
        row = self._waiting.popleft() if new else self._rows[0]
        if not new:
            self._remove([0])
        prompt, tokens = len(row.request.prompt_ids), row.request.max_new_tokens
        row.refused = DoesNotFit(
            "max_new_tokens",
            f"out of memory: {prompt} prompt tokens and {tokens} new ones, alone, do not fit",
        )
        row.completion = self._complete(row, "error", row.refused.message)
        self._most_rows = self.config.max_slots  # it was this row
        self._failures = 0
        return row

    def _restart(self, rows: Sequence[Row]) -> None:
        """These rows, the last ones, leave their slots and wait again from their first token."""
        rows = list(rows)
        self._remove(range(len(self._rows) - len(rows), len(self._rows)))
        for row in rows:
            row.restart()
        self._waiting.extendleft(reversed(rows))
        self._failures = 0

    def _budget(self) -> Budget:
        """What of the memory is for what. On a GPU by the rule of `lda_core.memory`, of what is
        free after loading. Raises ConfigError if nothing is left for keys and values."""
        pool = self.config.prefix_pool_bytes
        by_device = self._pair.kv_bytes_by_device()
        activations = self._activations(len(by_device))
        if self.pair.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            free = {device: torch.cuda.mem_get_info(device)[0] for device in by_device}
            pool = memory.prefix_pool_bytes(pool, min(free.values()))
            tokens = min(
                memory.budget(
                    free[device],
                    weights=0,
                    activations=activations,
                    prefix_pool=pool,
                    kv_per_token=per_token,
                    reserve=0,
                ).kv_tokens
                for device, per_token in by_device.items()
            )
        else:
            pool = _CPU_POOL_BYTES if pool is None else pool
            tokens = _CPU_KV_BYTES // sum(by_device.values())
        tokens = self.config.kv_tokens or min(self.config.max_slots * self.context_length, tokens)
        if tokens < 1:
            raise ConfigError(
                f"kv_tokens: no memory is left for keys and values on {self.pair.device}"
            )
        weights = memory.pair_bytes(self.pair.after, self.pair.before)
        return Budget(weights, activations, pool, sum(by_device.values()), tokens)

    def _activations(self, devices: int) -> int:
        """Bytes of the larger model's prefill piece or step."""
        models = 1 if self.pair.stacked is not None or devices > 1 else 2
        return max(
            memory.activation_bytes(
                model.config,
                vocab=self.pair.vocab_size,
                rows=self.config.max_slots,
                prefill_tokens=self.config.prefill_tokens,
                dtype_bytes=model.dtype.itemsize,
                models=models,
            )
            for model in (self.pair.after, self.pair.before)
        )


def _halves(values: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    middle = len(values) // 2
    return values[:middle], values[middle:]


def _extent(rows: Sequence[Row], prefixes: Sequence[Prefix]) -> tuple[int, int]:
    """Columns of the longest row's own slot when it is done, and of the longest prefix."""
    return (
        max((row.own_columns for row in rows), default=0),
        max((len(prefix.tokens) for prefix in prefixes), default=0),
    )
