"""The OpenAI API on a real replica, in this process and without Ray."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from conftest import TINY

from deployments.openai_words import ChatRequest, CompletionRequest
from deployments.openai_work import Work
from deployments.replica import LDAReplica
from deployments.schemas import (
    Completion,
    GenerateRequest,
    InvalidRequest,
    Limits,
    Piece,
    ReplicaUnavailable,
    Scored,
    ScoreRequest,
    parse,
)
from deployments.tokenizer_words import ReadPrompt, ReadRequest, Vocabulary
from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode

PROMPT = "### Instruction:\nWhat is 4 plus 3?\n\n### Response:\n"
MESSAGES = [{"role": "user", "content": "What is 4 plus 3?"}]


class Door:
    """What the ingress does for the API, without its sending again."""

    def __init__(self, replica: LDAReplica) -> None:
        self.replica = replica
        self.fail_after: int | None = None  # pieces of a stream
        self.closed = 0

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        return await self.replica.generate(request)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[list[Piece], None]:
        left = self.fail_after
        try:
            async with aclosing(self.replica.stream(request)) as pieces:
                async for some in pieces:
                    if left is not None:
                        if not left:
                            raise ReplicaUnavailable("SECRET")
                        left -= 1
                    yield some
        finally:
            self.closed += 1

    async def score(self, request: ScoreRequest) -> list[Scored]:
        return await self.replica.score(request)

    async def read(self, request: ReadRequest) -> ReadPrompt:
        return await self.replica.read(request)

    async def vocabulary(self) -> Vocabulary:
        return await self.replica.vocabulary()


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    pair = PairConfig(before=str(TINY / "before"), after=str(TINY / "after"))
    replica = LDAReplica(pair, EngineConfig(max_slots=16), stuck_after_s=60)

    async def admit(rows: Any) -> Any:
        return replica._submit([rows])[0]

    replica._admit = admit  # type: ignore[method-assign, assignment]
    yield Door(replica)
    replica._engine.stop()


def work(door: Door, limits: Limits | None = None, **fields: Any) -> Work:
    model = ChatRequest if "messages" in fields else CompletionRequest
    return Work(door, limits or Limits(), parse(model, fields))


def answer(door: Door, **fields: Any) -> dict[str, Any]:
    return asyncio.run(work(door, **fields).answer())


def refused(door: Door, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(work(door, **fields).answer())
    assert "SECRET" not in str(caught.value)
    return caught.value


def drawn(pair: ModelPair, prompt: str, form: Any = "raw", **settings: Any) -> Any:
    ids = encode(pair.tokenizer, prompt, form).ids
    return Engine(pair).generate([Request(ids, logprobs=True, kl=True, **settings)])[0]


# -- all at once -----------------------------------------------------------------------------


def test_samples_of_prompts_have_the_seeds_of_a_native_batch(
    door: Door, tiny_pair: ModelPair
) -> None:
    body = {"prompt": ["Hi", PROMPT], "n": 2, "seed": 5, "max_tokens": 8, "model": "lda:alpha=2"}
    found = answer(door, **body)
    assert [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
    assert [c["lda"] for c in found["choices"]] == [{"alpha": 2.0, "seed": s} for s in range(5, 9)]
    tokens = 0
    for choice, prompt in zip(found["choices"], ["Hi", "Hi", PROMPT, PROMPT], strict=True):
        seed = choice["lda"]["seed"]
        expected = drawn(tiny_pair, prompt, alpha=2.0, seed=seed, max_new_tokens=8)
        assert choice["text"] == expected.text
        assert choice["finish_reason"] == {"eos": "stop"}.get(expected.finish_reason, "length")
        tokens += len(expected.token_ids)
        alone = answer(door, **{**body, "prompt": prompt, "n": 1, "seed": seed})
        assert alone["choices"][0]["text"] == choice["text"]
    prompts = [len(encode(tiny_pair.tokenizer, p, "raw").ids) for p in ("Hi", PROMPT)]
    assert found["usage"] == {
        "prompt_tokens": sum(prompts),
        "completion_tokens": tokens,
        "total_tokens": sum(prompts) + tokens,
    }
    assert found["object"] == "text_completion" and found["model"] == "lda:alpha=2"


def test_without_a_seed_one_is_picked_and_gives_the_text_again(door: Door) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "n": 2}
    first = answer(door, **body)["choices"]
    assert first[1]["lda"]["seed"] == first[0]["lda"]["seed"] + 1
    again = answer(door, **{**body, "seed": first[0]["lda"]["seed"]})["choices"]
    assert [c["text"] for c in again] == [c["text"] for c in first]


def test_chat_is_the_template_and_answers_in_messages(door: Door, tiny_pair: ModelPair) -> None:
    found = answer(door, messages=MESSAGES, alpha=2, seed=5, logprobs=True, top_logprobs=3)
    (choice,) = found["choices"]
    expected = drawn(tiny_pair, "What is 4 plus 3?", "alpaca", alpha=2.0, seed=5)
    assert choice["message"] == {
        "role": "assistant",
        "content": expected.text,
        "refusal": None,
    }
    content = choice["logprobs"]["content"]
    assert [one["logprob"] for one in content] == pytest.approx(
        expected.logprobs.amplified, abs=1e-4
    )
    for one, token in zip(content, expected.token_ids, strict=True):
        assert bytes(one["bytes"]).decode() == one["token"]
        assert one["token"] == tiny_pair.tokenizer.decode([token])
        assert len(one["top_logprobs"]) == 3
    assert found["object"] == "chat.completion" and choice["finish_reason"] == "stop"


def test_a_chat_without_a_length_goes_on_to_the_end_of_the_context(door: Door) -> None:
    found = answer(door, messages=MESSAGES, seed=1, ignore_eos=True)
    assert found["usage"]["total_tokens"] == 512
    short = work(door, Limits(max_new_tokens=9), messages=MESSAGES, seed=1, ignore_eos=True)
    assert asyncio.run(short.answer())["usage"]["completion_tokens"] == 9


def test_lda_logprobs_are_all_three_distributions_and_kl(door: Door, tiny_pair: ModelPair) -> None:
    body = {"prompt": PROMPT, "alpha": 2, "seed": 5, "max_tokens": 8}
    (choice,) = answer(door, **body, lda_logprobs=True, logprobs=0)["choices"]
    expected = drawn(tiny_pair, PROMPT, alpha=2.0, seed=5, max_new_tokens=8)
    words = choice["lda"]["logprobs"]
    assert words["token_ids"] == expected.token_ids
    for name in ("after", "before", "amplified"):
        assert words[name] == pytest.approx(getattr(expected.logprobs, name), abs=1e-4)
    assert words["kl"] == pytest.approx(expected.kl, abs=1e-4)
    assert choice["logprobs"]["token_logprobs"] == words["amplified"]
    assert [list(top.values()) for top in choice["logprobs"]["top_logprobs"]] == [
        [value] for value in words["amplified"]
    ]
    (plain,) = answer(door, **body)["choices"]
    assert plain["lda"] == {"alpha": 2.0, "seed": 5} and plain["logprobs"] is None


@pytest.mark.parametrize(
    ("model", "alpha"), [("before", -1.0), ("after", 0.0), ("lda:alpha=1", 1.0)]
)
def test_log_likelihoods_as_lm_eval_reads_them(
    door: Door, tiny_pair: ModelPair, model: str, alpha: float
) -> None:
    question = encode(tiny_pair.tokenizer, PROMPT, "raw").ids
    engine = Engine(tiny_pair)
    (greedy,) = engine.generate([Request(question, alpha=alpha, temperature=0, max_new_tokens=5)])
    contexts = [
        [*question, *greedy.token_ids],
        [*question, *tiny_pair.tokenizer.encode("Maybe.", add_special_tokens=False)],
    ]
    found = answer(
        door, prompt=contexts, model=model, temperature=0, max_tokens=1, logprobs=1, seed=1234,
        echo=True,
    )  # fmt: skip
    for choice, ids, is_greedy in zip(found["choices"], contexts, (True, False), strict=True):
        words = choice["logprobs"]
        assert words["token_logprobs"][0] is None and words["top_logprobs"][0] is None
        assert len(words["tokens"]) == len(words["text_offset"]) == len(ids) + 1
        one = slice(len(question), -1)
        values, tops = words["token_logprobs"][one], words["top_logprobs"][one]
        # Exactly the same float, or it is not the likeliest.
        equal = [value == max(top.values()) for value, top in zip(values, tops, strict=True)]
        assert all(equal) is is_greedy
        from lda_core import ScoreRequest as CoreScore

        rest = tuple(ids[len(question) :])
        (scored,) = engine.score([CoreScore(tuple(question), rest, grid=(alpha,))])
        assert values == pytest.approx([at[0] for at in scored.at], abs=1e-4)
        role = {"before": scored.before, "after": scored.after}.get(model)
        assert role is None or values == pytest.approx(role, abs=1e-4)


def test_an_echo_is_the_prompt_with_its_offsets(door: Door) -> None:
    prompt = "Wie heißt der 🙂?"
    (choice,) = answer(door, prompt=prompt, echo=True, logprobs=2, max_tokens=0)["choices"]
    words = choice["logprobs"]
    assert choice["text"] == prompt and choice["finish_reason"] == "length"
    assert words["tokens"][0] == "<s>" and words["token_logprobs"][0] is None
    assert words["text_offset"][:2] == [0, 0] and words["text_offset"][-1] < len(prompt)
    at = {
        offset: token for offset, token in zip(words["text_offset"], words["tokens"], strict=True)
    }
    assert all(prompt[o:].startswith(t) for o, t in at.items() if not t.startswith("bytes:"))
    assert any(token.startswith("bytes:\\x") for token in words["tokens"])
    body = {"prompt": prompt, "seed": 3, "max_tokens": 6}
    (echoed,) = answer(door, **body, echo=True, logprobs=0)["choices"]
    (plain,) = answer(door, **body, logprobs=0)["choices"]
    assert echoed["text"] == prompt + plain["text"]
    length = len(plain["logprobs"]["tokens"])
    assert echoed["logprobs"]["text_offset"][-length:] == [
        len(prompt) + offset for offset in plain["logprobs"]["text_offset"]
    ]
    (single,) = answer(door, prompt=[1], echo=True, logprobs=1, max_tokens=0)["choices"]
    assert single["logprobs"]["token_logprobs"] == [None] and single["text"] == ""


def test_vllms_extras(door: Door, tiny_pair: ModelPair) -> None:
    ids = list(encode(tiny_pair.tokenizer, PROMPT, "raw").ids)
    body = {"prompt": PROMPT, "seed": 3, "max_tokens": 5}
    (choice,) = answer(door, **body, return_token_ids=True, prompt_logprobs=1)["choices"]
    assert choice["prompt_token_ids"] == ids and choice["logprobs"] is None
    assert choice["text"] == tiny_pair.tokenizer.decode(
        choice["token_ids"], skip_special_tokens=True
    )
    assert choice["prompt_logprobs"][0] is None
    for token, words in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
        ranks = {word["rank"] for word in words.values()}
        assert str(token) in words and 1 in ranks and len(words) in (1, 2)
    found = answer(door, messages=MESSAGES, max_tokens=5, return_token_ids=True, prompt_logprobs=0)
    assert found["prompt_token_ids"] == ids and len(found["prompt_logprobs"]) == len(ids)
    assert "prompt_token_ids" not in found["choices"][0]
    (bare,) = answer(door, **body, add_special_tokens=False, return_token_ids=True)["choices"]
    assert bare["prompt_token_ids"] == ids[1:]
    (long,) = answer(door, **body, ignore_eos=True, min_tokens=5, top_k=1, return_token_ids=True)[
        "choices"
    ]
    assert len(long["token_ids"]) == 5
    assert long == {
        **long,
        "text": answer(door, **{**body, "temperature": 0}, ignore_eos=True)["choices"][0]["text"],
    }


def test_a_stop_string_ends_it_and_says_so(door: Door) -> None:
    body = {"prompt": PROMPT, "seed": 20, "max_tokens": 24, "model": "after"}
    (whole,) = answer(door, **body)["choices"]
    (cut,) = answer(door, **body, stop=".")["choices"]
    assert "." in whole["text"] and cut["text"] == whole["text"].partition(".")[0]
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": "SECRET " * 600}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a", "SECRET " * 600]}, "prompt[1]", "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "SECRET " * 600, "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt",
         "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "SECRET " * 600}]}, "messages",
         "context_length_exceeded"),
        ({"prompt": [1, 768]}, "prompt", "invalid_value"),
        ({"prompt": [[1], [768]]}, "prompt[1]", "invalid_value"),
        ({"prompt": [[1], [768]], "echo": True}, "prompt[1]", "invalid_value"),
        ({"prompt": "a", "alpha": 51}, "alpha", "invalid_value"),
        ({"prompt": "a", "model": "lda:alpha=51"}, "model", "invalid_value"),
        ({"prompt": "a", "n": 257}, "n", "invalid_value"),
        ({"prompt": "a", "max_tokens": 5000}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"prompt": ["a"] * 1025}, "prompt", "invalid_value"),
        ({"messages": [{"role": "user", "content": "SECRET </s>"}]}, "messages[0].content",
         "invalid_value"),
        ({"messages": MESSAGES, "max_completion_tokens": 600}, "max_completion_tokens",
         "context_length_exceeded"),
        ({"prompt": "a", "steer": {"trait": "SECRET", "layer": 0, "coefficient": 1.0}},
         "steer.trait", "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_named_as_the_body_names_it(
    door: Door, fields: dict[str, Any], param: str, code: str
) -> None:
    error = refused(door, **fields)
    assert (error.param, error.code) == (param, code)
    assert "max_new_tokens" not in error.message


# -- piece by piece --------------------------------------------------------------------------


async def _events(door: Door, **fields: Any) -> list[tuple[str, Any]]:
    response = await work(door, stream=True, **fields).stream()
    text = ""
    async for part in response.body_iterator:
        assert isinstance(part, str)
        text += part
    await response._close()
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        *names, data = event.split("\n")
        data = data.removeprefix("data: ")
        name = names[0].removeprefix("event: ") if names else "message"
        found.append((name, data if data == "[DONE]" else json.loads(data)))
    return found


@pytest.mark.usefixtures("a_piece_a_step")
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_stream_is_the_answer_in_pieces(door: Door, kind: str) -> None:
    body: dict[str, Any] = {"seed": 5, "n": 2, "max_tokens": 20, "alpha": 2, "lda_logprobs": True}
    body |= {"return_token_ids": True}
    if kind == "chat":
        body |= {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    else:
        body |= {"prompt": ["Hi", PROMPT], "echo": True, "logprobs": 2}
    whole = answer(door, **body)
    events = asyncio.run(_events(door, **body, stream_options={"include_usage": True}))
    assert events.pop() == ("message", "[DONE]") and {name for name, _ in events} == {"message"}
    last = events.pop()[1]
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    chunks = [chunk for _, chunk in events]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    suffix = ".chunk" if kind == "chat" else ""
    assert {chunk["object"] for chunk in chunks} == {whole["object"] + suffix}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        reasons = [one["finish_reason"] for one in mine]
        assert len(mine) > 2 and reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert [t for one in mine for t in one["token_ids"]] == choice["token_ids"]
        words = choice["lda"]["logprobs"]
        for name, values in words.items():
            parts = [x for one in mine for x in one["lda"]["logprobs"][name]]
            assert parts == pytest.approx(values, abs=1e-4)
        assert {one["lda"]["seed"] for one in mine} == {choice["lda"]["seed"]}
        if kind == "chat":
            assert [one["delta"].get("role") for one in mine][:2] == ["assistant", None]
            text = "".join(one["delta"]["content"] for one in mine)
            assert text == choice["message"]["content"]
            content = [x["token"] for one in mine for x in one["logprobs"]["content"]]
            assert content == [x["token"] for x in choice["logprobs"]["content"]]
        else:
            assert "".join(one["text"] for one in mine) == choice["text"]
            assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
            for name in ("tokens", "token_logprobs"):
                parts = [x for one in mine for x in one["logprobs"][name]]
                wanted = choice["logprobs"][name]
                assert [x is None for x in parts] == [x is None for x in wanted]
                if name == "tokens":
                    assert parts == wanted


def test_a_stream_of_an_echo_alone(door: Door) -> None:
    (_, chunk), done = asyncio.run(_events(door, prompt="Hi", echo=True, max_tokens=0))
    assert chunk["choices"][0]["text"] == "Hi" and done[1] == "[DONE]"


def test_a_stream_that_is_refused_has_not_begun(door: Door) -> None:
    for bad in ({"prompt": "SECRET " * 600}, {"prompt": [1, 768]}, {"prompt": "a", "n": 999}):
        with pytest.raises(InvalidRequest):
            asyncio.run(_events(door, **bad))


def test_a_stream_that_breaks_ends_in_an_error_and_never_looks_finished(door: Door) -> None:
    door.fail_after = 1
    try:
        *chunks, (name, said) = asyncio.run(
            _events(door, prompt=PROMPT, max_tokens=400, ignore_eos=True)
        )
    finally:
        door.fail_after = None
    assert chunks and name == "error" and said["error"]["code"] == "unavailable"
    assert all(c["choices"][0]["finish_reason"] is None for _, c in chunks)
    assert "SECRET" not in json.dumps(said)


def test_a_client_that_leaves_a_stream_takes_its_rows_along(door: Door) -> None:
    engine = door.replica._engine.engine

    async def leave() -> None:
        response = await work(
            door, prompt=["a", "b"], n=4, max_tokens=480, ignore_eos=True, stream=True
        ).stream()
        parts = aiter(response.body_iterator)
        assert await anext(parts)
        await until(lambda: engine.live_rows == 8)  # the second prompt may join a step later
        closed = door.closed
        await response._close()
        assert door.closed == closed + 2
        await until(lambda: engine.live_rows == 0)

    async def until(so: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not so():
                await asyncio.sleep(0.01)

    asyncio.run(leave())
