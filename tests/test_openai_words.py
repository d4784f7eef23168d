"""What clients of the OpenAI API send, field by field, in terms of ours."""

from typing import Any

import pytest

from deployments import model_names
from deployments.openai_words import ChatRequest, CompletionRequest
from deployments.schemas import InvalidRequest, parse


def completion(**fields: Any) -> CompletionRequest:
    body = parse(CompletionRequest, {"prompt": "Hi", **fields})
    body.check()
    return body


def chat(**fields: Any) -> ChatRequest:
    body = parse(ChatRequest, {"messages": [{"role": "user", "content": "Hi"}], **fields})
    body.check()
    return body


def refused(make: Any, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        make(**fields)
    assert "SECRET" not in str(caught.value) and "blocked" not in str(caught.value)
    return caught.value


# -- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "field", "alpha"),
    [
        ("lda", None, 1.0),
        ("lda", 2.5, 2.5),
        ("lda:alpha=2", None, 2.0),
        ("lda:alpha=2", 2.0, 2.0),
        ("lda:alpha=-1.5", None, -1.5),
        ("lda:alpha=1e1", None, 10.0),
        ("before", None, -1.0),
        ("after", None, 0.0),
        ("after", 0.0, 0.0),
        ("lda:before", None, -1.0),
    ],
)
def test_alpha_by_name_or_by_field(model: str, field: float | None, alpha: float) -> None:
    assert model_names.resolve(model, field) == ("lda", alpha)


@pytest.mark.parametrize(
    ("model", "field", "param", "code"),
    [
        ("before", 2.0, "alpha", "invalid_value"),
        ("lda:alpha=2", 1.0, "alpha", "invalid_value"),
        ("lda:alpha=nan", None, "model", "invalid_value"),
        ("lda:alpha=1e999", None, "model", "invalid_value"),
        ("lda:alpha=1_0", None, "model", "invalid_value"),
        ("lda:alpha=", None, "model", "invalid_value"),
        ("lda:aplha=2", None, "model", "model_not_found"),
        ("lda:", None, "model", "model_not_found"),
        ("SECRET", None, "model", "model_not_found"),
        ("", None, "model", "model_not_found"),
    ],
)
def test_names_that_say_nothing_or_too_much(
    model: str, field: float | None, param: str, code: str
) -> None:
    error = refused(model_names.resolve, model=model, alpha=field)
    assert (error.param, error.code) == (param, code)
    if code == "model_not_found":
        assert "lda, after, before" in error.message


def test_a_pair_has_names_of_its_own() -> None:
    pairs = ("lda", "organism-lora")
    assert model_names.names(pairs) == [
        *("lda", "after", "before"),
        *("organism-lora", "organism-lora:after", "organism-lora:before"),
    ]
    for name, alpha in (("", 1.0), (":alpha=2", 2.0), (":before", -1.0), (":after", 0.0)):
        found = model_names.resolve(f"organism-lora{name}", None, pairs)
        assert found == ("organism-lora", alpha)


# -- bodies that clients send ----------------------------------------------------------------


def test_the_defaults_are_openais() -> None:
    body = completion()
    (prompt,) = body.prompts
    request = body.generation(prompt.fields, 1.0, 3, body.new_tokens)
    assert request.prompt == "Hi" and request.effective_format == "raw"
    assert (request.temperature, request.top_p, request.top_k, request.n) == (1.0, 1.0, 0, 1)
    assert (
        request.max_new_tokens == 16 and not request.logprobs and not request.allow_special_tokens
    )
    assert chat().new_tokens is None


def test_what_lm_eval_sends_is_understood() -> None:
    generate = completion(
        prompt=[[276, 3]], model="lda", max_tokens=256, temperature=0, stop=["\n", "</s>"],
        seed=1234, alpha=2.5,
    )  # fmt: skip
    assert [one.fields for one in generate.prompts] == [{"prompt_ids": [276, 3]}]
    assert (generate.temperature, generate.stops, generate.alpha) == (0, ["\n", "</s>"], 2.5)
    likelihood = completion(
        prompt=[[1, 2, 3]], model="lda:alpha=2", temperature=0, max_tokens=1, logprobs=1,
        seed=1234, echo=True,
    )  # fmt: skip
    assert likelihood.logprobs == 1 and likelihood.echo and likelihood.new_tokens == 1


def test_what_inspect_sends_is_understood() -> None:
    body = chat(
        model="lda", max_tokens=64, temperature=0.5, top_p=0.9, seed=5, stop=["x"], n=2,
        logprobs=True, top_logprobs=5, frequency_penalty=0.0, presence_penalty=0, logit_bias={},
        response_format={"type": "text"}, tools=[], alpha=2.5,
    )  # fmt: skip
    assert (body.alpha, body.n, body.top_logprobs, body.new_tokens) == (2.5, 2, 5, 64)


def test_null_is_nothing() -> None:
    fields = [name for name in CompletionRequest.model_fields if name != "prompt"]
    assert completion(**dict.fromkeys(fields)) == completion()
    fields = [name for name in ChatRequest.model_fields if name != "messages"]
    assert chat(**dict.fromkeys(fields)) == chat()


def test_harmless_fields_are_ignored() -> None:
    harmless = {
        "user": "SECRET", "metadata": {"a": "b"}, "service_tier": "auto", "frequency_penalty": 0,
        "repetition_penalty": 1.0, "min_p": 0.0, "skip_special_tokens": True,
    }  # fmt: skip
    for make in (completion, chat):
        assert make(**harmless).stops == []
    assert chat(store=False, parallel_tool_calls=True, tool_choice="auto").n == 1
    assert completion(best_of=3, n=3, suffix="").n == 3


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (completion, {"frequency_penalty": 0.5}, "frequency_penalty"),
        (completion, {"presence_penalty": False}, "presence_penalty"),
        (completion, {"logit_bias": {"5": -100}}, "logit_bias"),
        (completion, {"suffix": "SECRET"}, "suffix"),
        (completion, {"best_of": 2}, "best_of"),
        (completion, {"response_format": {"type": "json_object"}}, "response_format"),
        (completion, {"echo": "SECRET"}, "echo"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"max_tokens": 0}, "max_tokens"),
        (completion, {"max_tokens": -1}, "max_tokens"),
        (completion, {"n": 0}, "n"),
        (completion, {"n": True}, "n"),
        (completion, {"n": "2"}, "n"),
        (completion, {"seed": -1}, "seed"),
        (completion, {"temperature": float("nan")}, "temperature"),
        (completion, {"top_p": 0}, "top_p"),
        (completion, {"stop": ""}, "stop"),
        (completion, {"stop": ["a", ""]}, "stop[1]"),
        (completion, {"stop": ["a"] * 17}, "stop"),
        (completion, {"prompt": ""}, "prompt"),
        (completion, {"prompt": []}, "prompt"),
        (completion, {"prompt": ["a", ""]}, "prompt[1]"),
        (completion, {"prompt": [[1], []]}, "prompt[1]"),
        (completion, {"prompt": [1, True]}, "prompt[1]"),
        (completion, {"prompt": [1, -1]}, "prompt[1]"),
        (completion, {"prompt": [[1], [2.0]]}, "prompt[1][0]"),
        (completion, {"prompt": ["a", 1]}, "prompt[1]"),
        (completion, {"prompt": {"SECRET": 1}}, "prompt"),
        (completion, {"prompt": "SECRET\ud800"}, "prompt"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options"),
        (completion, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (completion, {"echo": True, "logprobs": 1, "plausible": 0.1}, "logprobs"),
        (chat, {"logprobs": 1}, "logprobs"),
        (chat, {"top_logprobs": 1}, "top_logprobs"),
        (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        (chat, {"tools": [{"type": "function"}]}, "tools"),
        (chat, {"tool_choice": "required"}, "tool_choice"),
        (chat, {"chat_template": "{{ SECRET }}"}, "chat_template"),
        (chat, {"store": True}, "store"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(
    make: Any, fields: dict[str, Any], param: str
) -> None:
    assert refused(make, **fields).param == param


def test_a_misspelt_field_has_a_suggestion() -> None:
    error = refused(completion, aplha=2)
    assert error.code == "unknown_field" and "did you mean alpha?" in error.message
    assert "did you mean temperature?" in refused(chat, temprature=1).message


def test_the_seeds_are_those_of_a_native_batch() -> None:
    assert completion(prompt=["a", "b", "c"], n=4).seeds(10, 3) == [10, 14, 18]
    body = completion(n=2)
    assert refused(body.seeds, base=2**63 - 2, prompts=2).param == "seed"


def test_parts_of_a_message_and_its_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "developer", "content": parts}])
    assert body.prompts[0].fields["messages"] == [{"role": "system", "content": "a\nb"}]


def test_the_document_says_what_is_refused_and_that_null_is_nothing() -> None:
    schema = CompletionRequest.model_json_schema()
    assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]
    penalty = schema["properties"]["frequency_penalty"]
    assert penalty["anyOf"][0]["enum"] == [0] and penalty["anyOf"][1] == {"type": "null"}
