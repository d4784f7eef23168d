"""Memory that runs out anywhere loses no row and changes no text; see `chaos.oom`."""

import itertools
import os
from typing import Any

import pytest
import torch
from chaos.oom import PAIRS, Faults, one_layer, requests, stacked, with_a_fault
from reference import reference

from lda_core import Engine, EngineConfig, Request
from lda_core.slots import SlotLayer


@pytest.mark.parametrize("name", PAIRS)
def test_one_fault_at_the_first_allocations(name: str) -> None:
    """A join, a prefill, a step; those of the whole run are `make chaos`'s, and all of them, which
    takes an hour, are with EVERY_FAULT=1."""
    pair = PAIRS[name]()
    expected = [reference(pair, request) for request in requests(pair.vocab_size)]
    every = "EVERY_FAULT" in os.environ
    for at in itertools.count(1) if every else range(1, 100, 9):
        done, raised = with_a_fault(pair, at)
        assert [completion.token_ids for completion in done] == expected, at
        if not raised:
            break
    assert raised or (every and at > 500)


@pytest.mark.parametrize("name", ["two models", "stacked"])
def test_a_fault_in_every_step(name: str) -> None:
    """Every step's first try fails, each at another allocation; 16 of 16 rows complete."""
    pair = PAIRS[name]()
    todo = requests(pair.vocab_size)
    expected = [reference(pair, request) for request in todo]
    engine = Engine(pair, EngineConfig(prefill_tokens=24))
    rows = [engine.accept(request) for request in todo]
    for row in rows:
        engine.enqueue(row)
    tries = 0
    while not engine.idle:
        with Faults(lambda n, at=1 + 5 * tries % 60: n == at) as faults:  # type: ignore[misc]
            engine.step()
        tries += 1
        if faults.raised:
            engine.step()
    assert engine.stats.out_of_memory > 10
    assert [row.completion.token_ids for row in rows if row.completion] == expected
    assert not any(row.completion.error for row in rows if row.completion)


def test_live_rows_go_on_where_they_were() -> None:
    pair = one_layer()
    engine = Engine(pair)
    rows = [engine.accept(r) for r in requests(pair.vocab_size)]
    for row in rows[:8]:
        engine.enqueue(row)
    engine.step()
    for row in rows[8:]:
        engine.enqueue(row)
    with Faults(lambda n: n == 20):
        engine.step()
    assert engine.live_rows > 0
    assert all(len(row.token_ids) == 1 for row in rows[:8])
    assert all(row.prefix is None and not row.token_ids for row in rows[8:])


def test_rows_that_cannot_go_on_together_start_again_in_halves() -> None:
    """Memory for four rows at a time, whatever is tried."""
    pair = one_layer()
    todo = requests(pair.vocab_size)
    engine = Engine(pair)
    decode = engine._pair.decode

    def small(step: Any, *args: Any) -> Any:
        if len(step.tokens) > 4:
            raise torch.OutOfMemoryError("injected")
        return decode(step, *args)

    engine._pair.decode = small  # type: ignore[method-assign]
    done = engine.generate(todo)
    assert [c.token_ids for c in done] == [reference(pair, request) for request in todo]
    assert engine.stats.out_of_memory >= 2


def test_rows_live_on_after_half_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that asked for it have left, so that nothing joins at the next step."""
    pair = stacked()
    engine = Engine(pair, EngineConfig(max_slots=8, kv_tokens=200))
    first = Request(tuple(range(5, 10)), alpha=0.0, max_new_tokens=30, seed=1, ignore_eos=True)
    live = engine.accept(first)
    engine.enqueue(live)
    engine.step()
    # They need both models of the pair: other lanes, layer by layer.
    more = [engine.accept(Request((20, 21, 22), 1.0, max_new_tokens=5, seed=i)) for i in range(3)]
    large = engine.accept(Request(tuple(range(30)), 1.0, max_new_tokens=120))
    for row in (*more, large):
        engine.enqueue(row)
    original, calls = SlotLayer.layout, itertools.count(1)

    def fails(self: SlotLayer, *args: Any) -> None:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SlotLayer, "layout", fails)
        engine.step()
    for row in (*more, large):
        row.left = True
    while not engine.idle:
        engine.step()
    assert live.completion is not None and live.completion.token_ids == reference(pair, first)
