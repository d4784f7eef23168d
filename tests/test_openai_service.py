"""The OpenAI API over HTTP, on the shipped service."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from deployments.local_service import LocalService

pytestmark = pytest.mark.ray

CHAT = {"messages": [{"role": "user", "content": "What is 4 plus 3?"}], "seed": 5}


@pytest.fixture(scope="module")
def client(service: LocalService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def test_the_models_and_their_names(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["lda", "after", "before"]
    assert all(card["max_model_len"] == 512 for card in listed["data"])
    assert client.get("/v1/models/lda:alpha=2").json()["id"] == "lda:alpha=2"
    unknown = client.get("/v1/models/SECRET")
    assert unknown.status_code == 404 and "SECRET" not in unknown.text


def test_alpha_in_the_name_in_the_body_and_by_the_plain_endpoint(client: httpx.Client) -> None:
    by_name = client.post("/v1/chat/completions", json={**CHAT, "model": "lda:alpha=2"}).json()
    by_field = client.post("/v1/chat/completions", json={**CHAT, "alpha": 2}).json()
    content = by_name["choices"][0]["message"]["content"]
    assert by_field["choices"][0]["message"]["content"] == content
    plain = {"prompt": "What is 4 plus 3?", "alpha": 2, "seed": 5, "temperature": 1, "top_p": 1}
    assert client.post("/generate_lda", json=plain).json()["completion"] == content
    for name, alpha in (("before", -1), ("after", 0)):
        answer = client.post("/v1/chat/completions", json={**CHAT, "model": name}).json()
        expected = client.post("/generate_lda", json={**plain, "alpha": alpha}).json()
        assert answer["choices"][0]["message"]["content"] == expected["completion"]
        assert answer["choices"][0]["lda"]["alpha"] == alpha


def test_it_streams(client: httpx.Client) -> None:
    body = {"prompt": "Hi", "seed": 1, "max_tokens": 200, "ignore_eos": True}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines.pop() == "data: [DONE]" and len(lines) > 1
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole


def test_clients_that_leave_free_their_rows(client: httpx.Client) -> None:
    big = {"prompt": "Hi", "n": 64, "max_tokens": 480, "ignore_eos": True}

    def leave(stream: bool) -> None:
        body = {**big, "stream": stream}
        if not stream:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=1.0)
            return
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())

    with ThreadPoolExecutor(4) as pool:
        for leaving in [pool.submit(leave, i % 2 == 0) for i in range(4)]:
            leaving.result()
    start = time.monotonic()
    for _ in range(4):
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", '{"prompt": "SECRET", "aplha": 2}', 400, "aplha", "unknown_field"),
        ("completions", '{"prompt": "SECRET", "alpha": NaN}', 400, "alpha", "invalid_value"),
        ("completions", '{"prompt": "SECRET", "model": "SECRET"}', 404, "model", "model_not_found"),
        (
            "completions",
            '{"prompt": "SECRET", "max_tokens": 512}',
            *(400, "max_tokens", "context_length_exceeded"),
        ),
        ("completions", '{"prompt": [768]}', 400, "prompt", "invalid_value"),
        ("completions", '{"prompt": "SECRET", "best_of": 3}', 400, "best_of", "invalid_value"),
        ("completions", '{"prompt": "SECRET"', 400, None, "invalid_json"),
        ("completions", '["SECRET"]', 400, None, "invalid_value"),
        ("chat/completions", '{"messages": []}', 400, "messages", "invalid_value"),
        (
            "chat/completions",
            '{"messages": [{"role": "user", "content": "SECRET"}], "tools": ["SECRET"]}',
            *(400, "tools", "invalid_value"),
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_shape(
    client: httpx.Client,
    path: str,
    body: str,
    status: int,
    param: str | None,
    code: str,
    stream: bool,
) -> None:
    if stream and body.endswith("}"):
        body = body[:-1] + ', "stream": true}'
    headers = {"content-type": "application/json"}
    answer = client.post(f"/v1/{path}", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert "SECRET" not in answer.text and "blocked" not in answer.text


def test_the_tokenizer_as_lm_eval_asks_for_it(client: httpx.Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == ("<s>", "</s>", 768)
    assert "### Instruction" in info["chat_template"]

    def encoded(text: str, **more: Any) -> Any:
        return client.post("/tokenize", json={"prompt": text, **more}).json()

    bare = encoded("Hi there 🙂", add_special_tokens=False, return_token_strs=True)
    with_bos = encoded("Hi there 🙂")
    assert with_bos["tokens"] == [1, *bare["tokens"]] and with_bos["token_strs"] is None
    assert bare["count"] == len(bare["tokens"]) and bare["max_model_len"] == 512
    assert "".join(bare["token_strs"]).startswith("Hi there ")
    assert encoded("</s>", add_special_tokens=False)["tokens"] == [2]
    assert encoded("", add_special_tokens=False)["tokens"] == []
    assert encoded("")["tokens"] == [1]
    for tokens, text in ((bare["tokens"], "Hi there 🙂"), ([1, 2], "<s></s>"), ([], "")):
        assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    chat = client.post("/tokenize", json={"messages": CHAT["messages"]}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": chat}).json()["prompt"] == (
        "<s>### Instruction:\nWhat is 4 plus 3?\n\n### Response:\n"
    )
    bad = client.post("/detokenize", json={"tokens": [768]})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "tokens"


def test_metrics_are_those_of_all_replicas(client: httpx.Client) -> None:
    wanted = (
        *("lda_rows", "lda_waiting_rows", "lda_slots", "lda_floor_fraction", "lda_tokens_total"),
        *("lda_steps_total", "lda_prefix_hits_total", "serve_deployment_queued_queries"),
        *("serve_actual_batch_size_sum", "lda_noise_floor", "lda_step_seconds_total"),
    )
    with ThreadPoolExecutor(8) as pool:  # both replicas
        body = {"prompt": "Hi", "n": 8, "max_tokens": 40, "ignore_eos": True}
        posts = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(16)]
    assert all(post.result().status_code == 200 for post in posts)
    deadline = time.monotonic() + 60  # Ray's agent hears of it every few seconds
    while True:
        answer = client.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        found = dict(re.findall(r"^(\w+)\{.*?\} (\S+)$", answer.text, re.MULTILINE))
        replicas = set(re.findall(r'^lda_slots\{.*replica="(\w+)"', answer.text, re.MULTILINE))
        drawn = re.findall(r"^lda_tokens_total\{.*\} (\S+)$", answer.text, re.MULTILINE)
        total = sum(map(float, drawn))
        if len(replicas) >= 2 and set(wanted) <= found.keys() and total >= 16 * 8 * 40:
            break
        assert time.monotonic() < deadline, (replicas, set(wanted) - found.keys(), total)
        time.sleep(1)
    for name in found:
        assert answer.text.count(f"# TYPE {name} ") <= 1
    assert 'lda_metrics_nodes{state="answered"} 1' in answer.text
    assert "WorkerId" not in answer.text and "SessionName" not in answer.text
