"""The client over HTTP, against an ASGI application in this process."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from client_app import FakeApp, error, piece
from fakes import PAIR, complete
from test_imports import imported_by

from deployments.schemas import Completion, GenerateRequest
from jobs import client as module
from jobs import client_transport
from jobs.client import AsyncLDAClient, InvalidRequest, LDAClient, Refused, Unanswered
from jobs.prompts import Prompt


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_transport, "FIRST_WAIT_S", 0.001)


def client(app: FakeApp, **options: Any) -> LDAClient:
    return LDAClient(transport=app.transport(), **options)


def test_rows_stand_by_prompt_alpha_and_sample_whatever_comes_first() -> None:
    def answer(request: GenerateRequest) -> list[Completion]:
        time.sleep(0.02 if request.prompt == "a" else 0)
        return complete(request)

    app = FakeApp(answer)
    with client(app) as lda:
        rows = lda.generate(["a", "b"], alpha=[2, 0.5], n=3, seed=10, max_new_tokens=5)
    assert [(r.prompt, r.prompt_id, r.alpha, r.sample, r.seed) for r in rows] == [
        (prompt, str(i), alpha, sample, 10 + 3 * i + sample)
        for i, prompt in enumerate("ab")
        for alpha in (2.0, 0.5)
        for sample in range(3)
    ]
    expected = complete(GenerateRequest(prompt="b", alpha=0.5, n=3, seed=13))
    assert [r.completion for r in rows[-3:]] == [c.text for c in expected]
    assert [r.token_ids for r in rows[-3:]] == [c.token_ids for c in expected]
    assert not rows.failed and {request.max_new_tokens for request in app.seen} == {5}


def test_prompts_may_be_texts_prompts_of_a_file_and_fields_of_a_request() -> None:
    def answer(request: GenerateRequest) -> list[Completion]:
        return complete(request.model_copy(update={"prompt": "x"}))

    app = FakeApp(answer)
    chat = {"id": 7, "messages": [{"role": "user", "content": "Hi"}]}
    with client(app) as lda:
        rows = lda.generate(["a", Prompt("line 2", "b"), chat, {"open_prompt": ""}])
        assert lda.generate("alone")[0].prompt == "alone"
    assert [(r.prompt_id, r.prompt) for r in rows] == [
        *(("0", "a"), ("line 2", "b"), ("7", "user: Hi"), ("3", ""))
    ]
    assert {r.seed - rows[0].seed for r in rows} == {0, 1, 2, 3}  # one was picked


def test_the_same_request_is_sent_again_after_what_may_pass() -> None:
    mishaps = [
        error(429, "full", {"retry-after": "0.05", "x-should-retry": "true"}),
        error(503, "no replica answers", {"x-should-retry": "true"}),
        httpx.RemoteProtocolError("Server disconnected"),
        httpx.ConnectError("refused"),
    ]
    app = FakeApp(mishaps=mishaps)
    start = time.monotonic()
    with client(app) as lda:
        (row,) = lda.generate("a")
    assert time.monotonic() - start >= 0.05  # Retry-After was waited for
    assert not row.failed and len(app.seen) == 5
    assert len(set(map(repr, app.seen))) == 1 and app.seen[0].seed == row.seed


class Broken(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'[{"text": "'
        raise httpx.ReadError("reset")


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    class BreaksOff(httpx.AsyncBaseTransport):
        def __init__(self, *statuses: int) -> None:
            self.statuses = list(statuses)

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.statuses:
                return httpx.Response(self.statuses.pop(), stream=Broken())
            return await app.transport().handle_async_request(request)

    app = FakeApp()
    with LDAClient(transport=BreaksOff(200, 503)) as lda:
        assert not lda.generate("a").failed
    with LDAClient(transport=BreaksOff(200, 200), retries=1) as lda:
        assert lda.generate("a")[0].error == "ReadError: reset"
    for status in (200, 503):  # a stream may have begun: it says so
        with LDAClient(transport=BreaksOff(status)) as lda:
            with pytest.raises(Unanswered, match="ReadError: reset"):
                list(lda.stream("a"))


@pytest.mark.parametrize("broken", ["before the answer", "in the answer"])
def test_a_service_that_went_while_it_answered_is_no_address_without_one(broken: str) -> None:
    """It starts again, which takes longer than a wrong address is tried."""

    class Starts(httpx.AsyncBaseTransport):
        def __init__(self) -> None:
            self.asked = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.asked += 1
            if self.asked == 1 and broken == "in the answer":
                return httpx.Response(200, stream=Broken())
            if self.asked == 1:
                raise httpx.RemoteProtocolError("disconnected")
            if self.asked < 6:
                raise httpx.ConnectError("refused")
            return await app.transport().handle_async_request(request)

    app = FakeApp()
    with LDAClient(transport=Starts(), retries=8) as lda:
        assert not lda.generate("a").failed


def test_tries_are_bounded_but_a_full_queue_is_waited_for_until_the_timeout() -> None:
    app = FakeApp(mishaps=[error(503, "away") for _ in range(9)])
    with client(app, retries=2) as lda:
        (row,) = lda.generate("a")
    assert row.failed and row.error == "503: away" and row.completion is None
    assert len(app.seen) == 3

    app = FakeApp(mishaps=[error(429, "full") for _ in range(6)])
    with client(app, retries=2) as lda:
        assert not lda.generate("a").failed

    app = FakeApp(delay_s=5)
    with client(app, timeout_s=0.1) as lda:
        assert lda.generate("a")[0].error == "no answer in 0.1 s"
    assert app.gone == 1


@pytest.mark.parametrize("status", [400, 500])
def test_what_cannot_succeed_is_not_sent_again(status: int) -> None:
    code = {"code": "context_length_exceeded", "param": "prompt"}
    words = "prompt: too long" if status == 400 else "internal error"
    said = error(status, words, {"x-should-retry": "false"}, **code)
    app = FakeApp(mishaps=[None, said])
    with client(app, in_flight=1) as lda:
        rows = lda.generate(["a", "b", "c"], n=2)
    assert len(app.seen) == 3
    assert [r.failed for r in rows] == [False, False, True, True, False, False]
    assert [r.seed - rows[0].seed for r in rows] == list(range(6))
    assert words in str(rows.failed[0].error) and rows.good[2].prompt == "c"
    assert rows.failed[0].error.count("prompt:") == (status == 400)


def test_what_no_prompt_would_be_answered_with_is_raised_at_once() -> None:
    app = FakeApp()
    with client(app) as lda:
        with pytest.raises(InvalidRequest, match="did you mean temperature"):
            lda.generate(["a"], temprature=1.0)
        with pytest.raises(InvalidRequest, match="alpha"):
            lda.generate(["a"], alpha=[])
        with pytest.raises(InvalidRequest, match="seed"):
            lda.generate(["a"], seed="7")
        with pytest.raises(InvalidRequest, match="again"):
            lda.generate([Prompt("x", "a"), Prompt("x", "b")])
        assert not app.seen
        app.mishaps = [
            error(400, "alpha: must be between -20 and 50", param="alpha", code=code)
            for code in ["invalid_value"] * 3
        ]
        with pytest.raises(InvalidRequest, match="^alpha: must be between -20 and 50$"):
            lda.generate(["a"] * 1 + ["b", "c"], alpha=99)


def test_a_service_that_is_not_there_is_refused_soon(tmp_path: Any) -> None:
    class Nobody(httpx.AsyncBaseTransport):
        tries = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            Nobody.tries += 1
            raise httpx.ConnectError("Connection refused")

    with LDAClient("http://127.0.0.1:9", transport=Nobody(), in_flight=1) as lda:
        with pytest.raises(Refused, match="no service at http://127.0.0.1:9.*\n.*lda serve"):
            lda.generate(["a", "b"])
    assert Nobody.tries == 3
    with pytest.raises(Refused, match="url"):
        LDAClient("127.0.0.1:8000")


def test_a_wrong_key_or_path_is_refused_and_the_key_is_sent() -> None:
    app = FakeApp(mishaps=[error(401, "wrong key")])
    with client(app, api_key="sk-1") as lda:
        with pytest.raises(Refused, match="401: wrong key"):
            lda.generate("a")
        with pytest.raises(Refused, match="404"):
            lda.score("a", "b")
    assert app.headers[0]["authorization"] == "Bearer sk-1"


def test_requests_under_way_are_bounded() -> None:
    app = FakeApp(delay_s=0.01)
    with client(app, in_flight=3) as lda:
        assert len(lda.generate([str(i) for i in range(12)], n=2)) == 24
    assert app.most_under_way == 3


def test_after_many_without_an_answer_nothing_more_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 4)
    app = FakeApp(mishaps=[None] + [error(500, "broken", {"x-should-retry": "false"})] * 50)
    with client(app, in_flight=1) as lda:
        rows = lda.generate([str(i) for i in range(20)])
    assert len(app.seen) == 5 and [row.failed for row in rows] == [False] + [True] * 19
    assert str(rows[-1].error).startswith("not sent: 4 requests in a row")


def test_an_answer_to_something_else_is_refused() -> None:
    def other(request: GenerateRequest) -> list[Completion]:
        return complete(request.model_copy(update={"seed": 1}))

    with client(FakeApp(other)) as lda, pytest.raises(Refused, match="other seeds"):
        lda.generate("a", seed=5)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_takes_back_what_is_under_way() -> None:
    app = FakeApp(hold=asyncio.Event())

    def interrupt() -> None:
        while app.under_way < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with client(app, in_flight=2) as lda:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            lda.generate(["a", "b", "c"])
        assert app.gone == 2 and len(app.seen) == 2
        thread.join()
        app.hold = None
        assert len(lda.generate("again")) == 1  # and the client lives


def test_a_task_that_is_cancelled_takes_back_what_is_under_way() -> None:
    app = FakeApp(hold=asyncio.Event())

    async def main() -> None:
        async with AsyncLDAClient(transport=app.transport()) as lda:
            task = asyncio.ensure_future(lda.generate(["a", "b"]))
            while app.under_way < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert app.gone == 2

    asyncio.run(main())


def test_the_sync_client_works_inside_a_running_loop() -> None:
    async def notebook() -> int:
        with client(FakeApp()) as lda:
            return len(lda.generate(["a"], n=2))

    assert asyncio.run(notebook()) == 2


def test_of_several_pairs_one_is_described_by_its_name() -> None:
    with client(FakeApp(pairs=("a b", "c"))) as lda:
        assert lda.describe("a b").after == "a b"
        with pytest.raises(InvalidRequest, match="there are a b, c") as caught:
            lda.describe()
    assert caught.value.param == "pair"


def test_sync_and_async_are_one() -> None:
    async def main() -> Any:
        async with AsyncLDAClient(transport=FakeApp().transport()) as lda:
            assert (await lda.describe()) == PAIR
            return await lda.generate(["a", "b"], alpha=[0, 2], seed=3)

    with client(FakeApp()) as lda:
        assert lda.describe() == PAIR
        assert lda.generate(["a", "b"], alpha=[0, 2], seed=3) == asyncio.run(main())
    assert LDAClient.generate.__doc__ == AsyncLDAClient.generate.__doc__


def test_a_stream_is_its_pieces_and_an_error_in_it_is_raised() -> None:
    app = FakeApp(events=[piece("Pa"), piece("ris"), "data: [DONE]\n\n"])
    with client(app) as lda:
        pieces = list(lda.stream("a", alpha=[0, 2], seed=7))
        assert [(p.text, p.token_ids) for p in pieces] == [("Pa", [1]), ("ris", [1])]
        assert app.streamed[0] == {"prompt": "a", "seed": 7, "alphas": [0, 2]}
        assert next(iter(lda.stream("a", alpha=3))).text == "Pa"
        assert app.streamed[1]["alpha"] == 3 and "alphas" not in app.streamed[1]

        app.events = [piece("Pa"), 'event: error\ndata: {"error": {"message": "no replica"}}\n\n']
        with pytest.raises(Unanswered, match="no replica"):
            list(lda.stream("a"))
        app.events = [piece("Pa")]
        with pytest.raises(Unanswered, match="in the middle"):
            list(lda.stream("a"))
        app.mishaps, app.events = [error(503, "away")], ["data: [DONE]\n\n"]
        assert list(lda.stream("a")) == []
        app.mishaps = [error(400, "n: must be less", param="n")]
        with pytest.raises(InvalidRequest, match="^n: must be less$"):
            list(lda.stream("a"))


def test_words_of_another_version_are_refused() -> None:
    app = FakeApp(mishaps=[httpx_json([{"text": "a"}])])
    with client(app) as lda, pytest.raises(Refused, match="another version"):
        lda.generate("a")


def httpx_json(content: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content)


@pytest.mark.parametrize("option", [{"in_flight": 0}, {"retries": -1}])
def test_options_have_a_range(option: dict[str, int]) -> None:
    with pytest.raises(Refused, match=next(iter(option))):
        LDAClient(**option)


def test_over_http_neither_ray_nor_torch_is_loaded() -> None:
    seen = imported_by("jobs.client")
    assert "httpx" in seen and not seen & {"ray", "torch", "transformers", "fastapi", "pandas"}
