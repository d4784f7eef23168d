"""Prompts read before: their keys and values, the least recently used go first."""

from collections import OrderedDict

from lda_core.request import Role
from lda_core.slots import PrefixKV

Key = tuple[Role, tuple[int, ...]]


class PrefixPool:
    """Keys and values by model and prefix, up to `capacity` bytes. They live beside the slots."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._entries: OrderedDict[Key, PrefixKV] = OrderedDict()

    def get(self, key: Key) -> PrefixKV | None:
        if (entry := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Key, entry: PrefixKV) -> None:
        """Keeps a copy of `entry`; nothing where it is too large."""
        size = _bytes(entry)
        if size > self.capacity or key in self._entries:
            return
        while self.bytes + size > self.capacity:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= _bytes(oldest)
        # Copied now that there is room: the pool and what replaces the oldest never exceed it.
        self._entries[key] = [(key.clone(), value.clone()) for key, value in entry]
        self.bytes += size

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0


def _bytes(entry: PrefixKV) -> int:
    return sum(x.numel() * x.element_size() for kv in entry for x in kv)
