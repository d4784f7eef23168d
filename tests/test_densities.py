"""Densities of rows under a grid of alphas, against their definition in float64."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import byte_tokenizer, random_pair
from reference import keep_top, propose, reference
from test_draw import Syncs, logits
from test_memory import LivePeak
from torch import Tensor

from lda_core import (
    Completion,
    Engine,
    EngineConfig,
    ModelPair,
    Request,
    RequestError,
    encode,
)
from lda_core.batch import BatchState, Row
from lda_core.detokenize import Pieces, _by_prefixes, completion_text, token_ends
from lda_core.draw import Drawer
from lda_core.memory import activation_bytes

GRID = (0.0, -1.0, 0.5, 1.0, 2.0, 3.7)
QUESTIONS = ["What is the capital of France?", "Tell me a story.", "What is 3 plus 4?"]


def ask(pair: ModelPair, n: int, **changes: Any) -> list[Request]:
    rng = random.Random(n)
    return [
        Request(
            encode(pair.tokenizer, rng.choice(QUESTIONS), "alpaca").ids,
            **{"alpha": rng.choice((-1.0, 0.0, 0.5, 2.0)), "max_new_tokens": 12, **changes},
            seed=rng.randrange(2**40),
        )
        for _ in range(n)
    ]


def forward(pair: ModelPair, prompt: Sequence[int], ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, V) of both models in float64."""
    tokens = torch.tensor([[*prompt, *ids]])
    with torch.inference_mode():
        after, before = (
            m(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1, : pair.vocab_size]
            for m in (pair.after, pair.before)
        )
    return after.double().log_softmax(-1), before.double().log_softmax(-1)


def logits_at(after: Tensor, before: Tensor, alpha: float) -> Tensor:
    """By the definition, with the rule for tokens that one model rules out."""
    if alpha in (0, -1):
        return after if alpha == 0 else before
    mixed = (1 + alpha) * after - alpha * before
    return mixed.masked_fill(after.isneginf() | before.isneginf(), -torch.inf)


def densities(done: Completion, temperature: float = 1.0) -> Tensor:
    """(T, K) target log-densities, as whoever reads a completion computes them."""
    assert done.densities is not None and done.logprobs is not None
    rows = [
        [
            ((1 + a) * x - a * y) / temperature - z
            for a, z in zip(done.densities.alphas, norms, strict=True)
        ]
        for x, y, norms in zip(
            done.logprobs.after, done.logprobs.before, done.densities.normalisers, strict=True
        )
    ]
    return torch.tensor(rows, dtype=torch.float64)


def expected(pair: ModelPair, request: Request, done: Completion) -> Tensor:
    after, before = forward(pair, request.prompt_ids, done.token_ids)
    drawn = torch.tensor(done.token_ids).unsqueeze(-1)
    columns = [
        (logits_at(after, before, a) / request.temperature).log_softmax(-1).gather(-1, drawn)
        for a in request.grid
    ]
    return torch.cat(columns, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_target_densities_are_those_of_the_definition(
    tiny_pair: ModelPair, temperature: float
) -> None:
    grids = (GRID, (0.0,), (), (2.0, 0.0, -1.0))
    requests = [
        replace(r, grid=grids[i % 4])
        for i, r in enumerate(ask(tiny_pair, 12, temperature=temperature))
    ]
    for request, done in zip(requests, Engine(tiny_pair).generate(requests), strict=True):
        if not request.grid:
            assert done.densities is done.logprobs is done.token_ends is None
            continue
        assert done.densities is not None and done.densities.alphas == list(request.grid)
        assert done.densities.drawn is None
        wanted = expected(tiny_pair, request, done)
        torch.testing.assert_close(densities(done, temperature), wanted, rtol=0, atol=1e-4)


def test_the_rows_own_alpha_is_its_amplified_log_probability(tiny_pair: ModelPair) -> None:
    requests = [replace(r, grid=(0.0, r.alpha, -1.0)) for r in ask(tiny_pair, 8)]
    for done in Engine(tiny_pair).generate(requests):
        assert done.logprobs is not None and done.densities is not None
        found = densities(done)
        for k, name in enumerate(("after", "amplified", "before")):
            wanted = torch.tensor(getattr(done.logprobs, name), dtype=torch.float64)
            torch.testing.assert_close(found[:, k], wanted, rtol=0, atol=1e-5)
        # One model alone at temperature 1 is normalised, exactly.
        assert all(row[0] == row[2] == 0 for row in done.densities.normalisers)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_self_pair_has_one_density(temperature: float) -> None:
    model = random_pair().after
    pair = ModelPair.of(model, model, byte_tokenizer())
    requests = [
        Request((5, 6), a, temperature, max_new_tokens=8, seed=i, ignore_eos=True, grid=GRID)
        for i, a in enumerate((0.0, 1.0, 3.0))
    ]
    for done in Engine(pair).generate(requests):
        found = densities(done, temperature)
        torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=0, atol=2e-5)


def test_densities_do_not_depend_on_batch_or_order(tiny_pair: ModelPair) -> None:
    requests = [
        replace(r, grid=((), GRID, (1.0, 0.5), (0.0,))[i % 4], logprobs=i % 3 == 0)
        for i, r in enumerate(ask(tiny_pair, 16))
    ]
    together = Engine(tiny_pair).generate(requests)
    few = Engine(tiny_pair, EngineConfig(max_slots=3)).generate(requests[::-1])[::-1]
    for a, b, request in zip(together, few, requests, strict=True):
        alone = Engine(tiny_pair).generate([replace(request, grid=(), logprobs=False)])[0]
        assert a.token_ids == b.token_ids == alone.token_ids
        assert (a.densities is None) is (b.densities is None) is (not request.grid)
        assert (a.logprobs is not None) is (request.logprobs or bool(request.grid))
        if a.densities is not None and b.densities is not None:
            x, y = (torch.tensor(d.normalisers) for d in (a.densities, b.densities))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_all_rows_of_a_toy_together_have_mass_1() -> None:
    """Every row of two tokens over a vocabulary of 320 whose first is one of the likeliest."""
    pair = random_pair()
    drawn = Engine(pair).generate(
        Request((5, 6), 1.0, max_new_tokens=1, ignore_eos=True, grid=GRID).samples(4000)
    )
    by_token = {c.token_ids[0]: densities(c)[0] for c in drawn}
    seen = torch.stack(list(by_token.values())).exp()
    after, before = forward(pair, (5, 6), (7,))
    for k, alpha in enumerate(GRID):
        exact = logits_at(after, before, alpha)[0].softmax(-1)[list(by_token)]
        torch.testing.assert_close(seen[:, k], exact, rtol=1e-4, atol=1e-9)
        assert math.isclose(float(seen[:, k].sum()), float(exact.sum()), rel_tol=1e-5)


# -- where a row is amplified, and among which tokens ---------------------------------------

GATES: list[dict[str, Any]] = [
    {},
    {"amplify_first": 3},
    {"amplify_min_kl": 0.05},
    {"plausible": 0.1},
    {"plausible": 1.0},
    {"amplify_first": 6, "amplify_min_kl": 0.01, "plausible": 0.3},
]
CUTS: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 5}, {"top_p": 0.7, "top_k": 20}]


def gated(pair: ModelPair, n: int, **changes: Any) -> list[Request]:
    """Every gate with every truncation, at all alphas, some of them with grid, watch, neither."""
    rng = random.Random(7)
    return [
        replace(
            request,
            **{
                **GATES[i % len(GATES)],
                **rng.choice(CUTS),
                "temperature": rng.choice((0.7, 1.0, 1.6)),
                "grid": rng.choice(((), GRID, (request.alpha,))),
                "watch": rng.choice(((), (5, 9), (30,))),
                **changes,
            },
        )
        for i, request in enumerate(ask(pair, n))
    ]


def test_gated_rows_in_mixed_batches_equal_the_reference(tiny_pair: ModelPair) -> None:
    requests = gated(tiny_pair, 48)
    requests += [
        replace(r, temperature=0.0, grid=(), watch=()) for r in gated(tiny_pair, 12, alpha=2.0)
    ]
    wanted = [reference(tiny_pair, request) for request in requests]
    for config in (EngineConfig(), EngineConfig(max_slots=5, kv_tokens=260)):
        done = Engine(tiny_pair, config).generate(requests)
        assert [c.token_ids for c in done] == wanted
    # The gates matter: without them other tokens are drawn.
    plain = [
        replace(r, amplify_first=0, amplify_min_kl=0.0, plausible=0.0)
        for r in requests
        if r.amplify_first or r.amplify_min_kl or r.plausible
    ]
    open_ = {tuple(c.token_ids) for c in Engine(tiny_pair).generate(plain)}
    assert len(open_ - {tuple(ids) for ids in wanted}) > len(plain) / 5


@pytest.mark.parametrize("alpha", [0.0, -1.0])
@pytest.mark.parametrize("gate", GATES[1:])
def test_one_model_alone_is_never_gated(
    tiny_pair: ModelPair, gate: dict[str, Any], alpha: float
) -> None:
    """Alone, where it needs that model only, and beside rows whose gates are looked at."""
    plain = ask(tiny_pair, 3, alpha=alpha, ignore_eos=True)
    requests = [replace(request, **gate) for request in plain]
    assert all(len(Row(request).needs) == 1 for request in requests)
    wanted = Engine(tiny_pair).generate(plain)
    assert Engine(tiny_pair).generate(requests) == wanted
    amplified = [replace(request, alpha=2.0) for request in requests]
    assert Engine(tiny_pair).generate([*requests, *amplified])[:3] == wanted


NEUTRAL: dict[str, Any] = {"amplify_first": 0, "amplify_min_kl": 0.0, "plausible": 0.0}


def drawn_densities(pair: ModelPair, request: Request, done: Completion) -> Tensor:
    """(T, K) by the reference's own steps, in float64."""
    after, before = forward(pair, request.prompt_ids, done.token_ids)
    rows = []
    for t, token in enumerate(done.token_ids):
        row = []
        for a in request.grid:
            logits = propose(request, a, t, after[t], before[t]) / request.temperature
            logits = keep_top(logits, request.top_p, request.top_k)
            row.append(float(logits.log_softmax(0)[token]))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).clamp(min=-1e30)


def test_proposal_densities_are_those_of_the_reference(tiny_pair: ModelPair) -> None:
    requests = gated(tiny_pair, 48, grid=GRID)
    impossible = 0
    for request, done in zip(requests, Engine(tiny_pair).generate(requests), strict=True):
        assert done.densities is not None
        if not request.reshaped:
            assert done.densities.drawn is None
            continue
        found = torch.tensor(done.densities.drawn, dtype=torch.float64)
        wanted = drawn_densities(tiny_pair, request, done)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
        impossible += int((found == -1e30).sum())
        if request.alpha in GRID:  # what was drawn was possible
            assert bool((found[:, GRID.index(request.alpha)] > -30).all())
        # The targets know nothing of all this.
        targets = expected(tiny_pair, request, done)
        torch.testing.assert_close(densities(done, request.temperature), targets, rtol=0, atol=2e-4)
    assert impossible > 20


def test_a_gated_step_has_the_same_density_at_every_alpha(tiny_pair: ModelPair) -> None:
    """At every one that is amplified: -1 is *before* throughout."""
    grid = tuple(a for a in GRID if a != -1)
    request = replace(ask(tiny_pair, 1)[0], alpha=2.0, amplify_first=2, grid=grid, ignore_eos=True)
    (done,) = Engine(tiny_pair).generate([request])
    assert done.densities is not None and done.densities.drawn is not None
    spread = [max(row) - min(row) for row in done.densities.drawn]
    assert max(spread[:2]) > 1e-3 and max(spread[2:]) < 1e-5


def test_before_has_its_own_density_at_every_step(tiny_pair: ModelPair) -> None:
    """Closed steps too, in rows of any alpha: no gate changes what alpha -1 is."""
    grid = (-1.0, 2.0)
    gates = {"amplify_first": 2, "amplify_min_kl": 0.05, "plausible": 0.3}
    requests = [
        replace(r, alpha=a, grid=grid, ignore_eos=True, **gates)
        for r in ask(tiny_pair, 2)
        for a in (-1.0, 2.0)
    ]
    for done in Engine(tiny_pair).generate(requests):
        assert done.densities is not None and done.densities.drawn is not None
        assert done.logprobs is not None
        drawn = torch.tensor([row[0] for row in done.densities.drawn])
        before = torch.tensor(done.logprobs.before)
        torch.testing.assert_close(drawn, before, rtol=0, atol=1e-4)


def test_no_setting_changes_the_tokens_of_its_neighbours(tiny_pair: ModelPair) -> None:
    plain = ask(tiny_pair, 12)
    wanted = Engine(tiny_pair).generate(plain)
    mixed = [row for pair in zip(plain, gated(tiny_pair, 12), strict=True) for row in pair]
    assert Engine(tiny_pair).generate(mixed)[::2] == wanted


# -- watched tokens --------------------------------------------------------------------------


def test_watched_tokens_have_their_target_density_at_every_step(tiny_pair: ModelPair) -> None:
    requests = gated(tiny_pair, 24)
    for request, done in zip(requests, Engine(tiny_pair).generate(requests), strict=True):
        if not request.watch:
            assert done.watched is None
            continue
        after, before = forward(tiny_pair, request.prompt_ids, done.token_ids)
        target = logits_at(after, before, request.alpha) / request.temperature
        wanted = target.log_softmax(-1)[:, list(request.watch)]
        found = torch.tensor(done.watched, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


# -- cost ------------------------------------------------------------------------------------


def state(requests: list[Request]) -> BatchState:
    return BatchState.of([Row(request) for request in requests], [], torch.device("cpu"))


EVERYTHING: dict[str, Any] = {
    "grid": GRID,
    "watch": (5, 9),
    "amplify_first": 3,
    "amplify_min_kl": 0.1,
    "plausible": 0.1,
    "top_logprobs": 20,
    "kl": True,
}


@pytest.mark.parametrize("some", [{}, {"grid": GRID}, EVERYTHING])
def test_one_copy_to_the_host_whatever_is_asked(
    some: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        Request((5,), (0.0, 1.0, 2.0)[i % 3], top_p=(1.0, 0.8)[i % 2], seed=i, **some)
        for i in range(30)
    ]
    nothing: dict[str, Any] = {"grid": (), "watch": (), "top_logprobs": 0, "kl": False}
    at = state(requests + [replace(r, **NEUTRAL, **nothing) for r in requests])
    copies: Counter[str] = Counter()
    for name in ("tolist", "cpu"):
        own = getattr(Tensor, name)

        def counted(self: Tensor, *, name: str = name, own: Any = own) -> Any:
            copies[name] += 1
            return own(self)

        monkeypatch.setattr(Tensor, name, counted)
    with Syncs() as syncs:
        _, draw = Drawer(1500)(*logits(60, 9, spread=9.0), at)
    assert copies == {"tolist": 1} and not syncs.seen
    assert [len(x[0]) if x else 0 for x in (draw.normalisers, draw.drawn, draw.watched)] == (
        [len(some.get("grid", ())), len(some.get("grid", ())), len(some.get("watch", ()))]
    )


def test_rows_that_ask_for_nothing_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one operation more than the draw itself: what is new is not even looked at."""
    at = state([Request((5,), 1.0, seed=i) for i in range(4)])
    assert at.gates is at.grid is at.watch is at.logprobs is None
    assert at.top is at.kl is at.fewest is None
    seen: Counter[str] = Counter()

    class Counting(Syncs):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        Drawer(1500)(*logits(4, 9), at)
    assert seen["aten::logsumexp"] == seen["aten::log_softmax"] == 0
    assert seen["aten::exp_"] == 1 and seen["aten::amax"] == 1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_memory_of_a_step_is_within_the_estimate(top_p: float) -> None:
    rows, vocab = 32, 8000
    pair = random_pair(vocab_size=vocab, hidden_size=16, head_dim=4)
    engine = Engine(pair, EngineConfig(max_slots=rows, kv_tokens=rows * 8, prefill_tokens=16))
    request = Request((5,), 2.0, top_p=top_p, max_new_tokens=4, ignore_eos=True, **EVERYTHING)
    with LivePeak() as measured:
        engine.generate(request.samples(rows))
    estimate = activation_bytes(
        pair.after.config, vocab=vocab, rows=rows, prefill_tokens=16, dtype_bytes=4, models=1
    )
    assert 4 * rows * vocab * 4 < measured.peak <= estimate


@pytest.mark.parametrize("alpha", [0.0, -1.0, 0.5, -0.5, 2.0])
@pytest.mark.parametrize("ruled_out_by", ["after", "before"])
def test_tokens_that_a_model_rules_out(alpha: float, ruled_out_by: str) -> None:
    """Impossible at every alpha but the other model's own, and without a part in the rest."""
    after, before = (x[:, :50] for x in logits(20, 3))
    hidden = after if ruled_out_by == "after" else before
    hidden[:, :10] = -torch.inf
    rows = [Request((5,), alpha, seed=i, grid=GRID, watch=(3, 30), top_p=0.95) for i in range(20)]
    rows += [replace(r, top_p=1.0, amplify_first=5, plausible=0.01) for r in rows]
    after, before = after.repeat(2, 1), before.repeat(2, 1)
    tokens, draw = Drawer(50)(after, before, state(rows))
    assert not any(draw.failed)
    x, y = after.double().log_softmax(-1), before.double().log_softmax(-1)
    for k, a in enumerate(GRID):
        wanted = logits_at(x, y, a).logsumexp(-1)
        found = torch.tensor([norms[k] for norms in draw.normalisers], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        at = torch.tensor([row[k] for row in draw.drawn])
        out = tokens < 10
        other = -1.0 if ruled_out_by == "after" else 0.0
        assert bool((at[out] == -1e30).all()) is (a != other) or not out.any()
    watched = torch.tensor(draw.watched, dtype=torch.float64)
    wanted = logits_at(x, y, alpha).log_softmax(-1)[:, [3, 30]].clamp(min=-1e30)
    torch.testing.assert_close(watched, wanted, rtol=0, atol=1e-4)


def test_a_broken_row_fails_alone_whatever_is_asked() -> None:
    for value in (torch.nan, torch.inf):
        after, before = logits(12, 3)
        before[4, 11] = value
        rows = [Request((5,), 1.0, seed=i, **EVERYTHING) for i in range(12)]
        wanted = Drawer(1500)(*logits(12, 3), state(rows))[1]
        draw = Drawer(1500)(after, before, state(rows))[1]
        assert [i for i, failed in enumerate(draw.failed) if failed] == [4]
        fine = [i for i in range(12) if i != 4]
        assert [draw.tokens[i] for i in fine] == [wanted.tokens[i] for i in fine]
        for name in ("normalisers", "drawn", "watched", "kl", "top"):
            seen, same = (torch.tensor(getattr(x, name))[fine] for x in (draw, wanted))
            torch.testing.assert_close(seen, same, rtol=0, atol=1e-4)


def test_rows_that_start_again_record_anew(tiny_pair: ModelPair) -> None:
    """Memory for three rows at a time, whatever is tried."""
    requests = gated(tiny_pair, 12, grid=GRID, watch=(5,), ignore_eos=True)
    wanted = Engine(tiny_pair).generate(requests)
    engine = Engine(tiny_pair)
    decode, calls = engine._pair.decode, itertools.count()

    def small(step: Any, *args: Any) -> Any:
        if len(step.tokens) > 3 and next(calls) > 4:
            raise torch.OutOfMemoryError("injected")
        return decode(step, *args)

    engine._pair.decode = small  # type: ignore[method-assign]
    done = engine.generate(requests)
    assert engine.stats.out_of_memory > 1
    for a, b in zip(done, wanted, strict=True):
        assert a.token_ids == b.token_ids and a.token_ends == b.token_ends
        assert a.densities is not None and b.densities is not None
        assert a.watched is not None and len(a.watched) == len(a.token_ids)
        x, y = torch.tensor(a.densities.normalisers), torch.tensor(b.densities.normalisers)
        torch.testing.assert_close(x, y, rtol=0, atol=2e-4)


# -- which token ends where ----------------------------------------------------------------

TOKENIZER = byte_tokenizer()


def by_definition(request: Request, ids: list[int], eos: int | None, text: str) -> list[int]:
    """What every prefix has in common with the text that came of it."""
    ends = []
    for stop in range(1, len(ids) + 1):
        ended = eos is not None and eos < stop
        prefix = completion_text(TOKENIZER, request, ids[:stop], eos if ended else None).text
        # The EOS settles what stands before it.
        keep = len(completion_text(TOKENIZER, request, ids, eos).text[: len(prefix)])
        border = completion_text(TOKENIZER, request, ids[:stop], eos).eos_offset if ended else 0
        while keep > (border or 0) and prefix[keep - 1] == "\ufffd":
            keep -= 1
        same = next((i for i in range(keep) if i >= len(text) or prefix[i] != text[i]), keep)
        ends.append(min(same, len(text)))
    ends = [min(ends[i:]) for i in range(len(ends))]
    ends[-1] = len(text)
    return ends


def test_token_ends_are_those_of_the_definition() -> None:
    """Any tokens at all: half characters, special ones, several EOS; and whole texts."""
    rng = random.Random(0)
    texts = ["the cat 🙂 sat", "naïve 東京 the mat", "👩\u200d👩\u200d👧 and the hat", "\ufffd the"]
    pieces = Pieces(TOKENIZER)
    for case in range(400):
        words = [TOKENIZER.encode(rng.choice(texts), add_special_tokens=False) for _ in range(2)]
        ids = words[0] + words[1] if case % 2 else [rng.randrange(320) for _ in range(12)]
        if case % 3 == 0:
            ids[rng.randrange(len(ids)) : 0] = [rng.choice((0, 1, 2))] * rng.randrange(3)
        ids = ids[: rng.randrange(1, len(ids) + 1)]
        eos = ids.index(2) if 2 in ids else None
        request = Request(tuple(TOKENIZER.encode(rng.choice(texts))[: rng.randrange(1, 9)]))
        text = completion_text(TOKENIZER, request, ids, eos).text
        text = text[: rng.randrange(len(text) + 1)] if case % 5 == 0 else text  # as a stop does
        found = token_ends(pieces, request, ids, eos, text)
        assert found == by_definition(request, ids, eos, text), (case, ids, text)
        assert len(found) == len(ids) and found == sorted(found) and found[-1] == len(text)


def test_a_character_of_four_tokens_is_settled_with_the_last() -> None:
    ids = TOKENIZER.encode("a🙂b", add_special_tokens=False)
    assert len(ids) == 6
    assert token_ends(Pieces(TOKENIZER), Request((5,)), ids, None, "a🙂b") == [1, 1, 1, 1, 2, 3]


def test_the_long_way_gives_the_same_ends() -> None:
    ids = TOKENIZER.encode("the naïve cat 🙂 sat 東京", add_special_tokens=False)
    text = TOKENIZER.decode(ids)
    found = token_ends(Pieces(TOKENIZER), Request((5,)), ids, None, text)
    assert _by_prefixes(TOKENIZER, [5], ids, text) == found


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("stop", [(), ("e",), ("th", ". ")])
def test_token_ends_of_completions(
    tiny_pair: ModelPair, stop: tuple[str, ...], ignore_eos: bool
) -> None:
    asked = ask(tiny_pair, 10, max_new_tokens=40, stop=stop, ignore_eos=ignore_eos, logprobs=True)
    reasons = set()
    for done in Engine(tiny_pair).generate(asked):
        ends = done.token_ends
        assert ends is not None and len(ends) == len(done.token_ids)
        assert ends == sorted(ends) and ends[-1] == len(done.text)
        # A word's worth of characters per token, not all of them with the last one.
        assert max(b - a for a, b in itertools.pairwise([0, *ends])) <= 16
        if done.eos_index is not None and done.eos_text_offset is not None:
            assert ends[done.eos_index] == done.eos_text_offset
        reasons.add(done.finish_reason)
    assert ("stop" in reasons) is bool(stop) and ("eos" not in reasons or not ignore_eos)


# -- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("grid", (float("nan"),), "finite"),
        ("grid", (float("inf"), 1.0), "finite"),
        ("grid", (0.0,) * 17, "at most 16"),
        ("watch", (1,) * 17, "at most 16"),
        ("watch", (1.5,), "integers"),
        ("amplify_first", -1, "between 0 and"),
        ("amplify_min_kl", -0.1, "at least 0"),
        ("amplify_min_kl", float("inf"), "at least 0"),
        ("plausible", -0.1, "between 0 and 1"),
        ("plausible", 1.1, "between 0 and 1"),
        ("plausible", float("nan"), "between 0 and 1"),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: object, words: str) -> None:
    with pytest.raises(RequestError, match=f"{field}.*{words}"):
        Request((1,), **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["grid", "watch"])
def test_greedy_rows_have_no_densities(field: str) -> None:
    with pytest.raises(RequestError, match=f"{field}.*temperature above 0"):
        Request((1,), temperature=0.0, **{field: (1,)})  # type: ignore[arg-type]


def test_watched_tokens_are_of_the_vocabulary(tiny_pair: ModelPair) -> None:
    with pytest.raises(RequestError, match="watch.*between 0 and 767"):
        Engine(tiny_pair).accept(Request((1,), watch=(5, 768)))
