"""Slots: every row's columns stay its own, however the memory is laid out."""

import zlib
from collections.abc import Iterator

import pytest
import torch
from chaos.oom import Faults
from models import random_pair
from reference import reference
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lda_core import Engine, EngineConfig, Request
from lda_core.slots import Kept, Layout, PrefixKV, SlotCache

SHAPES = [(2, 3, 5), (1, 4, 4)]  # of each layer: heads, head size of keys, of values
BOTH = ("before", "after")
START = Layout(BOTH, slots=4, columns=8, prefixes=3, prefix_columns=6)
KEPT = Kept(rows=3, columns=5, prefixes=2, prefix_columns=4)
TOKENS = 2 * 60


def slots(layout: Layout, tokens: int = TOKENS) -> SlotCache:
    probe = DynamicCache()
    for i, (heads, key, value) in enumerate(SHAPES):
        probe.update(torch.ones(1, heads, 1, key), torch.ones(1, heads, 1, value), i)
    cache = SlotCache(probe, tokens)
    cache.layout(layout, Kept(0, 0, 0, 0))
    return cache


def content(name: str, lane: str, columns: int) -> PrefixKV:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {lane}".encode()))
    whole = [torch.randn(h, 64, k + v, generator=generator) for h, k, v in SHAPES]
    return [
        (x[:, :columns, :k], x[:, :columns, k:]) for x, (_, k, _) in zip(whole, SHAPES, strict=True)
    ]


def parts(layout: Layout, kept: Kept) -> Iterator[tuple[bool, int, int, str, int]]:
    for prefix, count, columns in (
        (False, kept.rows, kept.columns),
        (True, kept.prefixes, kept.prefix_columns),
    ):
        for slot in range(count):
            for lane, name in enumerate(layout.lanes):
                yield prefix, slot, lane, name, columns


def write(cache: SlotCache, layout: Layout, kept: Kept) -> None:
    for prefix, slot, lane, name, columns in parts(layout, kept):
        source = content(f"{prefix} {slot}", name, columns)
        cache.fill(slot, lane, source, prefix=prefix)


def read(cache: SlotCache, i: int, prefix: bool, row: int, columns: int) -> list[Tensor]:
    layer = cache.layers[i]
    tensors = (layer.prefix_keys, layer.prefix_values) if prefix else (layer.keys, layer.values)
    return [x[row, :, :columns] for x in tensors]


def holds(cache: SlotCache, i: int, name: str, lane: str, row: int, n: int) -> bool:
    expected = content(name, lane, n)[i]
    seen = read(cache, i, name.startswith("True"), row, n)
    return all(torch.equal(x, y) for x, y in zip(seen, expected, strict=True))


def check(cache: SlotCache, i: int, layout: Layout, kept: Kept, lanes: tuple[str, ...]) -> None:
    """Layer i has this layout, and in it what was kept."""
    assert cache.layers[i].keys.shape[::2] == (layout.slots * len(layout.lanes), layout.columns)
    for prefix, slot, lane, name, columns in parts(layout, kept):
        if name in lanes:
            at = slot * len(layout.lanes) + lane
            assert holds(cache, i, f"{prefix} {slot}", name, at, columns), (slot, name)


@pytest.mark.parametrize(
    "new",
    [
        START._replace(slots=3, columns=14),
        START._replace(slots=8, columns=5),
        START._replace(prefixes=7, prefix_columns=4),
        START._replace(slots=3, columns=5, prefixes=2, prefix_columns=20),
        START._replace(slots=3, columns=5, prefixes=11, prefix_columns=4),  # nearly all of it
        START._replace(lanes=("after",)),
        START._replace(lanes=("before",), slots=9, columns=6, prefixes=2),
        START._replace(lanes=("after", "before")),
    ],
)
def test_a_new_layout_keeps_what_lives_and_the_way_back_too(new: Layout) -> None:
    cache = slots(START)
    write(cache, START, KEPT)
    cache.layout(new, KEPT)
    for i in range(len(SHAPES)):
        check(cache, i, new, KEPT, BOTH)
    cache.layout(START, KEPT)
    for i in range(len(SHAPES)):
        check(cache, i, START, KEPT, new.lanes)


def test_one_lane_becomes_two_by_name() -> None:
    for name in BOTH:
        one = START._replace(lanes=(name,))
        cache = slots(one)
        write(cache, one, KEPT)
        cache.layout(START, KEPT)
        for i in range(len(SHAPES)):
            check(cache, i, START, KEPT, (name,))


def test_own_slots_and_prefix_slots_use_the_whole_memory_and_never_the_same() -> None:
    full = Layout(BOTH, slots=5, columns=6, prefixes=6, prefix_columns=5)
    cache = slots(full, tokens=2 * 60)
    whole = Kept(5, 6, 6, 5)
    write(cache, full, whole)
    for i in range(len(SHAPES)):
        check(cache, i, full, whole, BOTH)


def test_memory_that_fails_in_a_layout_leaves_its_layer_as_it_was() -> None:
    new = START._replace(lanes=("after",), slots=9, columns=6)
    failed_in = set()
    for at in range(1, 100):
        cache = slots(START)
        write(cache, START, KEPT)
        try:
            with Faults(lambda n, at=at: n == at):  # type: ignore[misc]
                cache.layout(new, KEPT)
            break
        except torch.OutOfMemoryError:
            pass
        done = [layer._layout == new for layer in cache.layers]
        assert done == sorted(done, reverse=True) and not all(done)
        failed_in.add(sum(done))
        for i in range(len(SHAPES)):
            check(cache, i, new if done[i] else START, KEPT, BOTH)
        cache.layout(new, KEPT)  # again, now that there is memory
        for i in range(len(SHAPES)):
            check(cache, i, new, KEPT, BOTH)
    assert failed_in == {0, 1}


def test_nothing_spoiled_stays_behind() -> None:
    cache = slots(START)
    for slot in range(START.slots):
        for lane in range(2):
            nan = [(k * torch.nan, v * torch.nan) for k, v in content("", "", 8)]
            cache.fill(slot, lane, nan, prefix=False)
    for slot in range(START.prefixes):
        for lane in range(2):
            cache.fill(slot, lane, [(k[:, :6], v[:, :6]) for k, v in nan], prefix=True)
    write(cache, START, KEPT)
    new = START._replace(slots=6, columns=7)
    cache.layout(new, KEPT)
    for i, layer in enumerate(cache.layers):
        m = len(new.lanes)
        assert all(x[: KEPT.rows * m].isfinite().all() for x in layer._own)
        assert all(x[: KEPT.prefixes * m].isfinite().all() for x in layer._prefix)
        check(cache, i, new, KEPT, BOTH)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("lanes", [BOTH, ("after",)])
def test_move_and_clear_take_every_lane_of_one_slot(prefix: bool, lanes: tuple[str, ...]) -> None:
    layout, m = START._replace(lanes=lanes), len(lanes)
    whole = Kept(4, 8, 3, 6)
    used = 4

    def rows(cache: SlotCache, i: int, slot: int) -> list[Tensor]:
        at = range(slot * m, (slot + 1) * m)
        return [x for row in at for x in read(cache, i, prefix, row, 8)]

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    cache, untouched = slots(layout), slots(layout)
    for each in (cache, untouched):
        write(each, layout, whole)
    cache.move(2, 0, used, prefix=prefix)
    for i in range(len(SHAPES)):
        moved, source = rows(cache, i, 0), rows(untouched, i, 2)
        assert same([x[:, :used] for x in moved], [x[:, :used] for x in source])
        assert all(x[:, used:].eq(0).all() for x in moved)  # nothing of who was there before
        for slot in (1, 2):
            assert same(rows(cache, i, slot), rows(untouched, i, slot))
        for name in (f"{not prefix} {slot}" for slot in range(3)):  # the other kind of slot
            at = int(name.split()[1]) * m
            assert all(holds(cache, i, name, lane, at + j, 6) for j, lane in enumerate(lanes))
    cache.clear(1, 2, prefix=prefix)
    for i in range(len(SHAPES)):
        assert all(x.eq(0).all() for x in rows(cache, i, 1))
        assert same(rows(cache, i, 2), rows(untouched, i, 2))
        assert not any(x[:, :used].eq(0).any() for x in rows(cache, i, 0))


def test_nan_of_the_model_a_row_does_not_need_harms_nobody() -> None:
    """A row at alpha 0 is decoded along by *before*, beside rows that need it."""
    pair = random_pair()
    with torch.no_grad():
        pair.before.get_input_embeddings().weight[77] = torch.nan
    long, plain, next_ = (
        Request(prompt, alpha, seed=seed, max_new_tokens=new, ignore_eos=True)
        for prompt, alpha, seed, new in (
            ((5, 9), 1.0, 2, 30),
            ((5, 9, 77), 0.0, 1, 8),
            ((5, 8), 1.0, 3, 8),  # into the slot of the second
        )
    )
    done = Engine(pair, EngineConfig(max_slots=2)).generate([long, plain, next_])
    assert [c.finish_reason for c in done] == ["length"] * 3
    assert [done[i].token_ids for i in (0, 2)] == [reference(pair, r) for r in (long, next_)]
