"""One model and its slots: passes over prompts, one decode step for every row.

Shapes: B rows, m lanes (2 where one model computes both of a stacked pair), R = B * m rows the
model sees, T tokens, V vocabulary, G prefixes, n rows of the largest group.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lda_core import attention
from lda_core.adapter import Lanes
from lda_core.architectures import decode_mask
from lda_core.request import Role
from lda_core.sharing import decoder_layers
from lda_core.slots import Cursor, Kept, Layout, Run, SlotCache
from lda_core.steering import Push, pushed

_BOTH: tuple[Role, Role] = ("before", "after")  # the order of a stacked model's rows


class StepInput(NamedTuple):
    """One token of every row, and where everything lies. Tensors on the device."""

    tokens: Tensor  # (B,)
    positions: Tensor  # (B,) of these tokens
    prefixes: Tensor  # (B,) length of the row's shared prefix
    width: int  # own columns of the longest row, this token included
    prefix_count: int = 0  # G
    prefix_width: int = 0  # length of the longest shared prefix
    runs: tuple[Run, ...] = ()  # these and place count the lanes
    place: Tensor | None = None  # (B*m,) where each row is in the runs; None: row i has prefix i
    pushes: tuple[Push, ...] = ()  # of rows that are steered

    def to(self, device: torch.device) -> "StepInput":
        if self.tokens.device == device:
            return self
        return self._replace(
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            prefixes=self.prefixes.to(device),
            runs=tuple(run._replace(gather=run.gather.to(device)) for run in self.runs),
            place=None if self.place is None else self.place.to(device),
            pushes=tuple(push._replace(added=push.added.to(device)) for push in self.pushes),
        )


class ModelRunner:
    """Runs one model over slots. Call under torch.inference_mode."""

    def __init__(self, model: PreTrainedModel, role: Role, switch: Lanes | None = None) -> None:
        """`switch`: of a stacked model, which computes both roles."""
        self.roles: tuple[Role, ...] = (role,) if switch is None else _BOTH
        self.lanes: tuple[Role, ...] = self.roles  # which of them the slots hold now
        self._model: Any = model
        self._config: Any = model.config
        self._switch = switch
        self._takes_ours = False
        self._layers = decoder_layers(model)
        self.device = model.device
        self._probe = self._read_one_token()

    @property
    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = self._model
        return model

    def _read_one_token(self) -> DynamicCache:
        """The cache after it: shape, dtype and device of every layer."""
        cache = DynamicCache()
        with self._mode(self.roles[:1]):
            self._model(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device),
                past_key_values=cache,
            )
        return cache

    def kv_bytes_by_device(self) -> dict[torch.device, int]:
        """Of one token, for all the roles this model computes."""
        return {d: len(self.roles) * n for d, n in kv_bytes(self._probe).items()}

    def allocate(self, tokens: int) -> None:
        self.slots = SlotCache(self._probe, tokens * len(self.roles))

    def shares_prefixes(self) -> bool:
        """Whether every layer's attention takes the shared prefix; tried on one token."""
        self._takes_ours = True
        self.slots = SlotCache(self._probe, 2)
        self.layout(Layout((), 1, 1, 1, 1), self.roles[:1], Kept(0, 0, 0, 0))
        one = torch.ones(1, dtype=torch.long, device=self.device)
        try:
            self.decode_step(StepInput(0 * one, one, one, 1, 1, 1))
        except torch.OutOfMemoryError:
            raise
        except (attention.CannotShare, RuntimeError):  # other attention: shapes that do not fit
            self._takes_ours = False
        else:
            layers = len(self.slots.layers) - self.slots.skipped
            self._takes_ours = self.slots.shared_reads == layers
        self.lanes = self.roles
        return self._takes_ours

    def layout(self, layout: Layout, lanes: tuple[Role, ...], kept: Kept) -> None:
        """Lays the slots out anew, with one lane for each of these roles."""
        self.slots.layout(layout._replace(lanes=lanes), kept)
        self.lanes = lanes

    def read(self, ids: Tensor, start: int, roles: Sequence[Role], cache: DynamicCache) -> Any:
        """Reads [P, T] tokens at positions start, start + 1, ... of prompts into `cache`.

        Returns what the model's body says to it, with the last hidden states.

        Causal, without a mask: rows are padded on the right, where no real token can see it.
        For both roles of a stacked model the cache gets [2P] rows, before and after in turn.
        """
        for layer in cache.layers:
            if isinstance(layer, _OtherModels):
                layer.length = start
        if not cache.layers:
            skipped = sum(layer.keys is None for layer in self._probe.layers)
            cache.layers.extend(_OtherModels() for _ in range(skipped))
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        with self._mode(roles):
            ids = ids.repeat_interleave(len(roles), dim=0)
            # The body alone: nobody needs the prompt's logits.
            return self._model.base_model(
                input_ids=ids,
                position_ids=positions.expand_as(ids),
                past_key_values=cache,
                use_cache=True,
            )

    def states(self, output: Any, rows: Tensor, columns: Tensor) -> Tensor:
        """The last hidden states [m, n, D] of n places in what `read` returned."""
        hidden: Tensor = output.last_hidden_state  # (P*m, T, D)
        m = len(self.roles)
        rows, columns = rows.to(hidden.device), columns.to(hidden.device)
        return torch.stack([hidden[rows * m + lane, columns] for lane in range(m)])

    def logits(self, output: Any, hidden: Tensor) -> dict[Role, Tensor]:
        """Hidden states [m, n, D] -> logits [n, V] of each role.

        By the model itself (some scale or cap what their output layer gives) with its body
        replaced; `output`: what `read` returned, for its kind.
        """
        said = replace(output, last_hidden_state=hidden, past_key_values=None)
        with self._mode(self.roles), _says(self._model, said):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            logits = self._model(input_ids=ids, use_cache=False).logits
        return {role: logits[lane] for lane, role in enumerate(self.roles)}

    def decode_step(self, step: StepInput) -> dict[Role, Tensor]:
        """Reads one token of every row -> logits [B, V] of each lane's role."""
        m = len(self.lanes)
        at = _with_lanes(step, m)
        self.slots.cursor = Cursor(
            rows=torch.arange(len(at.tokens), device=at.tokens.device),
            columns=at.positions - at.prefixes,
            width=at.width,
            prefixes=at.prefix_count,
            prefix_width=at.prefix_width,
            runs=at.runs,
            place=at.place,
        )
        with self._mode(self.lanes), self._attention() as options, self._steered(step.pushes):
            output = self._model(
                input_ids=at.tokens.unsqueeze(-1),
                position_ids=at.positions.unsqueeze(-1),
                attention_mask=decode_mask(
                    self._config, at.positions, at.prefixes, at.prefix_width, at.width
                ),
                past_key_values=self.slots,
                use_cache=True,
                **options,
            )
        logits: Tensor = output.logits[:, -1]
        return {role: logits[lane::m] for lane, role in enumerate(self.lanes)}

    def _steered(self, pushes: Sequence[Push]) -> AbstractContextManager[None]:
        mine = [push for push in pushes if push.role in self.lanes]
        if not mine:
            return nullcontext()
        assert self._layers is not None
        return pushed(self._layers, mine, self.lanes)

    @property
    def steerable(self) -> bool:
        """Whether its layers are in one of the usual places."""
        return self._layers is not None

    def weights_read(self) -> dict[int, int]:
        """Bytes by address of the parameters a decode step reads whole: not the embedding's
        table, unless the output layer is tied to it."""
        table = self._model.get_input_embeddings().weight
        head = self._model.get_output_embeddings().weight
        return {
            p.data_ptr(): p.numel() * p.element_size()
            for p in self._model.parameters()
            if p is not table or p is head
        }

    def _mode(self, roles: Sequence[Role]) -> Any:
        if self._switch is None:
            return nullcontext()
        return self._switch.use("both" if len(roles) == 2 else roles[0])

    @contextmanager
    def _attention(self) -> Iterator[dict[str, Any]]:
        """Ours, also where nothing is shared (on a CPU it is faster than sdpa with a mask), or
        the model's own, where it does not take another."""
        if not self._takes_ours:
            yield {}
            return
        own = self._config._attn_implementation
        self._config._attn_implementation = attention.NAME
        try:
            yield {"slots": self.slots}
        finally:
            self._config._attn_implementation = own


@contextmanager
def _says(model: Any, output: Any) -> Iterator[None]:
    """Within it the model's body returns just this, whatever it is asked."""
    body = model.base_model
    body = getattr(body, "decoder", body)  # OPT's output layer looks past its body
    own = body.__dict__.get("forward")
    body.forward = lambda *args, **options: output
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


class _OtherModels(DynamicLayer):  # type: ignore[misc]
    """In a prompt's cache: a layer that the other model computes. It has a length and no keys."""

    length = 0

    def get_seq_length(self) -> int:
        return self.length


def _with_lanes(step: StepInput, m: int) -> StepInput:
    """The same step for a model that sees m rows for every row, lane by lane in turn."""
    if m == 1:
        return step
    return step._replace(
        tokens=step.tokens.repeat_interleave(m),
        positions=step.positions.repeat_interleave(m),
        prefixes=step.prefixes.repeat_interleave(m),
        prefix_count=step.prefix_count * m,
    )


def kv_bytes(cache: DynamicCache) -> Counter[torch.device]:
    """Bytes that one token takes in the cache of a forward pass, by device."""
    total: Counter[torch.device] = Counter()
    for layer in cache.layers:
        if layer.keys is not None:
            for x in (layer.keys, layer.values):
                total[x.device] += x.shape[1] * x.shape[3] * x.element_size()
    return total


@torch.inference_mode()
def probe_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache after reading one token: shape, dtype and device of every layer."""
    cache = DynamicCache()
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    return cache


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that one token takes in the model's key/value cache, all layers together."""
    return kv_bytes(probe_cache(model)).total()
