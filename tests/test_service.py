"""The shipped service over HTTP and by handle, on a real cluster."""

import base64
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from reference import reference

from deployments.local_service import LocalService, ServiceError, local_service
from lda_core import ModelPair, Request, encode

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def client(service: LocalService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def by_handle(service: LocalService, code: str) -> Any:
    """Runs code in a process of its own, connected to the cluster; `handle` is the app's.
    Answers what it leaves in `answer`."""
    script = (
        "import json, sys, ray\nfrom ray import serve\n"
        "ray.init(log_to_driver=False)\nhandle = serve.get_app_handle('lda')\n"
        f"{textwrap.dedent(code)}\nprint('ANSWER', json.dumps(answer))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=service.env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("ANSWER ")[2])


def question(i: int) -> dict[str, Any]:
    return {
        "prompt": f"What is {i} plus 3?",
        "alpha": [0.0, 1.0, 2.0, -1.0][i % 4],
        "seed": 1000 + i,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 20 + i % 7,
    }


def expected_ids(pair: ModelPair, body: dict[str, Any]) -> list[int]:
    prompt = encode(pair.tokenizer, body["prompt"], "alpaca").ids
    return reference(pair, Request(prompt, **{k: v for k, v in body.items() if k != "prompt"}))


def test_generate_lda_has_the_plain_servers_fields(client: httpx.Client) -> None:
    answer = client.post("/generate_lda", json={"prompt": "What is the capital of France?"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["prompt"] == "What is the capital of France?"
    assert body["formatted_prompt"] == (
        "### Instruction:\nWhat is the capital of France?\n\n### Response:\n"
    )
    assert body["text"] == body["formatted_prompt"] + body["completion"]
    assert body["alpha"] == 1.0
    assert body["model_after"].endswith("after") and body["model_before"].endswith("before")
    assert body["tokens_generated"] == len(body["token_ids"])
    assert body["stopped_early"] is (body["tokens_generated"] < 80)


def test_32_concurrent_requests_give_the_texts_of_32_sequential_ones(
    client: httpx.Client, tiny_pair: ModelPair
) -> None:
    def ask(i: int) -> list[int]:
        answer = client.post("/generate_lda", json=question(i))
        assert answer.status_code == 200
        ids: list[int] = answer.json()["token_ids"]
        return ids

    one_by_one = [ask(i) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == one_by_one
    assert one_by_one == [expected_ids(tiny_pair, question(i)) for i in range(32)]


def test_a_batch_equals_singles(client: httpx.Client) -> None:
    prompts = [question(i)["prompt"] for i in range(12)]
    alphas = [i / 4 - 1 for i in range(12)]
    shared = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9}
    batch = client.post(
        "/generate_lda_batch", json={"prompts": prompts, "alpha": alphas, "seed": 7, **shared}
    ).json()
    assert batch["batch_size"] == 12 and batch["alpha"] == alphas
    for prompt, alpha, result in zip(prompts, alphas, batch["results"], strict=True):
        assert result["tokens_generated"] == 16  # fixed length is this endpoint's default
        assert result["stopped_early"] is False
        one = {"prompt": prompt, "alpha": alpha, "seed": result["seed"], **shared}
        single = client.post("/generate_lda", json={**one, "ignore_eos": True}).json()
        for field in ("prompt", "formatted_prompt", "completion", "text", "tokens_generated"):
            assert result[field] == single[field]


def test_the_plain_clients_batch_body_works_unchanged(client: httpx.Client) -> None:
    body = {"prompts": ["Hi", "Hello"], "max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9}
    answer = client.post("/generate_lda_batch", json={**body, "alpha": 2.0}).json()
    assert set(answer) == {"results", "alpha", "model_after", "model_before", "batch_size"}
    wanted = {"prompt", "formatted_prompt", "completion", "text", "tokens_generated"}
    assert all(wanted | {"stopped_early"} <= set(result) for result in answer["results"])
    assert client.get("/docs").status_code == 200  # how it sees that the server is up


def test_one_bad_row_of_a_batch_carries_its_error(client: httpx.Client) -> None:
    prompts = ["Hi", "word " * 600, "Hello"]
    answer = client.post("/generate_lda_batch", json={"prompts": prompts, "max_new_tokens": 8})
    assert answer.status_code == 200
    good, bad, other = answer.json()["results"]
    assert bad["error"]["code"] == "context_length_exceeded" and "completion" not in bad
    assert good["completion"] and other["completion"]


def test_side_by_side_is_alpha_0_and_minus_1(client: httpx.Client) -> None:
    body = {"prompt": "Tell me a story.", "max_new_tokens": 24, "seed": 11}
    both = client.post("/generate", json=body).json()
    assert both["prompt"] == body["prompt"]
    for name, alpha in (("model_1", 0), ("model_2", -1)):
        single = client.post("/generate_lda", json={**body, "alpha": alpha}).json()
        assert both[name]["completion"] == single["completion"]
        assert both[name]["text"] == single["text"]
    assert both["model_1"]["model_id"].endswith("after")
    assert both["model_2"]["model_id"].endswith("before")


def test_samples_and_logprobs(client: httpx.Client) -> None:
    body = {"prompt": "Tell me a story.", "n": 4, "seed": 3, "logprobs": True, "alpha": 1.0}
    answer = client.post("/generate_lda", json=body).json()
    assert [s["seed"] for s in answer["samples"]] == [3, 4, 5, 6]
    assert answer["completion"] == answer["samples"][0]["completion"]
    for sample in answer["samples"]:
        assert all(
            len(values) == len(sample["token_ids"]) for values in sample["logprobs"].values()
        )
    one = client.post("/generate_lda", json={**body, "n": 1, "seed": 5}).json()
    assert one["token_ids"] == answer["samples"][2]["token_ids"]


def test_greedy_and_seedless(client: httpx.Client) -> None:
    greedy = [
        client.post("/generate_lda", json={"prompt": "Say hello.", "do_sample": False}).json()
        for _ in range(2)
    ]
    assert greedy[0]["completion"] == greedy[1]["completion"]
    assert greedy[0]["seed"] != greedy[1]["seed"]
    again = {"prompt": "Tell me a story.", "max_new_tokens": 40}
    first = client.post("/generate_lda", json=again).json()
    repeated = client.post("/generate_lda", json={**again, "seed": first["seed"]}).json()
    assert repeated["completion"] == first["completion"]


def test_about_the_service(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/tokenizer_compatibility").json() == {
        "compatible": True,
        "vocab_size_1": 768,
        "vocab_size_2": 768,
        "vocabs_match": True,
        "warning": None,
    }
    ready = client.get("/ready").json()
    assert ready["architecture"] == "llama" and ready["dtype"] == "float32"
    assert len(ready["after_sha256"]["model.safetensors"]) == 64
    assert re.fullmatch(r"\d+\.\d+\.\d+", client.get("/version").json()["version"])


def test_the_docs_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs").text
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert sources and all(source.startswith("/") for source in sources)
    assert all(client.get(source).status_code == 200 for source in sources)
    document = client.get("/openapi.json").text
    assert "ErrorAnswer" in document and "422" not in document
    paths = json.loads(document)["paths"]
    assert {"/generate_lda", "/generate_lda_batch", "/generate", "/ready"} <= set(paths)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate_lda", '{"prompt": "SECRET", "alpha": NaN}', "alpha"),
        ("/generate_lda", '{"prompt": "SECRET", "alpha": 1e400}', "alpha"),
        ("/generate_lda", '{"prompt": "SECRET", "temperature": -Infinity}', "temperature"),
        ("/generate_lda", '{"prompt": "SECRET", "alpha": 51}', "alpha"),
        ("/generate_lda", '{"prompt": "SECRET", "aplha": 1}', "aplha"),
        ("/generate_lda", '{"prompt": "SECRET", "n": "SECRET"}', "n"),
        ("/generate_lda", '{"prompt": "SECRET", "n": 257}', "n"),
        ("/generate_lda", '{"prompt": "SECRET", "max_new_tokens": 0}', "max_new_tokens"),
        ("/generate_lda", '{"prompt": "SECRET", "max_new_tokens": 500}', "max_new_tokens"),
        ("/generate_lda", '{"prompt": "SECRET </s>", "prompt_format": "chat"}', "prompt"),
        ("/generate_lda", '{"prompt": "SECRET", "top_k": 1000000000000000000000}', "top_k"),
        ("/generate_lda", '{"prompt": "SECRET", "seed": 9223372036854775807, "n": 2}', None),
        ("/generate_lda", '{"prompt": ""}', "prompt"),
        ("/generate_lda", '{"prompt": "SECRET\\ud800"}', "prompt"),
        ("/generate_lda", '{"prompt": ["SECRET"]}', "prompt"),
        ("/generate_lda", '{"prompt": "SECRET"', None),
        ("/generate_lda", '["SECRET"]', None),
        ("/generate_lda_batch", '{"prompts": []}', "prompts"),
        ("/generate_lda_batch", '{"prompts": ["SECRET", ""]}', "prompts[1]"),
        ("/generate_lda_batch", '{"prompts": ["SECRET"], "alpha": [1, 2]}', "alpha"),
        ("/generate_lda_batch", '{"prompts": ["SECRET"], "alpha": [51]}', "alpha[0]"),
        ("/generate_lda_batch", '{"prompts": ["SECRET"], "alpha": [NaN]}', "alpha[0]"),
        ("/generate", '{"prompt": "SECRET", "alpha": 1}', "alpha"),
    ],
)
def test_bad_bodies_are_400_and_named_and_not_echoed(
    client: httpx.Client, path: str, body: str, param: str | None
) -> None:
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert "SECRET" not in answer.text and "\\ud800" not in answer.text


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert client.get("/nothing").status_code == 404
    assert client.get("/generate_lda").status_code == 405
    assert "error" in client.get("/nothing").json()


def test_the_handle_answers_completions(service: LocalService, tiny_pair: ModelPair) -> None:
    request = {**question(2), "prompt_format": "alpaca", "n": 3, "logprobs": True}
    answer = by_handle(
        service,
        f"""
        done = handle.generate.remote({request!r}).result(timeout_s=60)
        answer = [[type(c).__name__, c.token_ids, c.text, c.seed, c.finish_reason] for c in done]
        """,
    )
    for i, (kind, ids, text, seed, reason) in enumerate(answer):
        assert kind == "Completion" and seed == 1002 + i and reason in ("length", "eos")
        assert ids == expected_ids(tiny_pair, {**question(2), "seed": seed})
        assert "###" not in text


def test_a_bad_request_by_handle_is_an_invalid_request(service: LocalService) -> None:
    answer = by_handle(
        service,
        """
        answer = []
        for bad in ({"prompt": "a", "aplha": 1}, {"prompt": "word " * 600}):
            try:
                handle.generate.remote(bad).result(timeout_s=60)
            except Exception as error:
                answer.append([type(error.cause).__name__, error.cause.code])
        """,
    )
    assert answer == [
        ["InvalidRequest", "unknown_field"],
        ["InvalidRequest", "context_length_exceeded"],
    ]


def test_requests_survive_the_death_of_a_replica(
    service: LocalService, tiny_pair: ModelPair
) -> None:
    """Half of the requests are on their way when one of the two replicas is killed."""
    bodies = [{**question(i), "prompt_format": "alpaca", "ignore_eos": True} for i in range(40)]
    answer = by_handle(
        service,
        f"""
        import time
        names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
        replica = next(n for n in names if "LDAReplica" in n)
        responses = [handle.generate.remote(body) for body in {bodies!r}]
        time.sleep(0.05)
        ray.kill(ray.get_actor(replica, namespace="serve"))
        answer = [r.result(timeout_s=120)[0].token_ids for r in responses]
        """,
    )
    assert answer == [
        expected_ids(tiny_pair, {k: v for k, v in body.items() if k != "prompt_format"})
        for body in bodies
    ]


def test_score_answers_what_generating_recorded(
    client: httpx.Client, service: LocalService
) -> None:
    """The tokens that were drawn, given back: by handle, and over HTTP as text's tokens."""
    wanted = {
        **{"prompt": "What is 4 plus 3?", "prompt_format": "alpaca", "alpha": 1.0, "seed": 5},
        **{"n": 3, "max_new_tokens": 12, "logprobs": True, "grid": [0.0, 1.0], "watch": [2]},
    }
    drawn = by_handle(
        service,
        f"""
        done = handle.generate.remote({wanted!r}).result(timeout_s=60)
        answer = [completion.model_dump() for completion in done]
        """,
    )
    body = {
        "prompt": wanted["prompt"],
        "prompt_format": "alpaca",
        "continuations": [{"token_ids": row["token_ids"]} for row in drawn],
        "grid": [0.0, 1.0],
    }
    answer = client.post("/score", json=body)
    assert answer.status_code == 200, answer.text
    for row, scored in zip(drawn, answer.json(), strict=True):
        assert scored["token_ids"] == row["token_ids"]
        assert scored["after"] == pytest.approx(row["logprobs"]["after"], abs=1e-4)
        assert scored["before"] == pytest.approx(row["logprobs"]["before"], abs=1e-4)
        for ours, theirs in zip(
            scored["densities"]["normalisers"], row["densities"]["normalisers"], strict=True
        ):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert len(row["watched"]) == len(row["token_ends"]) == len(row["token_ids"])
    two_steps = {"text": " is", "given": drawn[0]["token_ids"][:1]}
    (one,) = client.post("/score", json={**body, "continuations": [two_steps]}).json()
    assert one["token_ids"] and len(one["after"]) == len(one["token_ids"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"continuations": []}, "continuations"),
        ({"continuations": [{"token_ids": [99999]}]}, "continuation"),
        ({"continuations": [{"token_ids": [1] * 600}]}, "continuation"),
        ({"grid": [99.0]}, "grid[0]"),
        ({"temperature": 0}, "temperature"),
        ({"prompt": "x", "prompts": 1}, "prompts"),
    ],
)
def test_a_bad_score_request_names_its_field(
    client: httpx.Client, change: dict[str, Any], param: str
) -> None:
    body = {"prompt": "Hi", "continuations": [{"text": "a"}], **change}
    answer = client.post("/score", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_a_client_that_leaves_frees_its_rows(client: httpx.Client) -> None:
    """Four requests fill the slots of both replicas for far longer than the limit below."""
    big = {"prompt": "Hi", "n": 64, "max_new_tokens": 480, "ignore_eos": True}

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate_lda", json=big, timeout=1.0)

    with ThreadPoolExecutor(4) as pool:
        for leaving in [pool.submit(leave) for _ in range(4)]:
            leaving.result()
    start = time.monotonic()
    for i in range(4):
        assert client.post("/generate_lda", json=question(i)).status_code == 200
    assert time.monotonic() - start < 5


def test_a_capture_over_http_is_that_of_the_handle(
    client: httpx.Client, service: LocalService
) -> None:
    file = safetensors.torch.save({"calm": torch.linspace(-1, 1, 128), "bold": torch.ones(3, 128)})
    body = {
        "prompt": "What is 4 plus 3?",
        "prompt_format": "alpaca",
        "completions": [{"text": "It is 7."}, {"token_ids": [20, 30, 40]}],
        "traits": base64.b64encode(file).decode(),
    }
    answer = client.post("/capture", json=body)
    assert answer.status_code == 200, answer.text
    by_hand = by_handle(
        service,
        f"""
        import base64, safetensors.numpy
        body = {body!r}
        body["traits"] = base64.b64decode(body["traits"])
        answer = []
        for one in handle.capture.remote(body).result(timeout_s=60):
            tensors = safetensors.numpy.load(one.tensors)
            tensors = {{name: values.tolist() for name, values in tensors.items()}}
            answer.append([one.prompt_tokens, one.token_ids, one.tokens, one.traits, tensors])
        """,
    )
    assert len(answer.json()) == len(by_hand) == 2
    for one, (prompt_tokens, token_ids, tokens, traits, tensors) in zip(
        answer.json(), by_hand, strict=True
    ):
        assert one["prompt_tokens"] == prompt_tokens and one["token_ids"] == token_ids
        assert one["tokens"] == tokens and one["traits"] == traits == ["bold", "calm"]
        for role in ("after", "before"):
            for kind, shape in (("norms", (3, 3)), ("scores", (3, 3, 2))):
                found = torch.tensor(one[kind][role])
                assert found.shape == (len(token_ids), *shape)
                wanted = torch.tensor(tensors[f"{role}.{kind}"])
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_capture_too_large_for_json_is_400_with_the_numbers(client: httpx.Client) -> None:
    vectors = {f"t{i}": torch.ones(128) for i in range(200)}
    answer = client.post(
        "/capture",
        json={
            "prompt": "Hi",
            "completions": [{"token_ids": [5] * 400}] * 20,
            "traits": base64.b64encode(safetensors.torch.save(vectors)).decode(),
        },
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "completions" and "at most 20000000 are" in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"raw": True}, "raw"),
        ({"mean": True}, "mean"),
        ({"layer": 0}, "layer"),
        ({"traits": "SECRET"}, "traits"),
        ({"traits": base64.b64encode(b"SECRET").decode()}, "traits"),
        ({"models": "SECRET"}, "models"),
        ({"completions": [{"token_ids": [99999]}]}, "completion"),
        ({"completions": [{"text": "a", "given": [5]}]}, "completions"),
        ({"prompt": "word " * 600}, "prompt"),
    ],
)
def test_bad_captures_are_400_and_named(
    client: httpx.Client, change: dict[str, Any], param: str
) -> None:
    answer = client.post("/capture", json={"prompt": "Hi", **change})
    assert answer.status_code == 400 and "SECRET" not in answer.text
    if "given" not in str(change):
        assert answer.json()["error"]["param"] == param, answer.text


def test_a_taken_port_is_a_clear_error(service: LocalService, tmp_path: Any) -> None:
    port = int(service.url.rpartition(":")[2])
    with pytest.raises(ServiceError, match=f"port {port} on 127.0.0.1 is taken"):
        with local_service(ROOT / "serve_config.yaml", port=port, log=tmp_path / "log"):
            raise AssertionError("started")


# -- while it comes ------------------------------------------------------------------------


def events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(name, data) of each event, [DONE] as it is."""
    name = "message"
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield name, data if data == "[DONE]" else json.loads(data)


def test_a_stream_of_several_alphas_is_their_completions(
    client: httpx.Client, service: LocalService, tiny_pair: ModelPair
) -> None:
    alphas = [-1.0, 0.0, 2.0]
    body = {"prompt": "What is 4 plus 3?", "prompt_format": "alpaca", "seed": 9, "n": 2, "kl": True}
    body |= {"max_new_tokens": 24, "top_logprobs": 2, "alphas": alphas}
    with client.stream("POST", "/stream", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        *pieces, (name, done) = events(answer)
    assert (name, done) == ("message", "[DONE]")
    # Side by side, not one after the other.
    order = [piece["alpha"] for _, piece in pieces]
    assert all(order.index(a) < len(order) / 2 for a in alphas)
    for alpha in alphas:
        for i in range(2):
            mine = [p for _, p in pieces if (p["alpha"], p["index"]) == (alpha, i)]
            last = mine[-1]["completion"]
            assert (
                last["seed"] == 9 + i
                and [p["completion"] for p in mine[:-1]].count(None) == len(mine) - 1
            )
            assert "".join(p["text"] for p in mine) == last["text"]
            ids = [token for p in mine for token in p["token_ids"]]
            settings = {"alpha": alpha, "seed": 9 + i, "max_new_tokens": 24}
            assert ids == expected_ids(tiny_pair, {"prompt": body["prompt"], **settings})
            assert [x for p in mine for x in p["kl"]] == last["kl"] and len(last["kl"]) == len(ids)
            for best in last["top_logprobs"]:
                assert len(best) == 2 and best[0][1] >= best[1][1]


def test_the_first_piece_is_there_before_the_rest(client: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_new_tokens": 400, "ignore_eos": True, "alphas": [0, 1]}
    waits, lengths = [], []
    for _ in range(3):
        start = time.monotonic()
        with client.stream("POST", "/stream", json=body) as answer:
            found = events(answer)
            next(found)
            waits.append(time.monotonic() - start)
            assert list(found)[-1] == ("message", "[DONE]")
        lengths.append(time.monotonic() - start)
    print("first piece after", waits, "of", lengths)
    assert min(waits) < 0.3 and min(waits) < min(lengths) / 2


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"alphas": [0, 51]}, "alphas[1]"),
        ({"alphas": [0] * 2}, "alphas"),
        ({"alpha": 51}, "alpha"),
        ({"n": 257}, "n"),
        ({"max_new_tokens": 500}, "prompt"),
        ({"aplhas": [0]}, "aplhas"),
        ({"prompt": None, "prompt_ids": [768]}, "prompt_ids"),
    ],
)
def test_a_stream_that_is_refused_is_an_answer_with_a_status(
    client: httpx.Client, change: dict[str, Any], param: str
) -> None:
    answer = client.post("/stream", json={"prompt": "word " * 30, **change})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in (param, "max_new_tokens")
    assert answer.headers["x-should-retry"] == "false"


def test_a_client_that_leaves_a_stream_frees_its_rows(client: httpx.Client) -> None:
    """As above, but each has read its first piece."""
    big = {"prompt": "Hi", "n": 64, "max_new_tokens": 480, "ignore_eos": True, "alphas": [1, 2]}

    def leave() -> None:
        with client.stream("POST", "/stream", json=big) as answer:
            assert next(events(answer))

    with ThreadPoolExecutor(4) as pool:
        for leaving in [pool.submit(leave) for _ in range(4)]:
            leaving.result()
    start = time.monotonic()
    for i in range(4):
        assert client.post("/generate_lda", json=question(i)).status_code == 200
    assert time.monotonic() - start < 5


def test_the_handle_streams_and_a_replicas_death_ends_it_in_an_error(
    service: LocalService, tiny_pair: ModelPair
) -> None:
    """Never in an end that looks like one; the streams of the other replica are whole."""
    body = {**question(2), "prompt_format": "alpaca", "ignore_eos": True, "max_new_tokens": 470}
    answer = by_handle(
        service,
        f"""
        import time
        def replicas():
            names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
            return [name for name in names if "LDAReplica" in name]
        def running():  # of one that a test before this has killed Serve hears later than Ray
            of = serve.status().applications["lda"].deployments["LDAReplica"]
            return len(replicas()) == of.replica_states.get("RUNNING") == 2
        while not running():
            time.sleep(0.2)
        streaming = handle.options(stream=True)
        streams = [streaming.stream.remote({body!r}) for _ in range(8)]
        ids = [[t for p in next(stream) for t in p.token_ids] for stream in streams]
        ray.kill(ray.get_actor(replicas()[0], namespace="serve"))
        answer = []
        for found, stream in zip(ids, streams):
            done, error = 0, None
            try:
                for pieces in stream:
                    found += [t for p in pieces for t in p.token_ids]
                    done += any(p.completion for p in pieces)
            except Exception as raised:
                error = type(getattr(raised, "cause", raised)).__name__
            answer.append([found, done, error])
        """,
    )
    plain = {k: v for k, v in body.items() if k != "prompt_format"}
    whole = expected_ids(tiny_pair, plain)
    for ids, done, error in answer:
        assert (ids == whole) if done else (len(ids) < len(whole) and ids == whole[: len(ids)])
        assert (done, error) == (1, None) or (done == 0 and error == "ReplicaDied")
    assert {done for _, done, _ in answer} == {0, 1}
