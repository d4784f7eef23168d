"""Densities of rows under a grid of alphas, against their definition in float64."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import byte_tokenizer, random_pair
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
from lda_core.detokenize import Pieces, _by_prefixes, completion_text, token_ends

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
