"""The edge, in this process: what is let in, what is refused, and what is told of it."""

import asyncio
import base64
import gc
import importlib
import json
import logging
import os
import random
import re
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import ROOT
from fakes import PAIR
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.serve._private.http_util import RequestIdMiddleware, validate_http_proxy_callback_return
from starlette.datastructures import Headers

from deployments import edge_json, ingress, request_ids
from deployments.edge import Edge, EdgeMiddleware
from deployments.edge_body import SMALL_BYTES
from deployments.edge_json import MAX_KEYS, TooManyValues, check_json
from deployments.edge_options import EdgeError, EdgeOptions
from deployments.http_errors import install_error_handlers
from deployments.plain_api import LDARequest
from deployments.proxy_guard import CALLBACK, PIECE_BYTES, ProxyGuard
from deployments.resident_pairs import ResidentPairs
from deployments.schemas import InvalidRequest, Limits, ReplicaUnavailable

LOOPBACK = "127.0.0.1"
CANARY = "CANARY-7f3a"
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdefgh"
JSON = {"content-type": "application/json"}


def toy_app(edge: Edge) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)
    app.add_middleware(EdgeMiddleware, edge=lambda: edge)

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/body/{name}")
    async def body(name: str, body: LDARequest) -> dict[str, Any]:
        return {"length": len(body.prompt), "id": request_ids.current()}

    @app.get("/stream")
    def stream() -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            for i in range(3):
                yield f"{i} {request_ids.current()}\n"

        return StreamingResponse(events())

    @app.get("/wait")
    async def wait() -> str:
        await app.state.gate.wait()
        return "done"

    @app.get("/bug")
    def bug() -> None:
        raise KeyError(CANARY)

    return app


def edge_of(**options: Any) -> Edge:
    listening = options.pop("listening", LOOPBACK)
    return Edge(EdgeOptions(**options), listening, serve_tells_id=False)


def client_of(app: Any, **options: Any) -> httpx.AsyncClient:
    base = "http://localhost"
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base, **options)


def ask(method: str, path: str, edge: Edge | None = None, **request: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client_of(toy_app(edge or edge_of())) as client:
            return await client.request(method, path, **request)

    return asyncio.run(once())


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text(f"# who\n\nalice:{ALICE}\n bob : {BOB} \n")
    path.chmod(0o600)
    return str(path)


def code(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


# -- bodies ----------------------------------------------------------------------------


class Raw:
    """One request by hand: `receive` gives `messages`, then waits for ever."""

    def __init__(self, *messages: bytes | None, headers: dict[str, str] | None = None) -> None:
        self.messages = list(messages)
        self.taken = 0
        self.headers = {"host": "localhost", **JSON, **(headers or {})}
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        if self.taken == len(self.messages):
            await asyncio.Event().wait()
        message = self.messages[self.taken]
        self.taken += 1
        await asyncio.sleep(0)
        if message is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": message, "more_body": True}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def ask(self, app: Any, path: str = "/body/a", method: str = "POST") -> tuple[int, str]:
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in self.headers.items()],
        }
        await app(scope, self.receive, self.send)
        if not self.sent:
            return 0, ""
        return self.sent[0]["status"], json.loads(self.sent[1]["body"])["error"]["code"]

    def header(self, name: bytes) -> bytes | None:
        return dict(self.sent[0]["headers"]).get(name)


CHUNKED = {"transfer-encoding": "chunked"}


def test_a_body_that_stalls_is_408_and_its_connection_is_closed() -> None:
    async def run() -> None:
        edge = edge_of(body_timeout_s=0.05)
        raw = Raw(b'{"prompt": ', headers={"content-length": "100"})
        assert await raw.ask(toy_app(edge)) == (408, "body_timeout")
        assert raw.header(b"connection") == b"close"
        assert edge._bodies.reading == edge._bodies.held_bytes == 0

    asyncio.run(run())


def test_a_body_in_drops_has_one_deadline_for_all_of_them() -> None:
    async def run() -> None:
        raw = Raw(*[b" "] * 10_000, headers=CHUNKED)

        async def slow() -> Any:
            await asyncio.sleep(0.01)
            return await Raw.receive(raw)

        raw.receive = slow  # type: ignore[method-assign]
        assert await raw.ask(toy_app(edge_of(body_timeout_s=0.1))) == (408, "body_timeout")

    asyncio.run(run())


def test_a_declared_length_is_refused_before_anything_is_read() -> None:
    async def run() -> None:
        app = toy_app(edge_of(max_body_bytes=100))
        for length in ("101", "9" * 18, "9" * 400):
            raw = Raw(b"x", headers={"content-length": length})
            assert await raw.ask(app) == (413, "body_too_large")
            assert raw.taken == 0
        for length in ("-1", "1e9", "\u0661"):
            raw = Raw(b"x")
            raw.headers["content-length"] = length
            assert await raw.ask(app) == (400, "invalid_content_length")

    asyncio.run(run())


def test_a_body_is_held_once() -> None:
    async def run() -> None:
        large, held = b"x" * 2**23, []
        headers = Headers({**JSON, **CHUNKED})
        tracemalloc.start()
        async with edge_of()._bodies.read(headers, chunks_of(large)) as body:
            held.append(tracemalloc.get_traced_memory()[0])
            assert body == large
        tracemalloc.stop()
        assert held[0] < 1.5 * len(large)

    asyncio.run(run())


def chunks_of(body: bytes) -> Callable[[], Any]:
    starts = iter(range(0, len(body), 2**16))

    async def receive() -> Any:
        start = next(starts)
        more = start + 2**16 < len(body)
        return {"type": "http.request", "body": body[start : start + 2**16], "more_body": more}

    return receive


def test_the_real_length_counts_and_no_more_is_read_than_allowed() -> None:
    async def run() -> None:
        edge = edge_of(max_body_bytes=100)
        for headers in (CHUNKED, {"content-length": "5"}):  # without end; a lie
            raw = Raw(*[b"x" * 30] * 1000, headers=headers)
            assert await raw.ask(toy_app(edge)) == (413, "body_too_large")
            assert raw.taken == 4
        assert edge._bodies.held_bytes == edge._bodies.reading == 0

    asyncio.run(run())


def test_bodies_together_are_bounded_and_small_ones_pass_beside_large_ones_that_stall() -> None:
    async def run() -> None:
        edge = edge_of(max_bodies_bytes=2 * SMALL_BYTES)
        app = toy_app(edge)
        large = [Raw(b"x" * 2 * SMALL_BYTES, headers=CHUNKED) for _ in range(2)]
        stalled = [asyncio.create_task(one.ask(app)) for one in large]
        await asyncio.sleep(0.05)
        assert edge._bodies.held_bytes == 2 * SMALL_BYTES
        third = Raw(b"x" * (SMALL_BYTES + 1), headers=CHUNKED)
        assert await third.ask(app) == (429, "too_many_bodies")
        assert third.header(b"retry-after") == b"1"
        async with client_of(app) as client:
            assert (await client.post("/body/a", json={"prompt": "hi"})).status_code == 200
        for task in stalled:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)
        assert edge._bodies.held_bytes == edge._bodies.reading == 0

    asyncio.run(run())


def test_so_many_bodies_are_read_at_once_and_then_429() -> None:
    async def run() -> None:
        app = toy_app(edge_of(max_bodies=2))
        stalled = [asyncio.create_task(Raw(b"{", headers=CHUNKED).ask(app)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert await Raw(b"{}", headers=CHUNKED).ask(app) == (429, "too_many_bodies")
        async with client_of(app) as client:  # which has no body
            assert (await client.get("/health")).status_code == 200
        for task in stalled:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)

    asyncio.run(run())


def test_a_client_that_goes_in_the_middle_of_its_body_is_not_answered() -> None:
    async def run() -> None:
        raw = Raw(b"{", None, headers=CHUNKED)
        assert await raw.ask(toy_app(edge_of())) == (0, "")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({"content-type": "application/x-www-form-urlencoded"}, "unsupported_content_type"),
        ({"content-type": "text/plain"}, "unsupported_content_type"),  # a form of another site
        ({"content-type": "application/jsonx"}, "unsupported_content_type"),
        ({}, "unsupported_content_type"),
        ({**JSON, "content-encoding": "gzip"}, "unsupported_content_encoding"),
        ({**JSON, "content-encoding": "identity, br"}, "unsupported_content_encoding"),
    ],
)
def test_what_is_no_plain_json_is_415(headers: dict[str, str], wanted: str) -> None:
    answer = ask("POST", "/body/a", content=b'{"prompt": "a"}', headers=headers)
    assert code(answer) == (415, wanted)


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_let_in(kind: str) -> None:
    body = json.dumps({"prompt": 'a \ud83d\ude00 [[[ {"} \\'}).encode()
    answer = ask("POST", "/body/a", content=body, headers={"content-type": kind})
    assert answer.status_code == 200, answer.text
    large = json.dumps({"prompt": "[" * 2**19}).encode()  # looked at in a thread
    assert ask("POST", "/body/a", content=large, headers=JSON).json()["length"] == 2**19


# -- JSON ------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return '{"a":[' * (depth // 2) + "1" + "]}" * (depth // 2)


@pytest.mark.parametrize(
    ("body", "wanted", "param"),
    [
        (nested(66), "nested_too_deeply", None),
        ("[" * 200_000, "nested_too_deeply", None),
        ("[]" + "[" * 65, "nested_too_deeply", None),
        ('{"prompt": "a", "prompt": "b"}', "duplicate_key", "prompt"),
        ('{"x": [{"y": 1, "CANARY-7f3a": 1, "CANARY-7f3a": 2}]}', "duplicate_key", None),
        ('{"seed": 1, "prompt": "\\ud800"}', "invalid_value", "prompt"),
        ('{"\\udc00\\ud800": 1, "prompt": "a"}', "invalid_value", None),
        (b'{"prompt": "\xed\xa0\x80"}', "invalid_json", None),
        (b'{"prompt": "\xff"}', "invalid_json", None),
        ('{"prompt": "a", "alpha": NaN}', "invalid_value", "alpha"),
        ('{"prompt": "a", "alpha": -Infinity}', "invalid_value", "alpha"),
        ('{"prompt": "a", "alpha": 1e400}', "invalid_value", "alpha"),
        ('{"prompt": "a", "alpha": ' + "9" * 5000 + "}", None, None),
        ('{"prompt": ' + '\\"' * 10_000, "invalid_json", None),
        ('{"prompt": "' + '\\"' * 200_000, "invalid_json", None),
        ('{"prompt": "a"', "invalid_json", None),
        ("]][[", "invalid_json", None),
        *(
            pytest.param(
                '{"prompt": "a", "prompt": "b"}'.encode(name), "invalid_json", None, id=name
            )
            for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
        ),
    ],
)
def test_json_that_is_refused(body: str | bytes, wanted: str | None, param: str | None) -> None:
    answer = ask("POST", "/body/a", content=body, headers=JSON)
    status, said = code(answer)
    assert status == 400
    assert wanted is None or (said, answer.json()["error"]["param"]) == (wanted, param)
    assert CANARY not in answer.text


def test_depth_is_exact_and_strings_do_not_count() -> None:
    for depth in range(1, 9):
        for text in ("[" * depth + "]" * depth, "[[]," * (depth - 1) + "[]" + "]" * (depth - 1)):
            check_json(text.encode(), depth, 100, frozenset)
            if depth > 1:
                with pytest.raises(InvalidRequest, match="deeper than"):
                    check_json(text.encode(), depth - 1, 100, frozenset)
    check_json(b'["[[[[[\\"[[[[", {"}]}[[[[": "\\\\"}]', 2, 100, frozenset)


def test_a_body_is_looked_at_in_pieces_as_if_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a string does not end, or ends in what only looks like its end."""
    two = re.compile(edge_json._SOME.pattern.replace(b"20000", b"2"), re.DOTALL)
    monkeypatch.setattr(edge_json, "_SOME", two)
    rng, found = random.Random(0), set()
    for _ in range(3000):
        body = bytes(rng.choices(b'"\\[]{},a ', k=rng.randrange(40)))
        outside = edge_json._STRINGS.sub(b"", body)
        whole = outside.translate(edge_json._ONE_KIND, edge_json._NOT_STRUCTURE)
        assert edge_json._structure(body) == whole
        found.add(whole)
    assert len(found) > 1000


def test_values_are_counted() -> None:
    check_json(b'{"a": [1, 2, ",,,,"]}', 9, 4, frozenset)
    with pytest.raises(TooManyValues):
        check_json(b'{"a": [1, 2, 3, 4]}', 9, 4, frozenset)
    answer = ask("POST", "/body/a", edge_of(max_json_values=9), json={"prompt": [1] * 10})
    assert code(answer) == (413, "too_many_values")


def test_what_would_take_seconds_to_refuse_is_refused_first() -> None:
    """Strings without a comma, keys that nobody knows, integers that Python does not read."""
    check_json(b'{"a": "b", "c": ["d", "e"], "\\"\\"": "\\"\\"\\""}', 9, 5, frozenset)
    with pytest.raises(TooManyValues):
        check_json(b'"' * 60, 9, 9, frozenset)
    for keys, many in ((MAX_KEYS, False), (MAX_KEYS + 1, True)):
        body = json.dumps({str(i): 0 for i in range(keys)}).encode()
        with pytest.raises(TooManyValues) if many else nullcontext():
            check_json(body, 9, 10**6, frozenset)
    with pytest.raises(InvalidRequest, match="digits") as refused:
        check_json(b'{"seed": ' + b"1" * 5000 + b"}", 9, 9, frozenset)
    assert refused.value.code == "invalid_json"


def test_lists_end_at_their_first_error() -> None:
    """Only it is told, and two million of them would take gigabytes."""

    def lists(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if schema.get("type") == "list":
                yield schema
            schema = schema.values()
        if not isinstance(schema, str):
            with suppress(TypeError):
                for part in schema:
                    yield from lists(part)

    def kinds(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield of
        for one in of.__subclasses__():
            yield from kinds(one)

    paths = ingress.app.openapi()["paths"].values()
    bodies = json.dumps(
        [one["requestBody"] for path in paths for one in path.values() if "requestBody" in one]
    )
    names = set(re.findall(r"schemas/(\w+)", bodies))
    asked = [model for model in kinds(BaseModel) if model.__name__ in names]
    assert len(names) > 8 and names == {model.__name__ for model in asked}
    for model in asked:
        for one in lists(model.__pydantic_core_schema__):
            assert one.get("fail_fast"), f"a list of {model.__name__}: {one['items_schema']}"


def test_refusals_are_counted_by_their_code(
    monkeypatch: pytest.MonkeyPatch, keys_file: str
) -> None:
    counted: list[Any] = []
    monkeypatch.setattr("deployments.edge.count", lambda name, **tags: counted.append((name, tags)))
    edge = edge_of()
    ask("POST", "/body/a", edge, content="a=b")
    ask("POST", "/body/a", edge, content='{"prompt": "a", "prompt": "b"}', headers=JSON)
    ask("GET", "/stream", edge_of(keys_file=keys_file))
    for passed in ({"prompt": "a"}, {"promt": "a"}):  # what a route refuses is Serve's to count
        ask("POST", "/body/a", edge, json=passed)
    ask("GET", "/bug", edge)
    codes = ["unsupported_content_type", "duplicate_key", "invalid_api_key"]
    assert counted == [("lda_edge_refused", {"code": code}) for code in codes]


# -- ids and the log -------------------------------------------------------------------


def test_a_harmless_id_is_kept_and_every_answer_has_one() -> None:
    for asked in ("a", "Job-7.row_3", "x" * 64):
        answer = ask("POST", "/body/a", json={"prompt": "a"}, headers={"x-request-id": asked})
        assert answer.headers["x-request-id"] == answer.json()["id"] == asked
        assert ask("GET", "/no", headers={"x-request-id": asked}).headers["x-request-id"] == asked
    for asked in ("", "x" * 65, "a b", "a\x1b[31m", "a/b", b"\xe9"):
        answer = ask("POST", "/body/a", json={"prompt": "a"}, headers={"x-request-id": asked})
        assert re.fullmatch("[0-9a-f]{32}", answer.json()["id"])
        assert answer.headers["x-request-id"] == answer.json()["id"]
    stream = ask("GET", "/stream", headers={"x-request-id": "s-1"})
    assert stream.text == "0 s-1\n1 s-1\n2 s-1\n" and stream.headers["x-request-id"] == "s-1"


def test_where_serves_proxy_tells_the_id_it_is_not_told_twice() -> None:
    edge = Edge(EdgeOptions(), LOOPBACK)
    assert "x-request-id" not in ask("GET", "/health", edge, headers={"x-request-id": "a"}).headers
    assert "x-request-id" in ask("GET", "/health", edge, headers={"x-request-id": "a b"}).headers


def test_a_bug_is_told_and_logged_under_the_requests_id(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        answer = ask("GET", "/bug", headers={"x-request-id": "night-7"})
    assert code(answer) == (500, "internal_error")
    assert answer.json()["error"]["message"].endswith("under request id night-7")
    assert answer.headers["x-request-id"] == "night-7" and CANARY not in answer.text
    assert "request night-7 failed" in caplog.text


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "ray.serve.access"]


def test_each_request_has_a_line_without_a_clients_words(
    caplog: pytest.LogCaptureFixture, keys_file: str
) -> None:
    edge = edge_of(keys_file=keys_file)
    bearer = {"authorization": f"Bearer {ALICE}"}
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        ask("POST", f"/body/{CANARY}?{CANARY}", edge, json={"prompt": CANARY}, headers=bearer)
        ask("GET", f"/{CANARY}", edge, headers=bearer)
        ask(CANARY, "/health", edge, headers={"x-request-id": f"{CANARY}\r\n", **bearer})
        ask("GET", "/stream", edge, headers={"authorization": f"Bearer {CANARY}"})
    done = lines(caplog)
    assert [(d["method"], d["route"], d["status"], d["key"]) for d in done] == [
        ("POST", "/body/{name}", 200, "alice"),
        ("GET", None, 404, "alice"),
        (None, "/health", 405, "alice"),
        ("GET", None, 401, None),
    ]
    assert all(set(d) >= {"request_id", "seconds"} and d["seconds"] >= 0 for d in done)
    for secret in (CANARY, ALICE, "\r", "\x1b"):
        assert secret not in caplog.text


# -- keys ------------------------------------------------------------------------------


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_keys_as_bearer_as_header_and_as_a_browsers_password(keys_file: str) -> None:
    edge = edge_of(keys_file=keys_file)
    for headers in (
        {"authorization": f"Bearer {ALICE}"},
        {"authorization": f"bearer  {BOB}"},
        {"x-api-key": BOB},
        {"authorization": basic("anyone", BOB)},
    ):
        assert ask("GET", "/stream", edge, headers=headers).status_code == 200
    for headers in (
        {},
        {"authorization": f"Bearer {ALICE}x"},
        {"authorization": f"Bearer {ALICE[:-1]}"},
        {"authorization": ALICE},
        {"authorization": "Bearer"},
        {"authorization": "Basic !!!"},
        {"authorization": basic(ALICE, "")},
        {"x-api-key": "alice"},
        {"cookie": ALICE},
    ):
        answer = ask("GET", "/stream", edge, headers=headers)
        assert code(answer) == (401, "invalid_api_key")
        assert answer.headers.get_list("www-authenticate")[0].startswith("Bearer")
        assert ALICE not in answer.text


def test_only_health_itself_is_open(keys_file: str) -> None:
    edge = edge_of(keys_file=keys_file)
    assert ask("GET", "/health", edge).status_code == 200
    for path in ("/health/", "/healthz", "//health", "/HEALTH", "/health/../stream", "/no", "/"):
        assert ask("GET", path, edge).status_code == 401, path
    assert ask("OPTIONS", "/stream", edge, headers={"origin": "http://x"}).status_code == 401


def test_a_stranger_has_no_body_read(keys_file: str) -> None:
    """Or a few that stall, at the route that is open, would shut out who has a key."""

    async def run() -> None:
        edge = edge_of(keys_file=keys_file, max_bodies=2)
        app = toy_app(edge)
        for path, method, headers in (
            ("/health", "POST", {"content-length": "9"}),
            ("/health", "POST", CHUNKED),
            ("/health", "GET", CHUNKED),
            ("/health", "HEAD", {"content-length": "9"}),
            ("/health", "DELETE", {}),
            ("/body/a", "POST", CHUNKED),
        ):
            raw = Raw(b"{", headers=headers)
            async with asyncio.timeout(5):
                assert await raw.ask(app, path, method) == (401, "invalid_api_key")
            assert raw.taken == 0 and edge._bodies.reading == 0
        async with client_of(app) as client:
            assert (await client.head("/health")).status_code == 405  # let in; no route of ours
            bearer = {"authorization": f"Bearer {ALICE}"}
            there = await client.post("/body/a", json={"prompt": "hi"}, headers=bearer)
            assert there.status_code == 200

    asyncio.run(run())


def test_a_key_has_so_many_requests_under_way(keys_file: str) -> None:
    async def run() -> None:
        app = toy_app(edge_of(keys_file=keys_file, max_in_flight_per_key=2))
        app.state.gate = asyncio.Event()
        alice, bob = ({"authorization": f"Bearer {key}"} for key in (ALICE, BOB))
        async with client_of(app) as client:
            waiting = [asyncio.create_task(client.get("/wait", headers=alice)) for _ in range(2)]
            await asyncio.sleep(0.05)
            refused = await client.get("/stream", headers=alice)
            assert code(refused) == (429, "too_many_of_key")
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["x-should-retry"] == "true"
            assert (await client.get("/stream", headers=bob)).status_code == 200
            app.state.gate.set()
            assert [one.status_code for one in await asyncio.gather(*waiting)] == [200, 200]
            assert (await client.get("/stream", headers=alice)).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no keys in it"),
        ("alice\n", ":1: not NAME:KEY"),
        (f"al ice:{ALICE}\n", ":1: not NAME:KEY"),
        ("# x\nalice:CANARY-7f3a\n", ":2: a key has at least 16"),
        ("alice:CANARY-7f3a 0123456789\n", ":1: a key has at least 16"),
        (f"alice:{ALICE}\nalice:{BOB}\n", ":2: a name, or a key, for the second time"),
        (f"alice:{ALICE}\nbob:{ALICE}\n", ":2: a name, or a key, for the second time"),
    ],
)
def test_a_bad_keys_file_is_refused_without_showing_it(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(EdgeError, match=re.escape(words)) as caught:
        edge_of(keys_file=str(path))
    assert CANARY not in str(caught.value) and ALICE not in str(caught.value)


def test_a_keys_file_that_others_read_or_that_is_not_there(
    keys_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chmod(keys_file, 0o644)
    with pytest.raises(EdgeError, match="chmod o-rw"):
        edge_of(keys_file=keys_file)
    with pytest.raises(EdgeError, match="No such file"):
        edge_of(keys_file=keys_file + "x")
    os.chmod(keys_file, 0o640)
    monkeypatch.delenv("LDA_KEYS", raising=False)
    with pytest.raises(EdgeError, match="LDA_KEYS names no file"):
        edge_of(keys_file_env="LDA_KEYS")
    monkeypatch.setenv("LDA_KEYS", keys_file)
    assert ask("GET", "/stream", edge_of(keys_file_env="LDA_KEYS")).status_code == 401
    with pytest.raises(ValueError, match="at most one of"):
        EdgeOptions(keys_file="a", keys_file_env="b")


def test_no_key_stays_in_memory(keys_file: str) -> None:
    edge = edge_of(keys_file=keys_file)
    seen: set[int] = set()
    found = [edge]
    while found:
        one: Any = found.pop()
        if id(one) in seen or isinstance(one, type) or len(seen) > 50_000:
            continue
        seen.add(id(one))
        if isinstance(one, (str, bytes)):
            text = one if isinstance(one, str) else one.decode("latin-1")
            assert ALICE not in text
        elif not callable(one):
            found += gc.get_referents(one)


# -- hosts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "host", "allowed"),
    [
        ({}, "localhost", True),
        ({}, "LOCALHOST:8000", True),
        ({}, "127.0.0.1:1", True),
        ({}, "[::1]:8000", True),
        ({}, "[::1]", True),
        ({}, "evil.example", False),
        ({}, "localhost.evil.example:8000", False),
        ({}, "localhost:evil", False),
        ({}, "127.0.0.2", False),
        ({}, "", False),
        ({"hosts": ["GPU-1.lab"]}, "gpu-1.lab:8000", True),
        ({"hosts": ["gpu-1.lab"]}, "localhost", True),
        ({"hosts": ["gpu-1.lab"]}, "gpu-2.lab", False),
        ({"listening": "0.0.0.0", "keys_file": ""}, "any.example", True),
        ({"listening": "0.0.0.0", "keys_file": "", "hosts": ["a"]}, "any.example", False),
        ({"listening": "0.0.0.0", "allow_no_key": True}, "any.example", False),
        ({"listening": "0.0.0.0", "allow_no_key": True, "hosts": ["*"]}, "any.example", True),
    ],
)
def test_hosts(options: dict[str, Any], host: str, allowed: bool, keys_file: str) -> None:
    if "keys_file" in options:
        options = {**options, "keys_file": keys_file}
    headers = {"host": host, "authorization": f"Bearer {ALICE}"}
    answer = ask("GET", "/health", edge_of(**options), headers=headers)
    if allowed:
        assert answer.status_code == 200
    else:
        assert code(answer) == (400, "host_not_allowed")


def test_no_other_origin_is_let_in() -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    for method in ("GET", "OPTIONS"):
        answer = ask(method, "/health", headers=headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_headers_are_bounded() -> None:
    many = {f"x-{i}": "a" for i in range(200)}
    for headers in (many, {"x-large": "a" * 40_000}):
        assert code(ask("GET", "/health", headers=headers)) == (431, "headers_too_large")


@pytest.mark.parametrize("listening", ["0.0.0.0", "::", "10.0.0.3", "gpu-1.lab"])
def test_nobody_listens_beyond_this_machine_without_keys(listening: str, keys_file: str) -> None:
    with pytest.raises(EdgeError, match=f"http_options.host is {listening}: .*edge.keys_file"):
        edge_of(listening=listening)
    edge_of(listening=listening, allow_no_key=True)
    edge_of(listening=listening, keys_file=keys_file)


@pytest.mark.parametrize("listening", ["127.0.0.1", "127.1.2.3", "::1", "localhost", None])
def test_on_this_machine_no_key_is_needed(listening: str | None) -> None:
    edge_of(listening=listening)


# -- the service's own application -----------------------------------------------------


class Handle:
    """A replica's, of a pair that can only say what it is."""

    def options(self, **_: Any) -> "Handle":
        return self

    def __getattr__(self, name: str) -> Any:
        async def remote(*_: Any) -> Any:
            if name == "describe":
                return PAIR
            raise ReplicaUnavailable

        return SimpleNamespace(remote=remote)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[Edge], FastAPI]:
    """The ingress' application without Serve."""

    def of(edge: Edge) -> FastAPI:
        plain = ingress.Ingress.__mro__[1]  # without what Serve adds
        one = plain.__new__(plain)
        one._limits, one.results, one.edge = Limits(), None, edge
        one._pairs = ResidentPairs({"lda": Handle()}, one._limits)
        context = SimpleNamespace(servable_object=one)
        monkeypatch.setattr(serve, "get_replica_context", lambda: context)
        return ingress.app

    return of


def paths(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path of the application, those out of the schema too."""
    found = []
    pending = list(app.routes)
    while pending:
        route: Any = pending.pop()
        if not hasattr(route, "path"):  # a router that was included
            pending += route.original_router.routes
            continue
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        found += [(method, path) for method in getattr(route, "methods", None) or ["GET"]]
    return sorted(set(found))


def test_every_route_but_health_wants_a_key(
    served: Callable[[Edge], FastAPI], keys_file: str
) -> None:
    app = served(edge_of(keys_file=keys_file))
    everywhere = paths(app)
    known = {path for _, path in everywhere}
    assert len(known) > 25
    for one in ("/", "/docs", "/openapi.json", "/metrics", "/runs", "/page/x", "/v1/models"):
        assert one in known, one

    async def run() -> dict[tuple[str, str], int]:
        async with client_of(app) as client:
            return {
                (method, path): (await client.request(method, path)).status_code
                for method, path in everywhere
            }

    statuses = asyncio.run(run())
    assert {where for where, status in statuses.items() if status != 401} == {("GET", "/health")}


def test_nothing_that_a_client_says_comes_back(
    served: Callable[[Edge], FastAPI], caplog: pytest.LogCaptureFixture, keys_file: str
) -> None:
    """But the name of a field that is not known, its controls taken out: see test_schemas.py."""
    app = served(edge_of())
    body = {"prompt": CANARY, "alpha": CANARY, "model": CANARY, "messages": CANARY}
    refused = 0

    async def run() -> None:
        nonlocal refused
        async with client_of(app) as client:
            for method, path in paths(app):
                for asked in (
                    {"json": body},
                    {"json": [CANARY]},
                    {"json": {"model": CANARY, "prompt": "a", "messages": [{"role": CANARY}]}},
                    {"json": {"prompt": "a", "seed": CANARY, "stop": {CANARY: CANARY}}},
                    {"content": f'{{"{CANARY}": 1, "{CANARY}": 2}}', "headers": JSON},
                    {"content": f"{{{CANARY}", "headers": JSON},
                    {"content": f'{{"prompt": "{CANARY}\\ud800"}}', "headers": JSON},
                    {"content": f'{{"{CANARY}\\udfff": 1, "prompt": "a"}}', "headers": JSON},
                    {"content": CANARY, "headers": {"content-type": CANARY}},
                    {"content": CANARY, "headers": {**JSON, "content-encoding": CANARY}},
                    {"headers": {"host": CANARY}},
                    {"headers": {"x-request-id": f"{CANARY} {CANARY}"}},
                    {"params": {"pair": CANARY, "model": CANARY, CANARY: CANARY}},
                    {"headers": {"x-" + CANARY: CANARY, "range": CANARY, "accept": CANARY}},
                ):
                    if path == "/metrics":
                        continue
                    where = path.replace("/x", f"/{CANARY}")
                    answer = await client.request(method, where, **asked)
                    refused += answer.status_code >= 400
                    assert answer.status_code != 500, (method, path, asked, answer.text)
                    if answer.is_redirect:  # to the same with a slash: no error
                        continue
                    told = answer.text + str(answer.headers)
                    assert CANARY not in told, (method, path, asked, told)
            for method in ("GET", CANARY):
                for path in (f"/{CANARY}", f"/v1/models/{CANARY}", f"/runs/{CANARY}/report.html"):
                    answer = await client.request(method, path)
                    assert answer.status_code in (404, 405)
                    assert CANARY not in answer.text + str(answer.headers)

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert refused > 200
    assert CANARY not in "".join(json.dumps(line) for line in lines(caplog))


# -- in Serve's proxy ------------------------------------------------------------------


async def seen_by_serve(*headers: tuple[bytes, bytes]) -> tuple[Any, Any]:
    """The headers that Serve's own code gets, and those of the answer."""
    seen: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.extend(message["headers"])

    scope = {"type": "http", "headers": list(headers)}
    await ProxyGuard(RequestIdMiddleware(app))(scope, Raw().receive, send)
    return seen, sent


def test_nor_of_a_handshake() -> None:
    async def run() -> None:
        seen: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["headers"])

        bad = (b"x-request-id", "\u2028".encode())
        for kind in ("http", "websocket"):
            scope = {"type": kind, "headers": [bad, (b"host", b"a")]}
            await ProxyGuard(app)(scope, Raw().receive, Raw().send)
        assert seen == [[(b"host", b"a")]] * 2

    asyncio.run(run())


def test_the_proxy_passes_on_no_header_that_it_would_stumble_over() -> None:
    async def run() -> None:
        for bad in (b"a\xe9", b"a b", b"x" * 65):
            seen, sent = await seen_by_serve((b"x-request-id", bad), (b"host", b"\xe9"))
            (told,) = [value for name, value in sent if name.lower() == b"x-request-id"]
            assert told == dict(seen)[b"x-request-id"] != bad
            assert (b"host", b"\xe9") in seen
        _, sent = await seen_by_serve((b"x-request-id", b"night-7"))
        assert [value for _, value in sent] == [b"night-7"]
        for name in (b"serve_multiplexed_model_id", b"x-session-id"):
            seen, _ = await seen_by_serve((name, b"\xe9"))
            assert name not in dict(seen)

    asyncio.run(run())


def test_a_client_that_does_not_read_is_gone() -> None:
    async def run() -> None:
        told: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            waiting = asyncio.create_task(receive())
            for i in range(5):
                await send({"type": "http.response.body", "body": b"%d" % i, "more_body": True})
            told.append(await waiting)

        sent: list[bytes] = []

        async def send(message: Any) -> None:
            if len(sent) == 2:
                await asyncio.Event().wait()
            sent.append(message["body"])

        guard = ProxyGuard(app, send_timeout_s=0.05)
        await guard({"type": "http", "headers": []}, Raw().receive, send)
        assert sent == [b"0", b"1"] and told == [{"type": "http.disconnect"}]

    asyncio.run(run())


def test_a_large_answer_is_sent_in_pieces_and_kept_for_nobody_who_does_not_read() -> None:
    """The server waits only before it writes: of one message nothing would ever be cut."""
    body = bytes(range(256)) * 1000  # no multiple of a piece

    async def run(reads: int) -> list[Any]:
        sent: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            if reads == 0:
                assert await receive() == {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if reads == 0 and sum(len(one.get("body", b"")) for one in sent) >= PIECE_BYTES:
                await asyncio.Event().wait()
            sent.append(message)

        guard = ProxyGuard(app, send_timeout_s=0.05)
        await guard({"type": "http", "headers": []}, Raw().receive, send)
        return sent

    start, *pieces = asyncio.run(run(reads=1))
    assert start["type"] == "http.response.start" and "body" not in start
    assert b"".join(one["body"] for one in pieces) == body
    assert max(len(one["body"]) for one in pieces) == PIECE_BYTES
    assert [one.get("more_body", False) for one in pieces] == [True] * (len(pieces) - 1) + [False]
    _, piece = asyncio.run(run(reads=0))
    assert piece["body"] == body[:PIECE_BYTES] and piece["more_body"]


def test_a_client_that_reads_is_passed_through() -> None:
    async def run() -> None:
        got: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            got.extend([await receive(), await receive(), await receive()])

        raw = Raw(b"a", b"b", None)
        await ProxyGuard(app)({"type": "http", "headers": []}, raw.receive, raw.send)
        assert [one.get("body") for one in got] == [b"a", b"b", None]

    asyncio.run(run())


@pytest.mark.parametrize("file", ["Makefile", "README.md", "serve_config.a40.yaml"])
def test_whoever_starts_the_service_is_told_to_set_it(file: str) -> None:
    ((name, path),) = CALLBACK.items()
    assert f"{name}={path}" in (ROOT / file).read_text()


def test_serve_can_call_it_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.proxy_guard.make_full_collections_rare", lambda: None)
    (path,) = CALLBACK.values()
    module, _, name = path.partition(":")
    called = getattr(importlib.import_module(module), name)()
    assert [one.cls for one in validate_http_proxy_callback_return(called)] == [ProxyGuard]
