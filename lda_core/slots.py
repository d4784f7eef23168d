"""Slots: a preallocated key/value cache in which every row lives at its own length.

A row starts at column 0 of its slot, so a position is a column and nothing is padded on the
left. Live rows fill slots 0..B-1 without gaps. The memory is one fixed budget of tokens, laid
out as rows x columns and laid out anew when longer rows come (fewer, wider slots).

Shapes: S slots, H key/value heads, L columns, D head size, B live rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


@dataclass
class Cursor:
    """Where the next token of each live row goes; shared by the layers of a cache."""

    rows: Tensor  # (B,) 0..B-1
    lengths: Tensor  # (B,) the column each row's next token goes to
    width: int  # columns that attention looks at: the longest row's length + 1


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: [S, H, L, D], views of two flat buffers."""

    def __init__(self, cursor: Cursor, key: Tensor, value: Tensor, tokens: int) -> None:
        """`key`, `value` [1, H, T, D]: any real ones, for their shape, dtype and device."""
        super().__init__()
        self._cursor = cursor
        # Zeros, because a masked column still takes part: 0 x NaN is NaN.
        self._flat = [x.new_zeros(tokens * x.shape[1] * x.shape[3]) for x in (key, value)]
        self._heads = [(x.shape[1], x.shape[3]) for x in (key, value)]
        self.keys, self.values = (x.new_empty(0, x.shape[1], 0, x.shape[3]) for x in (key, value))
        self.is_initialized = True

    def layout(self, slots: int, columns: int, live: int, used: int) -> None:
        """Views the buffers as `slots` x `columns`; keeps the first `used` columns of live rows."""
        kept = [x[:live, :, :used].clone() for x in (self.keys, self.values)]
        self.keys, self.values = (
            flat[: slots * h * columns * d].view(slots, h, columns, d)
            for flat, (h, d) in zip(self._flat, self._heads, strict=True)
        )
        for view, old in zip((self.keys, self.values), kept, strict=True):
            view[:live, :, :used] = old

    def update(self, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        """Writes one token per live row, [B, H, 1, D], and returns what attention may look at."""
        at = self._cursor
        self.keys[at.rows, :, at.lengths] = key[:, :, 0]
        self.values[at.rows, :, at.lengths] = value[:, :, 0]
        live = key.shape[0]
        return self.keys[:live, :, : at.width], self.values[:live, :, : at.width]

    def reset(self) -> None:
        for flat in self._flat:
            flat.zero_()
        self.keys, self.values = self.keys[:0], self.values[:0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass  # the buffers exist from the start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cursor.width, 0

    def get_seq_length(self) -> int:
        return self._cursor.width - 1

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class SlotCache(Cache):  # type: ignore[misc]
    """The slots of one model, in the form transformers' attention layers write to."""

    def __init__(self, probe: DynamicCache, tokens: int) -> None:
        """`probe`: the cache of any short forward pass, which knows every layer's shape."""
        nowhere = probe.layers[0].keys.new_empty(0, dtype=torch.long)
        self.cursor = Cursor(nowhere, nowhere, width=0)
        super().__init__(
            layers=[
                SlotLayer(self.cursor, layer.keys, layer.values, tokens) for layer in probe.layers
            ]
        )

    def layout(self, slots: int, columns: int, live: int, used: int) -> None:
        for layer in self.layers:
            layer.layout(slots, columns, live, used)

    def fill(self, slots: Tensor, prefilled: DynamicCache, source: Tensor) -> None:
        """Copies row source[i] of a prefill to slot slots[i]; both [N]."""
        for layer, new in zip(self.layers, prefilled.layers, strict=True):
            columns = new.keys.shape[2]
            layer.keys[slots, :, :columns] = new.keys[source]
            layer.values[slots, :, :columns] = new.values[source]

    def reset(self) -> None:
        """Void, as at the start."""
        for layer in self.layers:
            layer.reset()

    def move(self, source: int, target: int, used: int) -> None:
        """Slot `target` becomes a copy of slot `source`'s first `used` columns."""
        for layer in self.layers:
            layer.keys[target, :, :used] = layer.keys[source, :, :used]
            layer.values[target, :, :used] = layer.values[source, :, :used]

    def clear(self, slot: int) -> None:
        """Zeros a slot that may hold NaN: masked or not, it would spoil the slot's next row."""
        for layer in self.layers:
            layer.keys[slot].zero_()
            layer.values[slot].zero_()
