import json
import math
import pickle
from typing import Any

import pytest

from deployments.plain_api import LDABatchRequest, LDARequest
from deployments.schemas import (
    Completion,
    GenerateRequest,
    InvalidRequest,
    Limits,
    NotReady,
    ScoreRequest,
    StreamRequest,
    parse,
)

SECRET = "SECRET-VALUE"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "a", "aplha": 2}, "aplha", "did you mean alpha"),
        ({"prompt": "a", "max_tokens": 2}, "max_tokens", "did you mean max_new_tokens"),
        ({"prompt": "a", "alpha": math.nan}, "alpha", "finite"),
        ({"prompt": "a", "alpha": json.loads("1e400")}, "alpha", "finite"),
        ({"prompt": "a", "temperature": math.inf}, "temperature", "finite"),
        ({"prompt": "a", "top_p": math.nan}, "top_p", "finite"),
        ({"prompt": "a", "alpha": "nan"}, "alpha", "valid number"),
        ({"prompt": "a", "alpha": True}, "alpha", "valid number"),
        ({"prompt": "a", "alpha": "2"}, "alpha", "valid number"),
        ({"prompt": "a", "n": True}, "n", "valid integer"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 1.5}, "n", "valid integer"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens", "greater"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"prompt": "a", "top_k": -1}, "top_k", "greater"),
        ({"prompt": "a", "top_k": 10**30}, "top_k", "less"),
        ({"prompt": "a", "a\x1b[31m\r\nb": 1}, "a?[31m??b", "unknown field"),
        ({"prompt": "a", "seed": -1}, "seed", "greater"),
        ({"prompt": "a", "seed": 2**63}, "seed", "less"),
        ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, "", "seed \\+ n - 1"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop[1]", "length of at least 1"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "length of at most 16"),
        ({"prompt": ""}, "prompt", "length of at least 1"),
        ({"prompt_ids": []}, "prompt_ids", "length of at least 1"),
        ({"prompt_ids": [1, -1]}, "prompt_ids[1]", "greater than or equal to 0"),
        ({"prompt_ids": [1, True]}, "prompt_ids[1]", "valid integer"),
        ({"prompt_ids": [1, 2.0]}, "prompt_ids[1]", "valid integer"),
        ({"prompt_ids": [1], "prompt": "a"}, "", "exactly one of"),
        ({"prompt_ids": [1], "prompt_format": "alpaca"}, "", "prompt_format raw"),
        ({"prompt_ids": [1], "system_prompt": "b"}, "", "system_prompt needs"),
        ({"prompt": SECRET + "\ud800"}, "prompt", "lone surrogate"),
        ({"prompt": "a", "prompt_format": SECRET + "\ud800"}, "prompt_format", "lone surrogate"),
        ({"prompt": "a", SECRET + "\ud800": 1}, "", "lone surrogate"),
        ({"prompt": [SECRET]}, "prompt", "valid string"),
        ({}, "", "exactly one of prompt, prompt_ids, messages and"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "", "exactly one"),
        ({"messages": []}, "messages", "length of at least 1"),
        ({"messages": [{"role": SECRET, "content": "b"}]}, "messages[0].role", "must be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"prompt": "a", "steer": {"layer": 0, "coefficient": 1}}, "steer", "exactly one of trait"),
        (
            {"prompt": "a", "steer": {"vector": [1, math.nan], "layer": 0, "coefficient": 1}},
            "steer.vector[1]",
            "finite",
        ),
        (
            {"prompt": "a", "steer": {"trait": "x", "layer": -1, "coefficient": 1}},
            "steer.layer",
            "greater than or equal to 0",
        ),
        ({"prompt": "a", "prompt_format": SECRET}, "prompt_format", "must be 'raw'"),
        ({"prompt": "a", "system_prompt": "b"}, "", "system_prompt needs"),
        ("not an object", "", "must be a JSON object"),
    ],
)
def test_bad_values_name_the_field_and_echo_nothing(body: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse(GenerateRequest, body)
    assert caught.value.param == param
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("steer", None),  # what only GenerateRequest has is no misspelt seed
        ("sead", "seed"),
        ("topp", "top_p"),
        ("max_tokens", "max_new_tokens"),
        ("tempature", "temperature"),
        ("promt", "prompt"),
        ("promts", "prompt"),
    ],
)
def test_only_what_is_close_is_suggested(field: str, meant: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(LDARequest, {"prompt": "a", field: 1})
    end = "" if meant is None else f"; did you mean {meant}?"
    assert caught.value.message == f"unknown field{end}"


@pytest.mark.parametrize("text", ["\x00", "\u202eabc", "🙂", "e\u0301"])
def test_odd_but_valid_text_is_accepted(text: str) -> None:
    assert parse(GenerateRequest, {"prompt": text}).prompt == text


def test_limits_name_the_field_and_the_range() -> None:
    limits = Limits(alpha_min=-5, alpha_max=10, max_new_tokens=100, max_n=4, max_prompt_chars=10)
    for change, words in [
        ({"alpha": 10.5}, "alpha: must be between -5 and 10"),
        ({"alpha": -5.5}, "alpha: must be between -5 and 10"),
        ({"max_new_tokens": 101}, "max_new_tokens: must be between 1 and 100"),
        ({"n": 5}, "n: must be between 1 and 4"),
        ({"prompt": "x" * 11}, "prompt: has 11 characters, at most 10"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            limits.check(parse(GenerateRequest, {"prompt": "a", **change}))
    limits.check(parse(GenerateRequest, {"prompt": "a", "alpha": -5.0, "n": 4}))


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(InvalidRequest("n", "must be 1", "code")))
    assert (error.param, error.message, error.code) == ("n", "must be 1", "code")
    reason = pickle.loads(pickle.dumps(NotReady("it is starting", "starting")))
    assert (str(reason), reason.code) == ("it is starting", "starting")


def test_the_plain_servers_defaults() -> None:
    request = parse(LDARequest, {"prompt": "Hi"}).request()
    assert request == GenerateRequest(
        prompt="Hi",
        prompt_format="alpaca",
        alpha=1.0,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=80,
        ignore_eos=False,
    )
    batch = parse(LDABatchRequest, {"prompts": ["a", "b"], "alpha": [0, -2]}).requests(5)
    assert [r.seed for r in batch] == [5, 6]
    assert [r.alpha for r in batch] == [0.0, -2.0]
    assert all(r.ignore_eos for r in batch)
    assert parse(LDARequest, {"prompt": "Hi", "do_sample": False}).request().temperature == 0
    raw = parse(LDARequest, {"prompt": "Hi", "apply_chat_template": False}).request()
    assert raw.prompt_format == "raw"


def test_alpha_per_prompt_must_fit_the_prompts() -> None:
    with pytest.raises(InvalidRequest, match="alpha: has 1 values for 2 prompts"):
        parse(LDABatchRequest, {"prompts": ["a", "b"], "alpha": [1]}).requests(0)
    with pytest.raises(InvalidRequest, match=r"alpha\[1\]: must be a valid number"):
        parse(LDABatchRequest, {"prompts": ["a", "b"], "alpha": [1, "x"]})
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]: must have a length"):
        parse(LDABatchRequest, {"prompts": ["a", ""]})
    with pytest.raises(InvalidRequest, match="seed: seed \\+ rows - 1"):
        parse(LDABatchRequest, {"prompts": ["a", "b"]}).requests(2**63 - 1)
    with pytest.raises(InvalidRequest, match="seed \\+ n - 1"):
        parse(LDARequest, {"prompt": "a", "seed": 2**63 - 1, "n": 2}).request()
    with pytest.raises(InvalidRequest, match="prompt_format: contradicts"):
        parse(
            LDARequest, {"prompt": "a", "prompt_format": "raw", "apply_chat_template": True}
        ).request()


def test_an_open_prompt_may_be_empty_but_stands_alone() -> None:
    request = parse(GenerateRequest, {"open_prompt": "", "prompt_format": "alpaca"})
    assert request.open_prompt == "" and request.effective_format == "alpaca"
    with pytest.raises(InvalidRequest, match="exactly one of"):
        parse(GenerateRequest, {"open_prompt": "", "prompt": "Hi"})


def test_a_prefill_needs_a_prompt_in_words() -> None:
    assert parse(GenerateRequest, {"prompt": "Hi", "prefill": "Well"}).prefill == "Well"
    with pytest.raises(InvalidRequest, match="prefill needs prompt or messages"):
        parse(GenerateRequest, {"open_prompt": "Hi", "prefill": "Well"})
    with pytest.raises(InvalidRequest, match="at most 5") as caught:
        Limits(max_prompt_chars=5).check(
            parse(GenerateRequest, {"prompt": "Hi", "prefill": "Well"})
        )
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"grid": [0.0, 0.0]}, "", "twice"),
        ({"grid": [0.0], "temperature": 0.0}, "", "temperature above 0"),
        ({"grid": [float("nan")]}, "grid[0]", "finite"),
        ({"grid": [0.0] * 17}, "grid", "at most 16"),
        ({"watch": [-1]}, "watch[0]", "greater than or equal to 0"),
        ({"amplify_first": -1}, "amplify_first", "greater than or equal to 0"),
        ({"amplify_min_kl": float("inf")}, "amplify_min_kl", "finite"),
        ({"plausible": 1.5}, "plausible", "less than or equal to 1"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": -1}, "top_logprobs", "greater than or equal to 0"),
        ({"top_logprobs": True}, "top_logprobs", "valid integer"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens", "at most max_new_tokens"),
        ({"min_tokens": 9, "grid": [1.0]}, "min_tokens", "together with a grid"),
        ({"kl": 1}, "kl", "valid boolean"),
    ],
)
def test_what_is_recorded_and_amplified_is_checked(body: dict, param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(GenerateRequest, {"prompt": "Hi", **body})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("continuation", "message"),
    [({}, "exactly one of"), ({"text": "a", "token_ids": [1]}, "exactly one of")],
)
def test_a_continuation_is_text_or_tokens(continuation: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(ScoreRequest, {"prompt": "Hi", "continuations": [{"text": "x"}, continuation]})
    assert caught.value.param == "continuations[1]"


def test_the_prompt_in_tokens_has_a_bound_too() -> None:
    limits = Limits(max_prompt_chars=3)
    for request in (
        parse(GenerateRequest, {"prompt_ids": [1] * 4}),
        parse(ScoreRequest, {"prompt_ids": [1] * 4, "continuations": [{"text": "x"}]}),
    ):
        with pytest.raises(InvalidRequest, match="prompt_ids: has 4 tokens, at most 3"):
            limits.check(request)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "", "exactly one of prompt and prompt_ids"),
        ({"prompt": "a", "prompt_ids": [1]}, "", "exactly one of prompt and prompt_ids"),
        ({"prompt_ids": [1], "prompt_format": "chat"}, "", "prompt_format raw"),
        ({"prompt_ids": [1], "system_prompt": "a"}, "", "system_prompt needs"),
        ({"prompt": "a", "top": 21}, "top", "less than or equal to 20"),
        ({"prompt": "a", "top": -1}, "top", "greater than or equal to 0"),
    ],
)
def test_what_is_scored_is_checked(body: dict, param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(ScoreRequest, {**body, "continuations": [{"text": "x"}]})
    assert caught.value.param == param


def test_several_alphas_are_several_requests() -> None:
    body = {"prompt": "Hi", "seed": 3, "kl": True, "steer": None}
    both = parse(StreamRequest, {**body, "alphas": [-1, 2.5]}).requests()
    assert both == [parse(GenerateRequest, {**body, "alpha": a}) for a in (-1.0, 2.5)]
    assert parse(StreamRequest, {**body, "alpha": 2.0}).requests() == [
        parse(GenerateRequest, {**body, "alpha": 2.0})
    ]
    for bad, param, message in [
        ({"alphas": [1, 1]}, "alphas", "twice"),
        ({"alphas": [1] * 9}, "alphas", "length of at most 8"),
        ({"alphas": [1, math.nan]}, "alphas[1]", "finite"),
        ({"alphas": [1], "alpha": 1}, "", "one of alpha and alphas"),
        ({"aplhas": [1]}, "aplhas", "did you mean alphas"),
    ]:
        with pytest.raises(InvalidRequest, match=message) as caught:
            parse(StreamRequest, {**body, **bad})
        assert caught.value.param == param


def test_the_likeliest_tokens_come_back_from_json() -> None:
    fields = {"text": "a", "token_ids": [1], "finish_reason": "length", "eos_index": None}
    fields |= {"eos_text_offset": None, "seed": 1, "alpha": 1.0, "prompt_tokens": 1}
    done = Completion(**fields, formatted_prompt="p", top_logprobs=[[(5, -0.5), (6, -1)]], kl=[0.1])
    said = json.loads(done.model_dump_json())
    assert said["top_logprobs"] == [[[5, -0.5], [6, -1.0]]]
    assert Completion.model_validate(said) == done


def test_a_name_of_megabytes_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(word: str, *rest: Any, **more: Any) -> list[str]:
        assert len(word) <= 80
        return []

    monkeypatch.setattr("deployments.schemas.difflib.get_close_matches", close)
    for name in ("x" * 80, "x" * 10**6):
        with pytest.raises(InvalidRequest, match="unknown field"):
            parse(GenerateRequest, {"prompt": "a", name: 1})
