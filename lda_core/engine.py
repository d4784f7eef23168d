"""The engine: both models decode every row in lockstep, rows join and leave at any step.

`step` is the system in a few lines. A row's tokens depend on its request alone: not on its
neighbours, its slot, or when it joined.

Shapes: B live rows, V common vocabulary.
"""

import gc
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lda_core.amplify import amplify, nonfinite_rows
from lda_core.config import EngineConfig
from lda_core.detokenize import Text, completion_text, cut_at_stop, hits_stop
from lda_core.errors import ConfigError, ContextLengthExceeded, DoesNotFit, RequestError
from lda_core.model_runner import ModelRunner, kv_bytes_per_token
from lda_core.pair import ModelPair
from lda_core.request import Completion, FinishReason, Request, TokenLogprobs
from lda_core.sampling import Sampling, sample

# Slots are laid out in steps of this many columns, so that a slightly longer row seldom
# moves everything.
_COLUMN_STEP = 64
# Key/value memory where the config names none: on a CPU at most this much of it,
_CPU_KV_BYTES = 2 * 1024**3
# on a GPU this share of what is free after loading (the rest is for activations).
_GPU_KV_SHARE = 0.85
# After running out of memory fewer rows decode together; twice as many again after so many steps
# without. Seldom, because each try that fails makes all rows start again.
_CALM_STEPS = 4096


@dataclass(eq=False)
class Row:
    """One request on its way through the engine, from `Engine.accept`.

    Setting `left` (any thread may) takes it out at the next step, without a completion.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, float, float]] = field(default_factory=list)
    eos_index: int | None = None
    left: bool = False
    too_large: bool = False  # memory ran out with this row alone
    completion: Completion | None = None

    @property
    def length(self) -> int:
        """Columns written so far, and so the column of the token that is read next."""
        return len(self.request.prompt_ids) - 1 + len(self.token_ids)


class BatchState(NamedTuple):
    """What a step needs of every live row, on the device; all [B]. Rebuilt when rows change."""

    tokens: Tensor
    lengths: Tensor
    step: Tensor
    alpha: Tensor
    sampling: Sampling

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Self:
        def ints(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.long, device=device)

        def floats(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float32, device=device)

        requests = [row.request for row in rows]
        return cls(
            tokens=ints((row.token_ids or row.request.prompt_ids)[-1] for row in rows),
            lengths=ints(row.length for row in rows),
            step=ints(len(row.token_ids) for row in rows),
            alpha=floats(r.alpha for r in requests),
            sampling=Sampling(
                temperature=floats(r.temperature for r in requests),
                top_p=floats(r.top_p for r in requests),
                top_k=ints(r.top_k for r in requests),
                seed=ints(r.seed for r in requests),
            ),
        )

    def advance(self, tokens: Tensor) -> Self:
        return self._replace(tokens=tokens, lengths=self.lengths + 1, step=self.step + 1)


class Draw(NamedTuple):
    """One step's outcome on the host, one entry per row."""

    tokens: list[int]
    logprobs: list[tuple[float, float, float]]  # after, before, amplified
    failed: list[bool]  # logits were not finite


class Engine:
    """Decodes requests on a pair. Not thread-safe: `EngineThread` is, on top of it."""

    def __init__(self, pair: ModelPair, config: EngineConfig | None = None) -> None:
        self.pair = pair
        self.config = config or EngineConfig()
        self.context_length = min(
            pair.context_length, self.config.context_length or pair.context_length
        )
        self.kv_tokens = self.config.kv_tokens or self._default_kv_tokens()
        with torch.inference_mode():
            self._after = ModelRunner(pair.after, self.kv_tokens)
            self._before = ModelRunner(pair.before, self.kv_tokens)
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []  # row i lives in slot i
        self._state: BatchState | None = None
        self._joining: list[Row] = []  # taken from those waiting, not yet in a slot
        self._slots, self._columns = 0, 0  # the present layout
        self._most_rows = self.config.max_slots  # fewer for a while after running out of memory
        self._calm_steps = 0

    # -- what callers do ---------------------------------------------------------------

    def accept(self, request: Request) -> Row:
        """The request as a row to `enqueue`. Raises RequestError if it can never be served.

        Any thread may call this. A row is a checked request: past here nothing is checked again.
        """
        prompt, vocab = request.prompt_ids, self.pair.vocab_size
        if not all(0 <= token < vocab for token in prompt):
            raise RequestError("prompt", f"token ids must be between 0 and {vocab - 1}")
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
        return Row(request)

    def enqueue(self, row: Row) -> None:
        self._waiting.append(row)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Completions in the order of the requests. Raises RequestError before any work.

        A row whose logits are not finite comes back with finish_reason "error".
        """
        rows = [self.accept(request) for request in requests]
        for row in rows:
            self.enqueue(row)
        try:
            while not self.idle:
                self.step()
        except BaseException:  # Ctrl-C in a notebook: the next call must not decode these along
            for row in rows:
                row.left = True
            raise
        return [row.completion for row in rows if row.completion is not None]

    @property
    def idle(self) -> bool:
        return not (self._rows or self._waiting)

    @property
    def live_rows(self) -> int:
        return len(self._rows)

    # -- the loop ----------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One token for every live row; returns the rows that are out: finished, or left."""
        # 1. Rows whose caller has gone leave.
        out = self._leave()
        self._calm_steps += 1
        if self._calm_steps >= _CALM_STEPS:
            self._calm_steps = 0
            self._most_rows = min(self.config.max_slots, 2 * self._most_rows)
        try:
            return out + self._advance()
        except torch.OutOfMemoryError:
            pass  # dealt with below: in here the failed frames keep their tensors alive
        return out + self._make_room()

    def _advance(self) -> list[Row]:
        # 2. Waiting rows join, as far as slots and memory go.
        self._join()
        if not self._rows:
            return []
        state = self._state or BatchState.of(self._rows, self.pair.device)
        # 3. Both models read the last token of every row.
        width = max(row.length for row in self._rows) + 1
        after = self._after.decode_step(state.tokens, state.lengths, width)
        before = self._before.decode_step(state.tokens, state.lengths, width)
        # 4. The logits are mixed and a token is drawn; one copy to the host.
        tokens, draw = self._draw(after, before, state)
        self._state = state.advance(tokens)
        # 5. Rows take their token; those that are done leave.
        done = [i for i, row in enumerate(self._rows) if self._take(row, draw, i)]
        finished = [self._rows[i] for i in done]
        for i in (i for i in done if draw.failed[i]):
            for runner in (self._after, self._before):
                runner.slots.clear(i)
        self._remove(done)
        return finished

    def _leave(self) -> list[Row]:
        gone = [i for i, row in enumerate(self._rows) if row.left]
        out = [self._rows[i] for i in gone]
        self._remove(gone)
        if waiting := [row for row in self._waiting if row.left]:
            self._waiting = deque(row for row in self._waiting if not row.left)
        return out + waiting

    def _join(self) -> None:
        """First come, first served: a row that does not fit yet holds back those behind it."""
        free = self._most_rows - len(self._rows)
        # A prefill interrupts everyone, so it waits until it is worth it.
        worth_it = not self._rows or free >= len(self._waiting) or free >= self._most_rows // 8
        if not (self._waiting and free and worth_it):
            return
        new = self._joining
        columns = max((row.request.columns for row in self._rows), default=0)
        while self._waiting and len(new) < free:
            wider = max(columns, self._waiting[0].request.columns)
            if (len(self._rows) + len(new) + 1) * wider > self.kv_tokens:
                break
            columns = wider
            new.append(self._waiting.popleft())
        if not new:
            return
        self._layout(len(self._rows) + len(new), columns)
        self._prefill(new)
        self._rows += new
        self._joining, self._state = [], None

    def _make_room(self) -> list[Row]:
        """After running out of memory every row starts again, in half as many slots.

        Nothing is lost and no text changes, because a token's noise depends on its row and step
        alone. A row that was alone twice cannot be helped and ends in an error.
        """
        rows = self._rows + self._joining
        self._rows, self._joining, self._state = [], [], None
        self._slots = self._columns = self._calm_steps = 0  # what the slots hold is void
        for runner in (self._after, self._before):
            runner.slots.reset()
        gc.collect()
        torch.cuda.empty_cache()
        if len(rows) == 1:
            if rows[0].too_large:
                rows[0].completion = self._complete(rows[0], "error", "out of memory")
                self._most_rows = self.config.max_slots  # it was this row
                return rows
            rows[0].too_large = True
        self._most_rows = max(1, len(rows) // 2)
        for row in rows:
            row.token_ids, row.logprobs, row.eos_index = [], [], None
        self._waiting.extendleft(reversed(rows))
        return []

    def _layout(self, rows: int, columns: int) -> None:
        """Room for `rows` slots of `columns`; rows * columns is within the budget."""
        if rows <= self._slots and columns <= self._columns:
            return
        rounded = -(-columns // _COLUMN_STEP) * _COLUMN_STEP
        self._columns = rounded if rows * rounded <= self.kv_tokens else columns
        self._slots = min(self.config.max_slots, self.kv_tokens // self._columns)
        used = max((row.length for row in self._rows), default=0)
        for runner in (self._after, self._before):
            runner.slots.layout(self._slots, self._columns, len(self._rows), used)

    def _prefill(self, new: Sequence[Row]) -> None:
        """Reads each distinct prompt once, all but its last token: that is the first step's."""
        targets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for slot, row in enumerate(new, start=len(self._rows)):
            targets[row.request.prompt_ids[:-1]].append(slot)
        targets.pop((), None)  # a prompt of one token has nothing to prefill
        # Similar lengths together: less padding.
        piece: list[tuple[int, ...]] = []
        for prefix in sorted(targets, key=len):
            if piece and (len(piece) + 1) * len(prefix) > self.config.prefill_tokens:
                self._prefill_piece(piece, targets)
                piece = []
            piece.append(prefix)
        if piece:
            self._prefill_piece(piece, targets)

    def _prefill_piece(
        self, prefixes: Sequence[tuple[int, ...]], targets: dict[tuple[int, ...], list[int]]
    ) -> None:
        for runner in (self._after, self._before):
            runner.prefill(prefixes, [targets[prefix] for prefix in prefixes])

    def _draw(self, after: Tensor, before: Tensor, state: BatchState) -> tuple[Tensor, Draw]:
        """[B, V+], [B, V+] logits -> tokens [B] on the device, and everything on the host."""
        vocab = self.pair.vocab_size
        after, before = after[:, :vocab].float(), before[:, :vocab].float()  # (B, V)
        mixed = amplify(after, before, state.alpha)
        norms = [logits.logsumexp(dim=-1) for logits in (after, before, mixed)]
        failed = nonfinite_rows(*norms)  # (B,)
        drawable = torch.where(failed.unsqueeze(-1), 0.0, mixed)  # a failed row draws nothing real
        tokens = sample(drawable, state.sampling, state.step)
        picked = tokens.unsqueeze(-1)
        logprobs = [
            logits.gather(-1, picked).squeeze(-1) - norm
            for logits, norm in zip((after, before, mixed), norms, strict=True)
        ]
        # One transfer. Token ids and float32 values are both exact in float64.
        columns = torch.stack([tokens.double(), failed.double(), *(p.double() for p in logprobs)])
        ids, bad, *values = columns.tolist()
        return tokens, Draw(
            tokens=[int(i) for i in ids],
            logprobs=list(zip(*values, strict=True)),
            failed=[bool(b) for b in bad],
        )

    def _take(self, row: Row, draw: Draw, i: int) -> bool:
        """Appends the drawn token to its row; True if the row is done."""
        request = row.request
        if draw.failed[i]:
            row.completion = self._complete(row, "error", "logits are not finite")
            return True
        token = draw.tokens[i]
        row.token_ids.append(token)
        if request.logprobs:
            row.logprobs.append(draw.logprobs[i])
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
            text = cut_at_stop(text, request.stop)
        elif reason == "length":
            # Half a character at the end is not text; its bytes stay in token_ids.
            whole = text.text.rstrip("\ufffd")
            offset = text.eos_offset
            text = Text(whole, offset if offset is None else min(offset, len(whole)))
        logprobs = None
        if request.logprobs:
            columns = list(zip(*row.logprobs, strict=True)) or [(), (), ()]
            logprobs = TokenLogprobs(*(list(column) for column in columns))
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
        )

    def _remove(self, gone: Sequence[int]) -> None:
        """Takes rows out; the last row moves into each hole, so that slots stay dense."""
        for i in sorted(gone, reverse=True):
            last = self._rows.pop()
            if i < len(self._rows):
                for runner in (self._after, self._before):
                    runner.slots.move(len(self._rows), i, last.length)
                self._rows[i] = last
        if gone:
            self._state = None

    def _default_kv_tokens(self) -> int:
        per_token = kv_bytes_per_token(self.pair.after) + kv_bytes_per_token(self.pair.before)
        device = self.pair.device
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            memory = int(torch.cuda.mem_get_info(device)[0] * _GPU_KV_SHARE)
            memory -= self.config.prefill_tokens * per_token // 2  # a prefill's own, model by model
        else:
            memory = _CPU_KV_BYTES
        tokens = min(self.config.max_slots * self.context_length, memory // per_token)
        if tokens < 1:
            raise ConfigError(f"kv_tokens: no memory is left for keys and values on {device}")
        return tokens
