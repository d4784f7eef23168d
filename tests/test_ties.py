"""Draws that are so close that the rounding of a matrix product decides them, and with it the
neighbours: the engine has a pass of the row alone decide."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from chaos import oom
from models import random_pair
from reference import reference
from test_draw import VOCAB, logits, requests, state
from test_engine import mixed_requests

from lda_core import Engine, EngineConfig, ModelPair, Request, Steer, encode, sample
from lda_core.amplify import amplify
from lda_core.sampling import _margins, propose, support

# What is drawn, as one of the settings goes up, changes at some value.
EDGES: dict[str, tuple[str, tuple[float, float], dict[str, Any]]] = {
    "greedy": ("alpha", (0.1, 3.0), {"temperature": 0.0}),
    "full": ("alpha", (0.1, 3.0), {}),
    "after alone": ("temperature", (0.5, 2.0), {"alpha": 0.0}),
    "before alone": ("temperature", (0.5, 2.0), {"alpha": -1.0, "top_p": 0.95}),
    "top_k": ("alpha", (0.1, 3.0), {"top_k": 2}),
    "top_p": ("top_p", (0.3, 0.99), {"alpha": 0.5}),
    "top_p of top_k": ("top_p", (0.3, 0.99), {"top_k": 20, "temperature": 1.3}),
}


def on_the_edge(
    pair: ModelPair, name: str, low: float, high: float, how: dict[str, Any]
) -> Iterator[Request]:
    """Requests of one token whose setting lies where the next float draws another one."""
    for seed in range(1000):
        prompt = encode(pair.tokenizer, f"What is {seed} plus 4?", "alpaca").ids

        def at(value: float, prompt: Any = prompt, seed: int = seed) -> Request:
            return Request(prompt, seed=seed, max_new_tokens=1, **{**how, name: value})

        below, above = low, high
        first, last = reference(pair, at(below)), reference(pair, at(above))
        if first == last:
            continue
        for _ in range(26):
            middle = (below + above) / 2
            if reference(pair, at(middle)) == first:
                below = middle
            else:
                above = middle
        yield at(below)


def in_company(pair: ModelPair, wanted: list[Request], decided: bool) -> list[list[list[int]]]:
    """The tokens of each, in engines where others are under way; `decided`: ties, by a pass
    alone."""
    found: list[list[list[int]]] = [[] for _ in wanted]
    for number in range(8):
        rng = random.Random(number)
        engine = Engine(pair, EngineConfig(max_slots=64))
        if not decided:
            engine._tie = None
        for request in mixed_requests(pair, rng.randrange(1, 40), number):
            engine.enqueue(engine.accept(replace(request, max_new_tokens=30)))
        for i in rng.sample(range(len(wanted)), len(wanted)):
            for _ in range(rng.randrange(3)):
                engine.step()
            row = engine.accept(wanted[i])
            engine.enqueue(row)
            while row.completion is None:
                engine.step()
            found[i].append(row.completion.token_ids)
    return found


@pytest.mark.parametrize("kinds", ["greedy", "full", "truncated", "greedy full truncated"])
def test_no_small_change_of_the_logits_changes_a_clear_draw(kinds: str) -> None:
    rng, tie, clear_ones, changed = torch.Generator().manual_seed(3), 0.02, 0, 0
    for number in range(20):
        after, before = logits(60, number)
        at = state(requests(60, kinds, number))
        at = at._replace(ties=torch.full((60,), tie))
        mixed = amplify(after, before, at.alpha)
        found = propose(mixed, mixed.amax(-1), at.sampling, at.step, at.kinds, VOCAB, at.ties)
        clear_ones += int(found.clear.sum())
        none = torch.zeros(60)
        of_none = propose(mixed, mixed.amax(-1), at.sampling, at.step, at.kinds, VOCAB, none)
        assert bool(of_none.clear.all())
        against = mixed.scatter_add(-1, found.tokens[:, None], torch.full((60, 1), -tie))
        for i in range(10):
            shaken = mixed + tie / 2 * (2 * torch.rand(mixed.shape, generator=rng) - 1)
            drawn = sample(shaken if i else against, at.sampling, at.step)
            changed += int((drawn != found.tokens).sum())
            assert torch.equal(drawn[found.clear], found.tokens[found.clear])
    assert changed and clear_ones > 0.9 * 20 * 60


@pytest.mark.parametrize("temperature", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_nor_does_it_where_the_temperature_is_tiny(temperature: float, top_p: float) -> None:
    tie, n = 2e-4, 400
    mixed = torch.randn(n, 50, generator=torch.Generator().manual_seed(1))
    first, second = mixed.topk(2, dim=-1).indices.unbind(-1)
    rows = torch.arange(n)
    mixed[rows, second] = mixed[rows, first] - torch.linspace(0, 2 * tie, n)
    at = state([Request((5,), seed=i, temperature=temperature, top_p=top_p) for i in range(n)])
    ties = torch.full((n,), tie)
    found = propose(mixed, mixed.amax(-1), at.sampling, at.step, at.kinds, 50, ties)
    against = mixed.scatter_add(-1, found.tokens[:, None], torch.full((n, 1), -tie * 0.99))
    drawn = sample(against, at.sampling, at.step)
    assert torch.equal(drawn[found.clear], found.tokens[found.clear])
    assert found.clear.sum() > n / 4


@pytest.mark.parametrize("kind", EDGES)
def test_neighbours_do_not_decide_a_draw_however_close(tiny_pair: ModelPair, kind: str) -> None:
    name, ends, how = EDGES[kind]
    wanted = list(islice(on_the_edge(tiny_pair, name, *ends, how), 6))
    assert len(wanted) == 6
    engine = Engine(tiny_pair)
    alone = [engine.generate([request])[0].token_ids for request in wanted]
    assert engine.stats.ties == 6
    for right, drawn in zip(alone, in_company(tiny_pair, wanted, decided=True), strict=True):
        assert drawn == [right] * len(drawn)
    # They really are as close as that.
    rounded = in_company(tiny_pair, wanted, decided=False)
    assert any(drawn != [right] * len(drawn) for right, drawn in zip(alone, rounded, strict=True))


def test_a_steered_row_is_not_decided_without_its_steering(tiny_pair: ModelPair) -> None:
    vector = torch.randn(tiny_pair.after.config.hidden_size, generator=torch.Generator())
    steer = Steer(tuple(vector.tolist()), layer=1, coefficient=20.0)
    wanted = list(islice(on_the_edge(tiny_pair, "alpha", 0.1, 3.0, {"steer": steer}), 6))
    assert len(wanted) == 6
    engine = Engine(tiny_pair)
    for request in wanted:
        near = [replace(request, alpha=request.alpha * by) for by in (1 - 1e-3, 1 + 1e-3)]
        either = [reference(tiny_pair, one) for one in near]
        assert engine.generate([request])[0].token_ids in either
    assert engine.stats.ties == 0


def test_what_counts_as_close_goes_by_the_noise_and_in_16_bits_nothing_does(
    tiny_pair: ModelPair,
) -> None:
    assert Engine(tiny_pair, noise=1e-3)._tie == pytest.approx(8e-3)
    assert Engine(tiny_pair)._tie == pytest.approx(8 * 6e-6)
    requests = [replace(r, ignore_eos=True) for r in mixed_requests(tiny_pair, 20)]
    engine = Engine(tiny_pair, noise=1.0)  # every draw
    done = engine.generate(requests)
    assert [d.token_ids for d in done] == [reference(tiny_pair, r) for r in requests]
    assert engine.stats.ties > 0.9 * engine.stats.tokens
    half = random_pair()
    for model in (half.after, half.before):
        model.bfloat16()
    engine = Engine(ModelPair.of(half.after, half.before, half.tokenizer), noise=1.0)
    engine.generate([Request((5, 6, 7), max_new_tokens=20, ignore_eos=True)])
    assert engine.stats.ties == 0


def test_a_row_that_has_no_ties_keeps_what_sample_keeps() -> None:
    """A steered one, beside others: with a mass of exactly top_p before a token, too."""
    n = 20_000
    p = 0.3 + 0.15 * torch.rand(n, generator=torch.Generator().manual_seed(0))
    probs = torch.stack([p, 0.9 * p, *[(1 - 1.9 * p) / 3] * 3], dim=-1)
    scaled = (probs / p.unsqueeze(-1)).log()
    how = scaled, scaled.exp(), p, torch.zeros(n, dtype=torch.long), 5
    assert torch.equal(_margins(*how, torch.zeros(n))[0], support(*how)[0])


def test_rows_that_are_equal_are_read_once(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty-four greedy samples would be as many passes in one step."""
    engine, read = Engine(tiny_pair, noise=1.0), []
    alone = engine._pair.alone
    monkeypatch.setattr(engine._pair, "alone", lambda tokens: read.append(tokens) or alone(tokens))
    one = Request((5, 6, 7), temperature=0.0, max_new_tokens=10, ignore_eos=True)
    other = replace(one, prompt_ids=(8, 9))
    done = engine.generate([one, other, one, one])
    assert [d.token_ids for d in done] == [reference(tiny_pair, r) for r in (one, other, one, one)]
    assert engine.stats.ties == 2 * len(read) == 40 and len(read) == len(set(read))


@pytest.mark.parametrize("kind", oom.PAIRS)
def test_passes_alone_draw_the_same_on_every_kind_of_pair_and_when_memory_runs_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oom, "Engine", partial(Engine, noise=1.0))  # all draws
    pair = oom.PAIRS[kind]()
    wanted = [reference(pair, request) for request in oom.requests(pair.vocab_size)]
    faults, at, raised = 0, 1, True
    while raised:
        done, raised = oom.with_a_fault(pair, at)
        assert [one.token_ids for one in done] == wanted
        faults, at = faults + raised, at + 7919
    assert faults > 1
