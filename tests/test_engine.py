import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import byte_tokenizer, random_model, random_pair
from reference import reference

from lda_core import (
    ConfigError,
    ContextLengthExceeded,
    DoesNotFit,
    Engine,
    EngineConfig,
    ModelPair,
    Overdue,
    Request,
    RequestError,
    encode,
    self_test,
)
from lda_core.errors import SelfTestFailed
from lda_core.lockstep import Lockstep, Wanted
from lda_core.model_runner import ModelRunner, StepInput

QUESTIONS = [
    "What is the capital of France?",
    "Tell me a story about a mango.",
    "What is 3 plus 4?",
    "Say hello.",
    "Name three colours",
]


def mixed_requests(pair: ModelPair, n: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            encode(pair.tokenizer, rng.choice(QUESTIONS), rng.choice(("raw", "alpaca"))).ids,
            alpha=rng.choice((-1.0, 0.0, 0.5, 1.0, 3.0)),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.9, 0.5)),
            top_k=rng.choice((0, 0, 5)),
            seed=rng.randrange(2**40),
            max_new_tokens=rng.randrange(1, 40),
            ignore_eos=rng.random() < 0.3,
        )
        for _ in range(n)
    ]


def tokens(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests)]


def test_mixed_batches_equal_the_reference_token_for_token(tiny_pair: ModelPair) -> None:
    requests = mixed_requests(tiny_pair, 40)
    expected = [reference(tiny_pair, request) for request in requests]
    assert tokens(Engine(tiny_pair), requests) == expected
    # Few slots and little memory: rows wait, join late, move, and the slots are laid out anew.
    tight = EngineConfig(max_slots=5, kv_tokens=260, prefill_tokens=30)
    assert tokens(Engine(tiny_pair, tight), requests) == expected


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_greedy_alpha_0_and_minus_1_equal_generate(tiny_pair: ModelPair, alpha: float) -> None:
    model = tiny_pair.after if alpha == 0 else tiny_pair.before
    requests = [
        Request(encode(tiny_pair.tokenizer, q, "alpaca").ids, alpha, temperature=0.0)
        for q in QUESTIONS
    ]
    for request, drawn in zip(requests, tokens(Engine(tiny_pair), requests), strict=True):
        ids = torch.tensor([request.prompt_ids])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80
        )
        assert drawn == generated[0, ids.shape[1] :].tolist()


def test_a_row_does_not_depend_on_batch_order_or_neighbours(tiny_pair: ModelPair) -> None:
    requests = mixed_requests(tiny_pair, 24, seed=1)
    together = tokens(Engine(tiny_pair), requests)
    alone = [tokens(Engine(tiny_pair), [request])[0] for request in requests]
    assert together == alone
    order = random.Random(2).sample(range(24), 24)
    shuffled = tokens(Engine(tiny_pair, EngineConfig(max_slots=7)), [requests[i] for i in order])
    assert shuffled == [alone[i] for i in order]
    neighbours = mixed_requests(tiny_pair, 30, seed=3)
    assert tokens(Engine(tiny_pair), neighbours + requests)[30:] == alone


def test_rows_join_while_others_decode(tiny_pair: ModelPair) -> None:
    requests = mixed_requests(tiny_pair, 12, seed=4)
    expected = [reference(tiny_pair, request) for request in requests]
    engine = Engine(tiny_pair)
    rows = []
    for request in requests:
        rows.append(engine.accept(request))
        engine.enqueue(rows[-1])
        engine.step()
        engine.step()
    assert engine.live_rows > 1
    while not engine.idle:
        engine.step()
    assert [row.completion.token_ids for row in rows if row.completion] == expected


def test_samples_differ_by_seed_and_are_single_requests(tiny_pair: ModelPair) -> None:
    prompt = encode(tiny_pair.tokenizer, "Tell me a story.", "alpaca").ids
    request = Request(prompt, alpha=1.0, seed=5, max_new_tokens=30)
    samples = Engine(tiny_pair).generate(request.samples(8))
    assert [s.seed for s in samples] == list(range(5, 13))
    assert len({tuple(s.token_ids) for s in samples}) > 1
    assert samples[3] == Engine(tiny_pair).generate([replace(request, seed=8)])[0]


def test_a_distinct_prompt_is_prefilled_once(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_pair)
    seen: list[int] = []
    original = Lockstep._read

    def counted(self: Lockstep, piece: list[Wanted], *args: Any) -> None:
        seen.append(len(piece))
        original(self, piece, *args)

    monkeypatch.setattr(Lockstep, "_read", counted)
    a, b = (Request(encode(tiny_pair.tokenizer, q).ids, max_new_tokens=3) for q in QUESTIONS[:2])
    engine.generate([*a.samples(10), *b.samples(10)])
    assert seen == [2]


def test_fixed_length_and_eos(tiny_pair: ModelPair) -> None:
    prompt = encode(tiny_pair.tokenizer, "What is 3 plus 4?", "alpaca").ids
    request = Request(prompt, alpha=0.0, seed=1, max_new_tokens=60)
    stopping = Engine(tiny_pair).generate([request])[0]
    fixed = Engine(tiny_pair).generate([replace(request, ignore_eos=True)])[0]
    assert stopping.finish_reason == "eos" and fixed.finish_reason == "length"
    assert stopping.eos_index == len(stopping.token_ids) - 1 == fixed.eos_index
    assert len(fixed.token_ids) == 60
    assert fixed.token_ids[: len(stopping.token_ids)] == stopping.token_ids
    assert fixed.eos_text_offset == len(stopping.text) == stopping.eos_text_offset
    assert fixed.text[: fixed.eos_text_offset] == stopping.text
    assert len(fixed.text) > len(stopping.text)


def test_the_completion_excludes_the_prompt(tiny_pair: ModelPair) -> None:
    """Rows of different prompt lengths in one batch: the fault was slicing at one length."""
    requests = [
        Request(encode(tiny_pair.tokenizer, q, "alpaca").ids, seed=i, max_new_tokens=24)
        for i, q in enumerate(QUESTIONS)
    ]
    for question, done in zip(QUESTIONS, Engine(tiny_pair).generate(requests), strict=True):
        assert "###" not in done.text and question not in done.text
        assert done.text
        assert done.prompt_tokens == len(encode(tiny_pair.tokenizer, question, "alpaca").ids)


def test_log_probabilities_are_those_of_plain_forward_passes(tiny_pair: ModelPair) -> None:
    prompt = encode(tiny_pair.tokenizer, QUESTIONS[0], "alpaca").ids
    request = Request(prompt, alpha=2.0, seed=3, max_new_tokens=12, logprobs=True, top_k=20)
    done = Engine(tiny_pair).generate([request, *mixed_requests(tiny_pair, 5)])[0]
    ids = torch.tensor([[*prompt, *done.token_ids]])
    with torch.inference_mode():
        after, before = (
            m(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            for m in (tiny_pair.after, tiny_pair.before)
        )
    drawn = torch.tensor(done.token_ids).unsqueeze(-1)
    assert done.logprobs is not None
    for name, logits in (
        ("after", after),
        ("before", before),
        ("amplified", after + 2.0 * (after - before)),
    ):
        expected = logits.log_softmax(-1).gather(-1, drawn).squeeze(-1)
        seen = torch.tensor(getattr(done.logprobs, name))
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_stop_strings_across_token_borders(tiny_pair: ModelPair) -> None:
    prompt = encode(tiny_pair.tokenizer, "Tell me a story.", "alpaca").ids
    plain = Request(prompt, alpha=0.0, seed=2, max_new_tokens=40, ignore_eos=True)
    whole = Engine(tiny_pair).generate([plain])[0]
    for start in range(1, 20, 3):
        stop = whole.text[start : start + 5]
        done = Engine(tiny_pair).generate([replace(plain, stop=("\x00never", stop))])[0]
        assert done.finish_reason == "stop"
        assert done.text == whole.text[: whole.text.index(stop)]
        assert whole.token_ids[: len(done.token_ids)] == done.token_ids
        # It stopped at once: without the last token the stop is not there yet.
        shorter = replace(plain, max_new_tokens=max(1, len(done.token_ids) - 1))
        assert stop not in Engine(tiny_pair).generate([shorter])[0].text or len(done.token_ids) == 1


def test_no_half_characters_in_a_text() -> None:
    pair = random_pair()
    requests = [Request((5, 6), seed=i, max_new_tokens=9, ignore_eos=True) for i in range(64)]
    completions = Engine(pair).generate(requests)
    assert all(len(c.token_ids) == 9 for c in completions)
    assert not any(c.text.endswith("\ufffd") for c in completions)


def test_a_row_that_leaves_frees_its_slot_and_changes_nobody(tiny_pair: ModelPair) -> None:
    requests = [
        replace(r, ignore_eos=True, max_new_tokens=20) for r in mixed_requests(tiny_pair, 6)
    ]
    expected = [reference(tiny_pair, request) for request in requests]
    engine = Engine(tiny_pair, EngineConfig(max_slots=4))
    rows = [engine.accept(request) for request in requests]
    for row in rows:
        engine.enqueue(row)
    engine.step()
    rows[1].left = rows[5].left = True  # one decoding, one still waiting
    out = engine.step()
    assert {id(row) for row in out} == {id(rows[1]), id(rows[5])}
    while not engine.idle:
        engine.step()
    for i in (0, 2, 3, 4):
        completion = rows[i].completion
        assert completion is not None and completion.token_ids == expected[i]
    assert rows[1].completion is None and rows[5].completion is None


def test_a_row_with_nan_ends_in_an_error_and_the_others_go_on() -> None:
    pair = random_pair()
    with torch.no_grad():
        pair.after.get_input_embeddings().weight[77] = torch.nan
    bad = Request((5, 77, 9), seed=1, max_new_tokens=8, ignore_eos=True)
    good = [Request((5, 6 + i), seed=i, max_new_tokens=8, ignore_eos=True) for i in range(6)]
    expected = [reference(pair, request) for request in good]
    assert not any(77 in ids for ids in expected)
    # Two slots: a good row follows the bad one into its slot.
    done = Engine(pair, EngineConfig(max_slots=2)).generate([good[0], bad, *good[1:]])
    assert done[1].finish_reason == "error" and done[1].error == "logits are not finite"
    assert [c.token_ids for i, c in enumerate(done) if i != 1] == expected


def test_padded_output_layers_are_mixed_on_the_common_part() -> None:
    narrow, wide = random_pair(), random_pair(vocab_size=336)
    pair = ModelPair.of(wide.after, narrow.before, narrow.tokenizer)
    assert pair.vocab_size == 320
    assert any("336 (after) and 320 (before)" in notice for notice in pair.notices)
    requests = [Request((5, 6), seed=i, max_new_tokens=10, ignore_eos=True) for i in range(20)]
    completions = tokens(Engine(pair), requests)
    assert completions == [reference(pair, request) for request in requests]
    assert max(max(ids) for ids in completions) < 320


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request((1, 768)), RequestError, "between 0 and 767"),
        (Request((1, -1)), RequestError, "between 0 and 767"),
        (Request((1,) * 500, max_new_tokens=13), ContextLengthExceeded, "500 prompt .* 13 .* 512"),
        (Request((1,) * 60, max_new_tokens=41), DoesNotFit, "100 tokens .* 99 are there"),
    ],
)
def test_what_cannot_be_served_is_refused_before_any_work(
    tiny_pair: ModelPair, request_: Request, error: type[RequestError], words: str
) -> None:
    engine = Engine(tiny_pair, EngineConfig(kv_tokens=99))
    with pytest.raises(error, match=words):
        engine.generate([Request((1, 5)), request_])
    assert engine.idle
    assert engine.generate([Request((1, 5), max_new_tokens=2)])[0].error is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", ()),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2**31),
        ("prompt_ids", (True, 5)),
        ("prompt_ids", (1.5, 5)),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("a", "")),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("min_tokens", -1),
        ("min_tokens", 81),
    ],
)
def test_request_values_out_of_range_name_the_field(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field.removesuffix("_ids")):
        Request(**{"prompt_ids": (1,), field: value})  # type: ignore[arg-type]


def test_the_default_budget_is_what_memory_allows(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_token = 2 * 3 * 2 * 2 * 32 * 4  # models, layers, keys and values, heads, head size, bytes
    assert Engine(tiny_pair).kv_tokens == 64 * 512
    monkeypatch.setattr("lda_core.engine._CPU_KV_BYTES", 100 * per_token + 5)
    engine = Engine(tiny_pair)
    assert engine.kv_tokens == 100
    with pytest.raises(DoesNotFit):
        engine.accept(Request((1,) * 60, max_new_tokens=42))
    monkeypatch.setattr("lda_core.engine._CPU_KV_BYTES", per_token - 1)
    with pytest.raises(ConfigError, match="no memory is left"):
        Engine(tiny_pair)


def test_prefill_passes_are_bounded(tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[int] = []
    original = ModelRunner.read

    def counted(self: ModelRunner, ids: torch.Tensor, *args: Any) -> None:
        padded.append(ids.numel())
        original(self, ids, *args)

    monkeypatch.setattr(ModelRunner, "read", counted)
    # Many short prompts go in several passes; a long one is read in pieces.
    prompts = [tuple(3 + i % 700 for i in range(n)) for n in (*range(2, 40), 150, 200)]
    requests = [Request(prompt, max_new_tokens=2) for prompt in prompts]
    done = tokens(Engine(tiny_pair, EngineConfig(prefill_tokens=64)), requests)
    assert len(padded) > 20 and max(padded) <= 64
    assert done == [reference(tiny_pair, request) for request in requests]


def test_an_interrupted_generate_leaves_nothing_behind(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_pair)
    with monkeypatch.context() as patch:
        steps = iter((engine.step, engine.step))
        original = engine.step

        def interrupted() -> object:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return original()

        patch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(mixed_requests(tiny_pair, 90))
    assert engine.live_rows > 0
    one = mixed_requests(tiny_pair, 1)
    assert tokens(engine, one) == [reference(tiny_pair, one[0])]
    assert engine.idle


def test_a_tiny_temperature_is_nearly_greedy(tiny_pair: ModelPair) -> None:
    prompt = encode(tiny_pair.tokenizer, QUESTIONS[0], "alpaca").ids
    greedy, *tiny = tokens(
        Engine(tiny_pair),
        [Request(prompt, alpha=2.0, temperature=t, seed=1) for t in (0.0, 1e-3, 1e-20, 1e-38)],
    )
    assert all(ids == greedy for ids in tiny)


def test_eos_of_either_model_ends_a_row(tiny_pair: ModelPair) -> None:
    """docs/decisions/0003: *before* calls another token EOS than *after*."""
    pair = random_pair()
    pair.before.generation_config.eos_token_id = [7, 9]
    pair = ModelPair.of(pair.after, pair.before, pair.tokenizer)
    assert pair.eos_ids == {2, 7, 9}
    done = Engine(pair).generate([Request((5,), seed=i, max_new_tokens=60) for i in range(40)])
    ends = {c.token_ids[-1] for c in done if c.finish_reason == "eos"}
    assert ends <= {2, 7, 9} and len(ends) > 1


def test_the_self_test_leaves_the_memory_to_the_engine(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[int] = []
    original = Lockstep.allocate

    def noted(self: Lockstep, kv_tokens: int, *args: int) -> None:
        budgets.append(kv_tokens)
        original(self, kv_tokens, *args)

    monkeypatch.setattr(Lockstep, "allocate", noted)
    self_test(tiny_pair)
    assert max(budgets) <= 64


def test_memory_budget_is_never_exceeded(tiny_pair: ModelPair) -> None:
    engine = Engine(tiny_pair, EngineConfig(max_slots=16, kv_tokens=300))
    rows = [engine.accept(r) for r in mixed_requests(tiny_pair, 40, seed=7)]
    for row in rows:
        engine.enqueue(row)
    most = 0
    while not engine.idle:
        engine.step()
        layout = engine._layout
        assert layout is not None
        assert layout.slots * layout.columns + layout.prefixes * layout.prefix_columns <= 300
        assert engine.live_rows <= layout.slots and len(engine._prefixes) <= layout.prefixes
        most = max(most, engine.live_rows)
    assert most > 3


def test_fewer_rows_after_out_of_memory_and_more_again_later(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lda_core.engine._CALM_STEPS", 60)
    engine, original, live = Engine(tiny_pair, EngineConfig(max_slots=16)), Engine._advance, []
    failing = [True]

    def once(self: Engine) -> object:
        if failing and self.live_rows == 16:
            failing.clear()
            raise torch.OutOfMemoryError("injected")
        result = original(self)
        live.append(self.live_rows)
        return result

    monkeypatch.setattr(Engine, "_advance", once)
    engine.generate(Request((5, 6), max_new_tokens=30, ignore_eos=True).samples(80))
    # The sixteen go on; those that follow them are eight at a time, for a while.
    first = live.index(8)
    assert max(live[:first]) == 16 and max(live[first : first + 30]) == 8
    assert max(live[first + 31 :]) == 16


def test_a_row_too_large_for_memory_ends_in_an_error_and_the_engine_lives(
    tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_pair)
    original = ModelRunner.decode_step

    def too_wide(self: ModelRunner, step: StepInput) -> Any:
        if step.width > 60:
            raise torch.OutOfMemoryError("injected")
        return original(self, step)

    monkeypatch.setattr(ModelRunner, "decode_step", too_wide)
    small = [Request((5, 6 + i), seed=i, max_new_tokens=20, ignore_eos=True) for i in range(6)]
    large = Request((5, 6), seed=1, max_new_tokens=100, ignore_eos=True)
    done = engine.generate([*small[:3], large, *small[3:]])
    assert done[3].finish_reason == "error" and done[3].error is not None
    assert "out of memory: 2 prompt tokens and 100 new ones" in done[3].error
    assert [c.token_ids for i, c in enumerate(done) if i != 3] == [
        reference(tiny_pair, request) for request in small
    ]
    assert engine.idle


def test_self_test_passes_and_notices_a_broken_pair(tiny_pair: ModelPair) -> None:
    self_test(tiny_pair)
    broken = random_pair()
    with torch.no_grad():
        broken.after.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(SelfTestFailed, match="after: logits are not finite"):
        self_test(broken)


def test_interrupted_while_rows_join(tiny_pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_pair, EngineConfig(max_slots=4))

    def interrupted(*args: Any, **kw: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._pair, "fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(mixed_requests(tiny_pair, 6))
    one = mixed_requests(tiny_pair, 1, seed=3)
    assert tokens(engine, one) == [reference(tiny_pair, one[0])]
    assert engine.idle


def test_a_model_against_itself_draws_the_same_at_every_alpha() -> None:
    """All layers are common to both; one of them still keeps before's cache."""
    model = random_model("llama", seed=0)
    pair = ModelPair.of(model, random_model("llama", seed=0), byte_tokenizer())
    requests = [
        Request((1, 7, 9), alpha=a, seed=3, max_new_tokens=6, logprobs=True) for a in (0, 1, 5)
    ]
    done = Engine(pair).generate(requests)
    assert len({tuple(completion.token_ids) for completion in done}) == 1
    assert done[2].token_ids == reference(pair, requests[2])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_row_ends_at_its_deadline_with_what_it_has(tiny_pair: ModelPair) -> None:
    """At the first step after it; its neighbours, its tokens and its text are as without one."""
    engine = Engine(tiny_pair, EngineConfig(max_slots=2))
    clock = engine._pace.clock = Clock()
    request = Request((5, 6, 7), seed=3, max_new_tokens=30, ignore_eos=True, logprobs=True)
    other = replace(request, seed=4)
    late, free = engine.accept(request, within_s=10.0), engine.accept(other)
    for row in (late, free):
        engine.enqueue(row)
    told: list[int] = []
    late.on_token = lambda: told.append(len(late.token_ids))
    for _ in range(9):
        clock.now += 1.0
        assert engine.step() == []
    clock.now += 1.0
    assert engine.step() == [late] and told == [*range(1, 10), 9]
    done = late.completion
    assert done is not None and done.finish_reason == "length" and done.error is None
    assert done.token_ids == reference(tiny_pair, request)[:9]
    assert done.logprobs is not None and len(done.logprobs.after) == 9
    assert tiny_pair.tokenizer.decode(done.token_ids).startswith(done.text)
    while not engine.idle:
        clock.now += 1.0
        engine.step()
    assert free.completion is not None
    assert free.completion.token_ids == reference(tiny_pair, other)
    assert engine.stats.overdue == 1


def test_a_row_that_still_waits_at_its_deadline_is_refused(tiny_pair: ModelPair) -> None:
    engine = Engine(tiny_pair, EngineConfig(max_slots=1))
    clock = engine._pace.clock = Clock()
    first = engine.accept(Request((5, 6), max_new_tokens=20, ignore_eos=True))
    second = engine.accept(Request((5, 6), max_new_tokens=3, ignore_eos=True), within_s=5.0)
    third = engine.accept(Request((5, 6), max_new_tokens=3, ignore_eos=True))
    for row in (first, second, third):
        engine.enqueue(row)
    out = []
    while not engine.idle:
        out += engine.step()
        clock.now += 1.0
    assert out == [second, first, third]
    assert isinstance(second.refused, Overdue) and second.token_ids == []
    assert second.completion is not None and second.completion.finish_reason == "error"
    assert first.refused is None and third.refused is None and engine.stats.overdue == 1
