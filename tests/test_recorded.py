"""The likeliest tokens, the divergence of the models, and rows that must not end too soon."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import byte_tokenizer, random_pair
from reference import reference, steered
from test_densities import ask, forward, gated, logits_at
from test_draw import Syncs, logits, state
from torch import Tensor

from lda_core import Completion, Engine, EngineConfig, ModelPair, Request, Steer
from lda_core.batch import Row
from lda_core.detokenize import Text, cut_at_stop, hits_stop
from lda_core.draw import Drawer
from lda_core.sampling import likeliest

ALL_KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.8},
    {"top_k": 3, "temperature": 1.7},
    {"plausible": 0.2},
    {"amplify_min_kl": 0.05, "top_p": 0.9},
    {"amplify_first": 2},
    {"steer": Steer(tuple(float(i % 5) for i in range(128)), 1, 4.0)},
    {"alpha": 0.0},
    {"alpha": -1.0},
]


def everything(pair: ModelPair, **changes: Any) -> list[Request]:
    """Every kind of row, asking for more and less."""
    return [
        replace(
            request,
            **kind,
            **{"top_logprobs": (5, 0, 20, 1)[i % 4], "kl": i % 3 == 0, "logprobs": i % 5 == 0},
            **changes,
        )
        for i, (request, kind) in enumerate(zip(ask(pair, 30), ALL_KINDS * 3, strict=True))
    ]


def check(pair: ModelPair, request: Request, done: Completion) -> None:
    """Against plain forward passes in float64."""
    with steered("after", pair.after, request), steered("before", pair.before, request):
        after, before = forward(pair, request.prompt_ids, done.token_ids)
    if not request.kl:
        assert done.kl is None
    else:
        assert done.kl is not None
        wanted = (after.exp() * (after - before)).sum(-1)
        found = torch.tensor(done.kl, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if not request.top_logprobs:
        assert done.top_logprobs is None
        assert (done.logprobs is not None) is request.logprobs
        return
    assert done.top_logprobs is not None and done.logprobs is not None
    mixed = logits_at(after, before, request.alpha).log_softmax(-1)
    for t, (best, token) in enumerate(zip(done.top_logprobs, done.token_ids, strict=True)):
        assert len(best) == request.top_logprobs
        ids, values = zip(*best, strict=True)
        assert list(values) == sorted(values, reverse=True)
        assert dict(best).get(token, done.logprobs.amplified[t]) == done.logprobs.amplified[t]
        found = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(found, mixed[t][list(ids)], rtol=0, atol=1e-4)
        wanted = mixed[t].topk(len(ids)).values
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_what_is_recorded_is_what_plain_forward_passes_say(tiny_pair: ModelPair) -> None:
    requests = everything(tiny_pair)
    wanted = [reference(tiny_pair, request) for request in requests]
    few = EngineConfig(max_slots=4, kv_tokens=200)
    for config in (EngineConfig(), few, EngineConfig(cuda_graphs=True)):
        done = Engine(tiny_pair, config).generate(requests)
        assert [c.token_ids for c in done] == wanted
        for request, completion in zip(requests, done, strict=True):
            check(tiny_pair, request, completion)


def test_a_row_records_the_same_alone_and_among_others(tiny_pair: ModelPair) -> None:
    requests = everything(tiny_pair)
    together = Engine(tiny_pair).generate(requests)
    for request, among in list(zip(requests, together, strict=True))[::3]:
        (alone,) = Engine(tiny_pair).generate([request])
        assert among.token_ids == alone.token_ids
        for a, b in zip(among.kl or [], alone.kl or [], strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        for x, y in zip(among.top_logprobs or [], alone.top_logprobs or [], strict=True):
            assert dict(x) == pytest.approx(dict(y), abs=1e-4)


def test_what_rows_record_changes_nobodys_tokens(tiny_pair: ModelPair) -> None:
    plain = ask(tiny_pair, 10)
    wanted = Engine(tiny_pair).generate(plain)
    mixed = [row for both in zip(plain, everything(tiny_pair)[:10], strict=True) for row in both]
    assert Engine(tiny_pair).generate(mixed)[::2] == wanted


def test_one_model_alone_runs_where_nobody_needs_the_other() -> None:
    for alpha, role in ((0.0, "after"), (-1.0, "before")):
        assert Row(Request((5,), alpha, min_tokens=3)).needs == {role}
        assert Row(Request((5,), alpha, kl=True)).needs == {"after", "before"}
        assert Row(Request((5,), alpha, top_logprobs=1)).needs == {"after", "before"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_fails_alone(value: float) -> None:
    """Also where only what it asked for is broken: at alpha 0 nothing is drawn from *before*."""
    after, before = logits(20, 5)
    rows = [
        Request((5,), (0.0, 1.0)[i % 2], seed=i, kl=i % 4 < 2, top_logprobs=i % 3, min_tokens=i % 5)
        for i in range(20)
    ]
    rows[4] = replace(rows[4], alpha=0.0, kl=True, top_logprobs=0)
    rows[6] = replace(rows[6], alpha=0.0, kl=False, top_logprobs=0)
    clean = Drawer(1500, [2])(after.clone(), before.clone(), state(rows))[1]
    before[[4, 6, 9], 11] = value
    draw = Drawer(1500, [2])(after, before, state(rows))[1]
    assert [i for i, failed in enumerate(draw.failed) if failed] == [4, 9]
    fine = [i for i in range(20) if i not in (4, 9)]
    assert [draw.tokens[i] for i in fine] == [clean.tokens[i] for i in fine]
    kept = [i for i in fine if rows[i].kl]
    assert [draw.kl[i] for i in kept] == [clean.kl[i] for i in kept]


def test_what_one_model_rules_out() -> None:
    """It is nowhere among the likeliest of a mixture, and its divergence is written as 1e30."""
    after, before = logits(2, 3)
    before[:, 7] = -torch.inf
    after[:, 7] = 30.0
    rows = [Request((5,), a, kl=True, top_logprobs=3) for a in (2.0, 0.0)]
    _, draw = Drawer(1500)(after, before, state(rows))
    assert [x[0] for x in draw.kl] == [1e30, 1e30] and not any(draw.failed)
    assert 7 not in draw.top[0][:3] and draw.top[1][0] == 7
    # Fewer than were asked for are possible.
    after[:, 2:] = -torch.inf
    _, draw = Drawer(1500)(after, before, state(rows))
    ids, values = draw.top[0][:3], draw.top[0][3:]
    assert {*ids[:2]} == {0, 1} and values[2] == -1e30 and not any(draw.failed)


def wanted_is_sure(values: list[float], k: int) -> bool:
    """Not so many are equal to the last one that some may have been overlooked."""
    falling = sorted(values, reverse=True)
    return falling[k + 7] < falling[k - 1]


def test_of_equal_tokens_the_lower_id_comes_first() -> None:
    rng = random.Random(0)
    for _ in range(200):
        values = [rng.choice((-2.5, -0.0, 0.0, 1.0, 3.0, -torch.inf)) for _ in range(40)]
        x = torch.tensor([values, [-1e-40 * i for i in range(40)]])
        k = rng.randrange(1, 41)
        wanted = [sorted(range(40), key=lambda i: (-row[i], i))[:k] for row in x.tolist()]
        found, sure = likeliest(x, k, careful=True)
        assert found.tolist() == wanted and bool(sure.all())
        found, sure = likeliest(x, k, careful=False)
        assert [row for row, is_sure in zip(found.tolist(), sure, strict=True) if is_sure] == [
            row for row, is_sure in zip(wanted, sure, strict=True) if is_sure
        ]
        # The second row has no equal ones.
        assert bool(sure[1]) and bool(sure[0]) is (k + 8 >= 40 or wanted_is_sure(values, k))


def test_many_equal_tokens_are_looked_at_with_care() -> None:
    """Twenty of them, and a row beside it that has none."""
    after, before = logits(2, 3)
    after[0, 100:120] = before[0, 100:120] = 30.0
    _, draw = Drawer(1500)(after, before, state([Request((5,), 1.0, top_logprobs=5)] * 2))
    assert draw.top[0][:5] == (100, 101, 102, 103, 104)
    wanted = (after[1] + (after[1] - before[1])).topk(5).indices
    assert draw.top[1][:5] == tuple(wanted.tolist()) and not any(draw.failed)


def test_a_vocabulary_that_has_fewer_gives_all() -> None:
    draw = Drawer(6)(*(x[:, :6] for x in logits(1, 3)), state([Request((5,), top_logprobs=20)]))[1]
    assert sorted(draw.top[0][:6]) == list(range(6)) and len(draw.top[0]) == 12


def test_one_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Request((5,), i % 3, seed=i, top_logprobs=i % 4, kl=i % 2 == 0, min_tokens=i % 5)
        for i in range(30)
    ]
    drawer, at = Drawer(1500, [2, 9]), state(rows)
    drawer(*logits(30, 9, spread=9.0), at)  # which tokens end a row is brought there once
    copies: Counter[str] = Counter()
    for name in ("tolist", "cpu"):
        own = getattr(Tensor, name)

        def counted(self: Tensor, *, name: str = name, own: Any = own) -> Any:
            copies[name] += 1
            return own(self)

        monkeypatch.setattr(Tensor, name, counted)
    with Syncs() as syncs:
        drawer(*logits(30, 9, spread=9.0), at)
    assert copies == {"tolist": 1} and not syncs.seen


def test_rows_that_start_again_record_anew(tiny_pair: ModelPair) -> None:
    """Memory for three rows at a time, whatever is tried."""
    requests = [replace(r, ignore_eos=True) for r in everything(tiny_pair)[:12]]
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
    for request, a, b in zip(requests, done, wanted, strict=True):
        assert a.token_ids == b.token_ids
        check(tiny_pair, request, a)


# -- rows that must not end too soon -------------------------------------------------------


def test_no_eos_is_drawn_too_soon(tiny_pair: ModelPair) -> None:
    rng = random.Random(3)
    plain = [replace(r, max_new_tokens=40, grid=(), watch=()) for r in gated(tiny_pair, 24)]
    plain += [replace(r, max_new_tokens=40) for r in everything(tiny_pair)]
    requests = [replace(r, min_tokens=rng.choice((0, 1, 7, 30, 40))) for r in plain]
    wanted = [reference(tiny_pair, request) for request in requests]
    done = Engine(tiny_pair).generate(requests)
    assert [c.token_ids for c in done] == wanted
    short = 0
    for before, request, completion in zip(
        Engine(tiny_pair).generate(plain), requests, done, strict=True
    ):
        assert len(completion.token_ids) >= request.min_tokens
        assert completion.eos_index is None or completion.eos_index >= request.min_tokens
        same = len(before.token_ids) > request.min_tokens
        assert not same or completion.token_ids == before.token_ids
        short += not same
    assert short > 5  # of the rows would have ended sooner


def test_where_the_eos_alone_is_plausible_the_best_other_token_is_drawn() -> None:
    after, before = logits(8, 4)
    after[:, 9] = before[:, 9] = 50.0
    rows = [Request((5,), 1.0, seed=i, plausible=1.0, min_tokens=i % 2) for i in range(8)]
    rows = [replace(r, top_k=1) if i > 3 else r for i, r in enumerate(rows)]
    at = state(rows)._replace(step=torch.zeros(8, dtype=torch.int64))
    draw = Drawer(1500, [9])(after, before, at)[1]
    assert not any(draw.failed)
    others = after.masked_fill(torch.arange(1500) == 9, -torch.inf).argmax(-1).tolist()
    assert draw.tokens == [others[i] if i % 2 else 9 for i in range(8)]


TOKENIZER = byte_tokenizer()


def first_hit(drawn: list[int], fewest: int, *stops: str) -> int | None:
    request = Request((5,), stop=stops, min_tokens=fewest, max_new_tokens=400)
    hits = (n for n in range(1, len(drawn) + 1) if hits_stop(TOKENIZER, request, drawn[:n], None))
    return next(hits, None)


def test_a_stop_string_counts_from_the_token_after_the_fewest() -> None:
    drawn = list(TOKENIZER.encode("xyxyzzxyz", add_special_tokens=False))
    assert len(drawn) == 9  # one a character
    assert [first_hit(drawn, n, "xy") for n in (0, 1, 2, 3, 4, 7, 8)] == [2, 2, 4, 4, 8, 8, None]
    # It may have begun before.
    assert first_hit(drawn, 3, "yxyz") == 5
    # The earlier ones are text.
    text = Text("xyxyzzxyz", None)
    assert cut_at_stop(text, ["xy"], 4) == Text("xyxyzz", None)
    assert cut_at_stop(text, ["xy"], 3) == Text("xy", None)
    assert cut_at_stop(text, ["xy"], 0) == Text("", None)


def test_stop_strings_of_completions_that_must_not_end_too_soon(tiny_pair: ModelPair) -> None:
    asked = [replace(r, ignore_eos=True, max_new_tokens=30) for r in ask(tiny_pair, 8)]
    stops = (" ", "e", "th")
    seen = 0
    for fewest in (0, 5, 29, 30):
        asked = [replace(r, min_tokens=fewest) for r in asked]
        limited = [replace(r, stop=stops) for r in asked]
        free = Engine(tiny_pair).generate(asked)
        for whole, done in zip(free, Engine(tiny_pair).generate(limited), strict=True):
            n = len(done.token_ids)
            assert n > fewest or (n == 30 and done.finish_reason == "length")
            assert whole.text.startswith(done.text)
            if done.finish_reason == "stop":
                seen += 1
                assert any(whole.text[len(done.text) :].startswith(stop) for stop in stops)
    assert seen > 8


def test_padded_vocabularies_and_eos_ids_beyond_them() -> None:
    assert Drawer(10, [3, 12])._eos_ids == [3]


def test_random_pairs_of_other_kinds_record_too() -> None:
    pair = random_pair("gptj", n_embd=32, n_head=4, n_layer=2, rotary_dim=4)
    request = Request((5, 6), 1.5, max_new_tokens=6, top_logprobs=4, kl=True, ignore_eos=True)
    requests = request.samples(5)
    for row, done in zip(requests, Engine(pair).generate(requests), strict=True):
        assert done.token_ids == reference(pair, row)
        check(pair, row, done)
