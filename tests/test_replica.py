"""The replica without Ray: admission, cancelling, health."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import TINY

from deployments.replica import LDAReplica
from deployments.schemas import (
    CaptureRequest,
    Continuation,
    GenerateRequest,
    InvalidRequest,
    Limits,
    NotReady,
    Overdue,
    Piece,
    ReplicaUnavailable,
    ScoreRequest,
)
from lda_core import EngineConfig, ModelPair, PairConfig
from lda_core.model_runner import ModelRunner, StepInput


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch, tiny_pair: ModelPair) -> Iterator[LDAReplica]:
    """With what `serve.batch` does replaced by its simplest form: a batch of one. The pair was
    loaded before, and is not looked at again: see test_pair.py."""
    monkeypatch.setattr("deployments.replica.die", lambda: None)
    monkeypatch.setattr("lda_core.ModelPair.load", lambda config: tiny_pair)
    monkeypatch.setattr("lda_core.self_test", lambda pair: None)
    monkeypatch.setattr("lda_core.noise_floor", lambda pair: {0.0: 5e-6, 1.0: 1e-5})
    replica = LDAReplica(
        PairConfig(before=str(TINY / "before"), after=str(TINY / "after")),
        EngineConfig(max_slots=4),
        stuck_after_s=30,
    )

    async def admit(rows: Any) -> Any:
        return replica._submit([rows])[0]

    async def admit_captures(rows: Any) -> Any:
        return replica._submit_captures([rows])[0]

    monkeypatch.setattr(replica, "_admit", admit)
    monkeypatch.setattr(replica, "_admit_captures", admit_captures)
    yield replica
    replica._engine.stop()


def request(**changes: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "Hi", "seed": 1, "ignore_eos": True, **changes})


def test_batch_settings_are_live_and_checked() -> None:
    replica = LDAReplica.__new__(LDAReplica)
    replica.reconfigure({"max_batch_size": 7, "batch_wait_timeout_s": 0.25})
    for door in (replica._admit, replica._admit_captures):
        assert door._get_max_batch_size() == 7
        assert door._get_batch_wait_timeout_s() == 0.25
    for bad in ({"max_batch_size": 0}, {"max_batch_sise": 3}, {"batch_wait_timeout_s": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replica.reconfigure(bad)


def test_items_admitted_together_get_their_own_futures(replica: LDAReplica) -> None:
    items = [replica._rows(request(n=n, seed=n, max_new_tokens=3), 60.0)[1] for n in (1, 3, 2)]
    futures = replica._submit(items)
    assert [len(f) for f in futures] == [1, 3, 2]
    for rows, group in zip(items, futures, strict=True):
        assert [f.result(timeout=30).seed for f in group] == [r.request.seed for r in rows]


def test_cancelling_frees_the_rows(replica: LDAReplica) -> None:
    async def leave() -> None:
        asking = asyncio.create_task(replica.generate(request(n=8, max_new_tokens=400)))
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if replica._engine.engine.live_rows == 4:
                break
        assert replica._engine.engine.live_rows == 4
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        for _ in range(300):
            if replica._engine.engine.idle:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("rows are still there")

    asyncio.run(leave())
    done = asyncio.run(replica.generate(request(max_new_tokens=5)))
    assert len(done[0].token_ids) == 5


def test_a_bad_request_is_refused_before_it_joins(replica: LDAReplica) -> None:
    with pytest.raises(InvalidRequest, match="do not fit in the context of 512") as caught:
        asyncio.run(replica.generate(request(max_new_tokens=600)))
    assert caught.value.code == "context_length_exceeded"
    assert replica._engine.engine.idle


def test_a_stuck_engine_fails_the_health_check(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[bool] = []
    monkeypatch.setattr("deployments.replica.die", lambda: died.append(True))
    release = threading.Event()
    step = replica._engine.engine.step
    monkeypatch.setattr(replica._engine.engine, "step", lambda: (release.wait(30), step())[1])
    replica._stuck_after_s = 0.2

    async def ask() -> None:
        asking = asyncio.create_task(replica.generate(request(max_new_tokens=2)))
        while time.monotonic() - replica._engine._beat < 0.2:
            await asyncio.sleep(0.01)
        replica.check_health()
        assert died == []  # one late look may be a machine that stood still
        with pytest.raises(Exception, match="no step"):
            replica.check_health()
        assert died == [True]  # what it holds would keep it until draining is given up
        with pytest.raises(NotReady, match="no step") as caught:
            await replica.describe()
        assert caught.value.code == "engine_stuck"
        release.set()
        await asking

    asyncio.run(ask())
    replica.check_health()


def test_an_engine_that_goes_on_after_its_machine_stood_still_is_not_ended(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.replica.die", lambda: pytest.fail("it lives"))
    for _ in range(3):  # each time the check comes first, then the engine's own thread
        with monkeypatch.context() as frozen:
            frozen.setattr(replica, "_stuck_after_s", -1.0)
            replica.check_health()
        replica.check_health()


def test_a_dead_engine_fails_requests_and_the_health_check(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[bool] = []
    monkeypatch.setattr("deployments.replica.die", lambda: died.append(True))
    replica.check_health()
    asyncio.run(replica.describe())

    def fail() -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(replica._engine.engine, "step", fail)
    for _ in range(2):  # the row in flight, then one that comes too late
        with pytest.raises(ReplicaUnavailable):
            asyncio.run(replica.generate(request()))
    replica._engine._thread.join(30)
    assert died == [True]  # the process ends, so that no more requests come here
    with pytest.raises(Exception, match="device lost"):
        replica.check_health()
    with pytest.raises(ReplicaUnavailable, match="device lost"):
        asyncio.run(replica.describe())


def test_at_its_deadline_a_request_is_answered_with_what_it_has(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its rows that never had a slot say so; where none had, the request is refused."""
    clock = [time.monotonic()]
    step, pace = replica._engine.engine.step, replica._engine.engine._pace

    def slow() -> Any:  # each takes a second
        clock[0] += 1.0
        return step()

    monkeypatch.setattr(pace, "clock", lambda: clock[0])
    monkeypatch.setattr(replica._engine.engine, "step", slow)
    monkeypatch.setattr(replica, "_limits", Limits(max_request_s=10.0))
    done = asyncio.run(replica.generate(request(n=6, max_new_tokens=100)))
    assert [c.finish_reason for c in done] == ["length"] * 4 + ["error"] * 2
    assert all(5 < len(c.token_ids) <= 10 for c in done[:4])
    assert all(c.token_ids == [] and "waiting for a slot" in (c.error or "") for c in done[4:])

    async def both(how: Any) -> Any:
        beside = asyncio.create_task(replica.generate(request(n=4, max_new_tokens=100)))
        while not replica._engine.engine.live_rows:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(replica, "_limits", Limits(max_request_s=2.0))
        with pytest.raises(Overdue):
            await how(replica, request(max_new_tokens=5))
        return await beside

    async def first_piece(replica: LDAReplica, asked: GenerateRequest) -> None:
        await anext(replica.stream(asked))

    for how in (LDAReplica.generate, pieces_of, first_piece):
        monkeypatch.setattr(replica, "_limits", Limits(max_request_s=60.0))
        assert {c.finish_reason for c in asyncio.run(both(how))} == {"length"}


def test_what_comes_after_its_deadline_or_is_not_read_by_then_is_overdue(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(max_new_tokens=5)
    scored = ScoreRequest(prompt="Hi", continuations=[Continuation(text=" you")])
    captured = CaptureRequest(prompt="Hi")
    over = time.time() - 1
    for late in (
        replica.generate(asked, over),
        replica.score(scored, over),
        replica.capture(captured, None, over),
    ):
        with pytest.raises(Overdue):
            asyncio.run(late)  # type: ignore[arg-type]
    assert replica._engine.engine.idle
    release = threading.Event()
    piece = replica._engine.engine.piece_step
    monkeypatch.setattr(
        replica._engine.engine, "piece_step", lambda: (release.wait(30), piece())[1]
    )
    for held in (
        replica.score(scored, time.time() + 0.2),
        replica.capture(captured, None, time.time() + 0.2),
    ):
        with pytest.raises(Overdue):
            asyncio.run(held)  # type: ignore[arg-type]
    release.set()
    asyncio.run(until_idle(replica))
    assert asyncio.run(replica.score(scored, time.time() + 60))


def test_a_row_that_memory_cannot_hold_is_the_callers_error(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = ModelRunner.decode_step

    def full(self: ModelRunner, step: StepInput) -> object:
        if step.width > 20:
            raise torch.OutOfMemoryError("injected")
        return decode(self, step)

    monkeypatch.setattr(ModelRunner, "decode_step", full)
    with pytest.raises(InvalidRequest, match=r"out of memory: \d+ prompt tokens and 40") as error:
        asyncio.run(replica.generate(request(max_new_tokens=40)))
    assert (error.value.param, error.value.code) == ("max_new_tokens", "does_not_fit")
    # What fits is still answered.
    assert asyncio.run(replica.generate(request(max_new_tokens=10)))[0].token_ids


def test_what_the_engine_counts_is_exported(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, float] = {}
    for name, counter in replica._metrics._counters.items():
        monkeypatch.setattr(
            counter, "inc", lambda n, name=name: counted.update({name: counted.get(name, 0) + n})
        )
    asyncio.run(replica.generate(request(n=3, max_new_tokens=5)))
    asyncio.run(replica.generate(request(n=2, max_new_tokens=5)))
    assert counted["tokens"] == 25 and counted["prefix_lookups"] == 2
    assert counted["prefix_hits"] == 1  # the same prompt again


@pytest.mark.parametrize("allowed", [False, True])
def test_special_tokens_in_a_continuation_are_text_unless_allowed(
    replica: LDAReplica, allowed: bool
) -> None:
    eos = replica._pair.tokenizer.eos_token_id
    (scored,) = asyncio.run(
        replica.score(
            ScoreRequest(
                prompt="Hi",
                continuations=[Continuation(text="Bye</s>")],
                allow_special_tokens=allowed,
            )
        )
    )
    assert (scored.token_ids[-1] == eos) is allowed and scored.token_ids.count(eos) == allowed
    assert replica._pair.tokenizer.decode(scored.token_ids) == "Bye</s>"


def test_a_prefill_is_read_and_not_answered(replica: LDAReplica) -> None:
    begun = request(max_new_tokens=6, prompt_format="alpaca", prefill="Well, ")
    form = "### Instruction:\nHi\n\n### Response:\nWell, "
    (answer,) = asyncio.run(replica.generate(begun))
    assert [answer] == asyncio.run(replica.generate(request(max_new_tokens=6, prompt=form)))
    assert answer.formatted_prompt == form and not answer.text.startswith("Well")


def test_a_prompt_in_tokens_is_that_prompt(replica: LDAReplica) -> None:
    text = request(n=2, max_new_tokens=6, prompt_format="alpaca", prompt="Hi")
    ids = list(replica._rows(text, 60.0)[1][0].request.prompt_ids)
    tokens = request(n=2, max_new_tokens=6, prompt=None, prompt_ids=ids)
    assert asyncio.run(replica.generate(tokens)) == asyncio.run(replica.generate(text))
    said = [Continuation(text=" you")]
    (wanted,) = asyncio.run(replica.score(ScoreRequest(prompt="Hi", continuations=said)))
    ids = list(replica._pair.tokenizer.encode("Hi"))
    (same,) = asyncio.run(replica.score(ScoreRequest(prompt_ids=ids, continuations=said)))
    # How many passes read a text depends on the time they take, and the last bits on these.
    assert same.token_ids == wanted.token_ids and same.after == pytest.approx(wanted.after)
    assert same.before == pytest.approx(wanted.before)
    more = ScoreRequest(prompt="Hi", continuations=said, grid=[0.0, 2.0], top=3)
    (scored,) = asyncio.run(replica.score(more))
    assert scored.at and [row[0] for row in scored.at] == scored.after
    assert scored.after == pytest.approx(wanted.after)
    assert scored.top is not None and [len(best) for best in scored.top[0]] == [3, 3]
    assert wanted.top is None


@pytest.mark.parametrize("bad", [768, 2**40])
def test_a_prompts_token_beyond_the_vocabulary_is_refused(replica: LDAReplica, bad: int) -> None:
    scored = ScoreRequest(prompt_ids=[1, bad], continuations=[Continuation(text="a")])
    for ask in (replica.generate(request(prompt=None, prompt_ids=[1, bad])), replica.score(scored)):
        with pytest.raises(InvalidRequest, match="between 0 and 767") as caught:
            asyncio.run(ask)  # type: ignore[arg-type]
        assert caught.value.param == "prompt_ids"
    too_long = request(prompt=None, prompt_ids=[5] * 600)
    with pytest.raises(InvalidRequest, match="context") as caught:
        asyncio.run(replica.generate(too_long))
    assert caught.value.param == "prompt_ids" and caught.value.code == "context_length_exceeded"


# -- while it comes ------------------------------------------------------------------------


async def pieces_of(replica: LDAReplica, asked: GenerateRequest) -> list[list[Piece]]:
    return [pieces async for pieces in replica.stream(asked)]


@pytest.mark.usefixtures("a_piece_a_step")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n": 6, "max_new_tokens": 20},
        {"n": 3, "logprobs": True, "top_logprobs": 3, "kl": True, "stop": ["e", "th"]},
        {"n": 2, "ignore_eos": False, "kl": True, "alpha": 0.0, "max_new_tokens": 60},
    ],
)
def test_the_pieces_of_a_stream_are_its_completions(
    replica: LDAReplica, changes: dict[str, Any]
) -> None:
    asked = request(**{"max_new_tokens": 12, "prompt_format": "alpaca", **changes})
    wanted = asyncio.run(replica.generate(asked))
    steps = asyncio.run(pieces_of(replica, asked))
    assert len(steps) >= max(len(done.token_ids) for done in wanted) > 1
    assert all(len({piece.index for piece in step}) == len(step) for step in steps)
    for i, done in enumerate(wanted):
        pieces = [piece for step in steps for piece in step if piece.index == i]
        assert "".join(piece.text for piece in pieces) == done.text
        assert sum((piece.token_ids for piece in pieces), []) == done.token_ids
        assert [piece.completion for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        last = pieces[-1].completion
        assert last is not None and last.token_ids == done.token_ids and last.text == done.text
        assert all(piece.alpha == asked.alpha for piece in pieces)
        for name in ("kl", "top_logprobs", "logprobs"):
            parts = [getattr(piece, name) for piece in pieces]
            if getattr(last, name) is None:
                assert parts == [None] * len(parts)
            elif name == "logprobs":
                assert last.logprobs is not None
                for column in ("after", "before", "amplified"):
                    flat = [x for part in parts for x in getattr(part, column)]
                    assert flat == getattr(last.logprobs, column)
            else:
                assert [x for part in parts for x in part] == getattr(last, name)


async def until_idle(replica: LDAReplica) -> None:
    for _ in range(300):
        if replica._engine.engine.idle:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("rows are still there")


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_stream_that_nobody_reads_any_more_frees_its_rows(replica: LDAReplica, how: str) -> None:
    async def leave() -> None:
        stream = replica.stream(request(n=8, max_new_tokens=400))
        assert await anext(stream)
        if how == "close":
            steps = replica._engine.engine.stats.steps
            await stream.aclose()
        else:
            reading = asyncio.create_task(asyncio.wait_for(anext_for_ever(stream), 60))
            await asyncio.sleep(0.05)
            steps = replica._engine.engine.stats.steps
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        await until_idle(replica)
        assert replica._engine.engine.stats.steps <= steps + 3

    asyncio.run(leave())
    assert len(asyncio.run(pieces_of(replica, request(max_new_tokens=5)))) >= 1


async def anext_for_ever(stream: Any) -> None:
    async for _ in stream:
        pass


def test_a_bad_request_is_refused_before_the_first_piece(replica: LDAReplica) -> None:
    with pytest.raises(InvalidRequest, match="do not fit in the context of 512"):
        asyncio.run(pieces_of(replica, request(max_new_tokens=600)))
    assert replica._engine.engine.idle


def test_an_engine_that_dies_ends_its_streams_in_an_error(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = replica._engine.engine.step
    left = [4]

    def fail() -> Any:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("device lost")
        return step()

    monkeypatch.setattr(replica._engine.engine, "step", fail)

    async def read() -> int:
        seen = 0
        with pytest.raises(ReplicaUnavailable, match="device lost"):
            async for pieces in replica.stream(request(max_new_tokens=50)):
                seen += sum(len(piece.token_ids) for piece in pieces)
        return seen

    assert asyncio.run(read()) <= 3
    with pytest.raises(ReplicaUnavailable):
        asyncio.run(pieces_of(replica, request()))
    replica._engine._thread.join(30)  # it ends in `die`, which must still be the fixture's


def test_a_streamed_row_that_memory_cannot_hold_is_the_callers_error(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = ModelRunner.decode_step

    def full(self: ModelRunner, step: StepInput) -> object:
        if step.width > 20:
            raise torch.OutOfMemoryError("injected")
        return decode(self, step)

    monkeypatch.setattr(ModelRunner, "decode_step", full)
    with pytest.raises(InvalidRequest, match=r"out of memory: \d+ prompt tokens and 40") as error:
        asyncio.run(pieces_of(replica, request(max_new_tokens=40)))
    assert error.value.code == "does_not_fit"


def test_a_stream_whose_rows_are_all_refused_never_begins(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever steps they are: the answer's status can still say it."""
    engine, refused = replica._engine.engine, []
    refuse = engine._refuse
    monkeypatch.setattr(engine, "_refuse", lambda new: refused.append(refuse(new)) or refused[-1])

    def full(self: ModelRunner, step: StepInput) -> object:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(ModelRunner, "decode_step", full)

    async def first_piece() -> None:
        await anext(replica.stream(request(n=3, max_new_tokens=40)))

    with pytest.raises(InvalidRequest) as error:
        asyncio.run(first_piece())
    assert error.value.code == "does_not_fit" and len(refused) == 3


def test_a_stream_tells_of_its_refused_rows_beside_the_others(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.monotonic()]
    engine = replica._engine.engine
    step = engine.step

    def slow() -> Any:
        clock[0] += 1.0
        return step()

    monkeypatch.setattr(engine._pace, "clock", lambda: clock[0])
    monkeypatch.setattr(engine, "step", slow)
    monkeypatch.setattr(replica, "_limits", Limits(max_request_s=10.0))
    steps = asyncio.run(pieces_of(replica, request(n=6, max_new_tokens=100)))
    done = {p.index: p.completion for pieces in steps for p in pieces if p.completion}
    assert sorted(done) == list(range(6))
    assert sorted(c.finish_reason for c in done.values()) == ["error"] * 2 + ["length"] * 4


# -- captures ------------------------------------------------------------------------------


def traits(**shapes: tuple[int, ...]) -> bytes:
    generator = torch.Generator().manual_seed(0)
    return safetensors.torch.save(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )


def test_a_capture_answers_every_token_of_prompt_and_completions(replica: LDAReplica) -> None:
    ask = CaptureRequest(
        prompt="What is 4 plus 3?",
        prompt_format="alpaca",
        completions=[Continuation(text="It is 7."), Continuation(token_ids=[20, 30, 2])],
        traits=traits(calm=(3, 128), bold=(128,)),
        layer=1,
        raw=True,
        mean=True,
    )
    first, second = asyncio.run(replica.capture(ask))
    tokenizer = replica._pair.tokenizer
    assert second.token_ids[second.prompt_tokens :] == [20, 30, 2]
    assert tokenizer.decode(first.token_ids[first.prompt_tokens :]) == "It is 7."
    assert first.traits == ["bold", "calm"] and "".join(first.tokens).endswith("It is 7.")
    for one in (first, second):
        t = len(one.token_ids)
        tensors = safetensors.torch.load(one.tensors)
        vectors = safetensors.torch.load(ask.traits or b"")
        for role in ("after", "before"):
            residual = tensors[f"{role}.residual"]
            assert residual.shape == (t, 3, 3, 128)
            for k, name in enumerate(one.traits):
                unit = torch.nn.functional.normalize(vectors[name].expand(3, 128), dim=-1)
                wanted = torch.einsum("tlpd,ld->tlp", residual, unit)
                torch.testing.assert_close(
                    tensors[f"{role}.scores"][..., k], wanted, rtol=1e-5, atol=1e-5
                )
            assert tensors[f"{role}.attention"].shape[1:] == (t, t)
            assert tensors[f"{role}.mean"].shape == (3, 3, 128)
    # The prompt alone, without traits, of one model.
    (alone,) = asyncio.run(replica.capture(CaptureRequest(prompt="Hi", models="before")))
    assert safetensors.torch.load(alone.tensors).keys() == {"before.norms"}
    assert alone.prompt_tokens == len(alone.token_ids) == len(alone.tokens)


def test_the_same_traits_are_read_once(replica: LDAReplica) -> None:
    file = traits(calm=(128,))
    assert replica._traits.of(file) is replica._traits.of(bytes(bytearray(file)))
    for i in range(20):
        replica._traits.of(traits(**{f"trait{i}": (128,)}))
    kept = replica._traits._kept
    assert len(kept) == 21 and replica._traits.of(file) is next(reversed(kept.values()))


def test_traits_are_kept_up_to_so_many_bytes_and_on_the_cpu(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_one = 3 * 128 * 4
    monkeypatch.setattr("deployments.capture_files._KEPT_BYTES", 5 * of_one)
    files = [traits(**{f"trait{i}": (128,)}) for i in range(8)]
    for file in files:
        found = replica._traits.of(file)
        assert found is not None and found.vectors.device.type == "cpu"
    assert [kept.names[0] for kept in replica._traits._kept.values()] == [
        f"trait{i}" for i in range(3, 8)
    ]
    large = traits(**{f"trait{i}": (128,) for i in range(6)})
    found = replica._traits.of(large)
    assert found is not None and len(found.names) == 6 and not replica._traits._kept


def test_traits_and_texts_are_read_beside_the_event_loop(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[threading.Thread] = []
    load, decode = safetensors.torch.load, replica._pair.tokenizer.decode

    def loading(file: bytes) -> Any:
        seen.append(threading.current_thread())
        return load(file)

    def decoding(ids: Any) -> Any:
        seen.append(threading.current_thread())
        return decode(ids)

    monkeypatch.setattr("safetensors.torch.load", loading)
    monkeypatch.setattr(replica._pair.tokenizer, "decode", decoding)
    asyncio.run(replica.capture(CaptureRequest(prompt="Hi", traits=traits(calm=(128,)))))
    assert len(seen) > 1 and threading.main_thread() not in seen


def test_an_answer_that_would_be_too_large_is_refused_before_any_work(
    replica: LDAReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = traits(calm=(128,), bold=(128,))
    texts = [Continuation(token_ids=[5] * 7), Continuation(token_ids=[6] * 4)]
    ask = CaptureRequest(prompt="Hi", completions=texts, traits=file)
    answer = asyncio.run(replica.capture(ask))
    tensors = [safetensors.torch.load(one.tensors) for one in answer]
    numbers = sum(x.numel() for one in tensors for x in one.values())
    asyncio.run(replica.capture(ask, numbers))
    done = replica._engine.engine.stats.captured_tokens
    with pytest.raises(
        InvalidRequest, match=f"with {numbers} numbers, at most {numbers - 1} "
    ) as e:
        asyncio.run(replica.capture(ask, numbers - 1))
    assert e.value.param == "completions"
    for field, change in (
        ("completions", {}),
        ("raw", {"raw": True, "mean": True}),
        ("layer", {"layer": 1, "prompt": "word " * 90}),
    ):
        large = ask.model_copy(update=change)
        size = sum(
            x.nbytes
            for one in asyncio.run(replica.capture(large))
            for x in safetensors.torch.load(one.tensors).values()
        )
        done = replica._engine.engine.stats.captured_tokens
        with monkeypatch.context() as patched:
            patched.setattr(replica, "_limits", Limits(max_capture_bytes=size - 1))
            with pytest.raises(InvalidRequest, match=f"at most {size - 1} are allowed") as e:
                asyncio.run(replica.capture(large))
        assert e.value.param == field
        assert replica._engine.engine.stats.captured_tokens == done
        if field != "layer":  # of which k and v may have fewer heads
            with monkeypatch.context() as patched:
                patched.setattr(replica, "_limits", Limits(max_capture_bytes=size))
                asyncio.run(replica.capture(large))


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"traits": b"SECRET"}, "traits", "safetensors"),
        ({"traits": safetensors.torch.save({})}, "traits", "between 1 and 256"),
        ({"traits": traits(a=(128,), b=(2, 128))}, "traits[1]", r"\[3, 128\] or \[128\], has \[2"),
        ({"traits": traits(a=(129,))}, "traits[0]", "has"),
        ({"traits": safetensors.torch.save({"a": torch.zeros(128)})}, "traits[0]", "not 0"),
        (
            {"traits": safetensors.torch.save({"a": torch.full((128,), torch.inf)})},
            "traits[0]",
            "finite",
        ),
        ({"layer": 3}, "layer", "between 0 and 2"),
        ({"completions": [{"token_ids": [99999]}]}, "completion", "between 0 and 767"),
        ({"completions": [{"token_ids": [5] * 600}]}, "completion", "context of 512"),
        ({"prompt": "word " * 600}, "prompt", "context of 512"),
    ],
)
def test_what_cannot_be_captured_is_named(
    replica: LDAReplica, change: dict[str, Any], param: str, words: str
) -> None:
    body = CaptureRequest.model_validate({"prompt": "Hi", **change})
    with pytest.raises(InvalidRequest, match=words) as caught:
        asyncio.run(replica.capture(body))
    assert caught.value.param == param and "SECRET" not in caught.value.message
    assert replica._engine.engine.idle
