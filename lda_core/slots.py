"""Slots: a preallocated key/value cache in which every row lives at its own length.

A row's prefix (its prompt but for the last token) lies in a prefix slot that all rows with the
same prompt share; what follows lies in the row's own slot, from column 0 on. Where an
architecture cannot share, the own slot begins with a copy of the prefix. Nothing is padded on
the left. Live rows fill slots 0..B-1 and live prefixes prefix slots 0..G-1, without gaps.

The memory is one fixed budget of tokens, laid out as slots x columns from its beginning and
prefix slots x prefix columns from its end, and laid out anew when others are needed.

A stacked pair has two lanes: every slot holds the row's columns of both models, one after the
other, and the model sees two rows for every row.

Shapes: m lanes, H key/value heads, L own columns, P prefix columns, D head size, B live rows,
G live prefixes; of a run: g prefixes, n rows of the largest of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

# One prefix's keys and values in one model, layer by layer: each [H, T, D].
PrefixKV = list[tuple[Tensor, Tensor]]


class Layout(NamedTuple):
    """How the memory is divided."""

    lanes: tuple[str, ...] = ("",)  # the models whose columns a slot holds
    slots: int = 0
    columns: int = 0
    prefixes: int = 0
    prefix_columns: int = 0


class Kept(NamedTuple):
    """What a new layout must keep: the first so many of everything."""

    rows: int
    columns: int
    prefixes: int
    prefix_columns: int


class Run(NamedTuple):
    """Neighbouring prefixes with about as many rows each, which attention takes together."""

    start: int  # prefixes start..stop-1, lanes counted
    stop: int
    gather: Tensor  # (g*n,) their rows, prefix by prefix, padded to the largest


class Cursor(NamedTuple):
    """Where the next token of each live row goes and what it sees; shared by a cache's layers."""

    rows: Tensor  # (B*m,) slot and lane of each row the model sees
    columns: Tensor  # (B*m,) own column that the row's next token goes to
    width: int  # own columns that attention looks at: the longest row's
    prefixes: int = 0  # G*m prefixes that attention looks at
    prefix_width: int = 0  # their columns: the longest prefix's
    runs: tuple[Run, ...] = ()
    place: Tensor | None = None  # (B*m,) where each row is in the runs; None: row i has prefix i


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: own [S*m, H, L, D] and prefixes [G*m, H, P, D]."""

    def __init__(self, cache: "SlotCache", key: Tensor, value: Tensor, tokens: int) -> None:
        """`key`, `value` [1, H, T, D]: any real ones, for their shape, dtype and device."""
        super().__init__()
        self._cache = cache
        self._layout = Layout()
        self._flat = [x.new_empty(tokens * x.shape[1] * x.shape[3]) for x in (key, value)]
        self._heads = [(x.shape[1], x.shape[3]) for x in (key, value)]
        self._view(self._layout)
        self.is_initialized = True

    def _view(self, layout: Layout) -> None:
        def own(flat: Tensor, h: int, d: int) -> Tensor:
            shape = (layout.slots * len(layout.lanes), h, layout.columns, d)
            return flat[: shape[0] * h * shape[2] * d].view(shape)

        def prefix(flat: Tensor, h: int, d: int) -> Tensor:
            shape = (layout.prefixes * len(layout.lanes), h, layout.prefix_columns, d)
            return flat[len(flat) - shape[0] * h * shape[2] * d :].view(shape)

        both = list(zip(self._flat, self._heads, strict=True))
        self.keys, self.values = (own(flat, *heads) for flat, heads in both)
        self.prefix_keys, self.prefix_values = (prefix(flat, *heads) for flat, heads in both)
        self._layout = layout

    def layout(self, new: Layout, kept: Kept) -> None:
        """Views the buffers anew. If memory for the copies fails, nothing has changed."""
        old = self._layout
        if new == old:
            return
        both = [lane for lane in old.lanes if lane in new.lanes]
        old_lanes = [old.lanes.index(lane) for lane in both]

        def parts(at: Layout) -> list[Tensor]:
            own = [x.view(at.slots, len(at.lanes), *x.shape[1:]) for x in self._own]
            prefix = [x.view(at.prefixes, len(at.lanes), *x.shape[1:]) for x in self._prefix]
            return [
                *(x[: kept.rows, ..., : kept.columns, :] for x in own),
                *(x[: kept.prefixes, ..., : kept.prefix_columns, :] for x in prefix),
            ]

        saved = [x[:, old_lanes] for x in parts(old)]  # copies
        self._view(new)
        # What is not kept may be NaN; slots that nobody has yet are cleared when they are taken.
        self.clear(0, kept.rows, prefix=False)
        self.clear(0, kept.prefixes, prefix=True)
        for target, source in zip(parts(new), saved, strict=True):
            for i, lane in enumerate(both):
                target[:, new.lanes.index(lane)] = source[:, i]

    @property
    def _own(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    @property
    def _prefix(self) -> tuple[Tensor, Tensor]:
        return self.prefix_keys, self.prefix_values

    def update(self, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        """Writes one token per row, [B*m, H, 1, D], and returns the own columns to look at."""
        at = self._cache.cursor
        rows, columns = at.rows.to(key.device), at.columns.to(key.device)
        self.keys[rows, :, columns] = key[:, :, 0]
        self.values[rows, :, columns] = value[:, :, 0]
        live = key.shape[0]
        return self.keys[:live, :, : at.width], self.values[:live, :, : at.width]

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the live prefixes, each [G*m, H, P, D]."""
        at = self._cache.cursor
        return (
            self.prefix_keys[: at.prefixes, :, : at.prefix_width],
            self.prefix_values[: at.prefixes, :, : at.prefix_width],
        )

    def fill(self, slot: int, lane: int, source: tuple[Tensor, Tensor], *, prefix: bool) -> None:
        """Copies a prefix's keys and values [H, T, D] to the beginning of a slot."""
        for target, x in zip(self._prefix if prefix else self._own, source, strict=True):
            target[slot * len(self._layout.lanes) + lane, :, : x.shape[1]] = x

    def move(self, source: int, target: int, used: int, *, prefix: bool) -> None:
        """Slot `target` becomes a copy of slot `source`'s first `used` columns, then zeros."""
        m = len(self._layout.lanes)
        for x in self._prefix if prefix else self._own:
            x[target * m : (target + 1) * m, :, :used] = x[source * m : (source + 1) * m, :, :used]
            x[target * m : (target + 1) * m, :, used:] = 0

    def clear(self, start: int, stop: int, *, prefix: bool) -> None:
        m = len(self._layout.lanes)
        for x in self._prefix if prefix else self._own:
            x[start * m : stop * m] = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass  # the buffers exist from the start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.cursor.width, 0

    def get_seq_length(self) -> int:
        return self._cache.cursor.width - 1

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class SlotCache(Cache):  # type: ignore[misc]
    """The slots of one model, in the form transformers' attention layers write to."""

    def __init__(self, probe: DynamicCache, tokens: int) -> None:
        """`probe`: the cache of any short forward pass, which knows every layer's shape.

        Layers it holds nothing for (they are computed by the other model) get no memory.
        """
        filled = [layer for layer in probe.layers if layer.keys is not None]
        nowhere = filled[0].keys.new_empty(0, dtype=torch.long)
        self.cursor = Cursor(nowhere, nowhere, width=0)
        self.shared_reads = 0  # layers that have read a shared prefix, ever
        self.skipped = len(probe.layers) - len(filled)
        super().__init__(
            layers=[
                SlotLayer(self, filled[0].keys, filled[0].values, 0) for _ in range(self.skipped)
            ]
            + [SlotLayer(self, layer.keys, layer.values, tokens) for layer in filled]
        )

    @property
    def _real(self) -> list[SlotLayer]:
        layers: list[SlotLayer] = self.layers[self.skipped :]
        return layers

    def layout(self, new: Layout, kept: Kept) -> None:
        """Lays the memory out anew. After a failure it must be called again before a step."""
        for layer in self._real:
            layer.layout(new, kept)

    def fill(self, slot: int, lane: int, source: PrefixKV, *, prefix: bool) -> None:
        """Copies a prefix to a slot, or to a prefix slot."""
        for layer, kv in zip(self._real, source, strict=True):
            layer.fill(slot, lane, kv, prefix=prefix)

    def move(self, source: int, target: int, used: int, *, prefix: bool) -> None:
        for layer in self._real:
            layer.move(source, target, used, prefix=prefix)

    def clear(self, start: int, stop: int, *, prefix: bool) -> None:
        """Zeros slots start..stop-1, before new rows have them: what was there may be NaN, and,
        masked or not, would spoil them."""
        for layer in self._real:
            layer.clear(start, stop, prefix=prefix)
