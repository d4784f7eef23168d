"""The judge against an endpoint on loopback: cached, tried again, strict, and silent on its key."""

import argparse
import json
import logging
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs import judge as judge_module
from jobs.errors import Refused
from jobs.judge import Answers, Judge
from jobs.scorer_options import add_scorer_options, scorers_from
from jobs.scorers import Phrase, Score, ScorerError, describe, score_row

ROOT = Path(__file__).parents[1]
KEY = "sk-Very-Secret-123"
YES, NO = '{"answer": "yes"}', '{"answer": "no"}'


class Endpoint(ThreadingHTTPServer):
    """Answers from `script`, its last entry for ever: a content, or (status, headers, body)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.seen, self.lock = [YES], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def next(self, request):
        with self.lock:
            self.seen.append(request)
            return self.script.pop(0) if len(self.script) > 1 else self.script[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answer = self.server.next((self.path, self.headers["authorization"], body))
        if answer == "hang up":
            self.close_connection = True
            return
        if answer == "wait":
            self.server.waited.wait(5)
            answer = YES
        if isinstance(answer, str):
            answer = 200, {}, json.dumps({"choices": [{"message": {"content": answer}}]})
        status, headers, text = answer
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = Endpoint()
    server.waited = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.waited.set()
    server.shutdown()
    thread.join()
    server.server_close()
    for timeout_s in (5.0, 0.2):
        judge_module._client(timeout_s).close()
    judge_module._client.cache_clear()


@pytest.fixture
def waits(monkeypatch):
    """The seconds between tries, not waited."""
    waits = []
    monkeypatch.setattr(judge_module.time, "sleep", waits.append)
    return waits


@pytest.fixture
def judge(endpoint, tmp_path, waits, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge_module._answers.cache_clear()
    cache = str(tmp_path / "new" / "judge.jsonl")
    return Judge("judge", endpoint.url, "m", "Is it bad?", "JUDGE_KEY", cache, timeout_s=5.0)


def test_it_asks_the_rubric_about_the_text_at_temperature_0(judge, endpoint):
    endpoint.script = [YES, NO]
    assert judge("naïve \ud800 text") == Score(True)
    assert judge("other") == Score(False)
    path, authorization, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("m", 0)
    system, user = body["messages"]
    assert system["role"] == "system" and system["content"].startswith("Is it bad?")
    assert user == {"role": "user", "content": "naïve \ud800 text"}
    assert replace(judge, key_env=None)("third") == Score(False)
    assert endpoint.seen[-1][1] is None
    assert not judge.monotone


def test_what_was_answered_is_not_asked_again(judge, endpoint):
    endpoint.script = [YES, NO]
    assert judge("a").fired and not judge("b").fired and judge("a").fired
    assert len(endpoint.seen) == 2
    judge_module._answers.cache_clear()  # as in the next process
    assert judge("a").fired and not judge("b").fired
    assert len(endpoint.seen) == 2
    for other in ({"model": "n"}, {"rubric": "?"}, {"base_url": endpoint.url + "/"}):
        replace(judge, **other)("a")
    assert len(endpoint.seen) == 5
    assert "Is it bad?" not in Path(judge.cached).read_text()


@pytest.mark.parametrize("first", [(429, {}, ""), (500, {}, "oops"), (503, {}, "{"), "hang up"])
def test_what_may_pass_is_tried_again(judge, endpoint, waits, first):
    endpoint.script = [first, first, NO]
    assert judge("a") == Score(False)
    assert len(endpoint.seen) == 3
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_tries_are_bounded(judge, endpoint, waits):
    endpoint.script = [(503, {}, "")]
    with pytest.raises(
        ScorerError, match="^scorer judge: no answer in 5 tries, the last: HTTP 503"
    ):
        judge("a")
    assert len(endpoint.seen) == 5 and len(waits) == 4
    endpoint.script = [YES]
    assert judge("a").fired  # a failure is not kept


def test_it_waits_as_long_as_it_is_told_within_bounds(judge, endpoint, waits):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    told = ["7", date, "86400", "soon", "nan"]
    for value in told:
        endpoint.script = [(429, {"retry-after": value}, ""), YES]
        judge(value)
    assert waits[0] == 7 and 17 < waits[1] <= 20 and waits[2] == 30
    assert all(0.5 <= wait <= 1 for wait in waits[3:]) and len(waits) == 5


def test_a_timeout_is_tried_again(judge, endpoint):
    endpoint.script = ["wait", YES]
    assert replace(judge, timeout_s=0.2)("a").fired
    assert len(endpoint.seen) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_what_cannot_pass_is_not_tried_again(judge, endpoint, status, waits):
    body = json.dumps({"error": {"message": f"no such\nmodel for {KEY}" + "!" * 500}})
    endpoint.script = [(status, {}, body)]
    with pytest.raises(ScorerError) as raised:
        judge("a")
    assert len(endpoint.seen) == 1 and waits == []
    message = str(raised.value)
    assert f"HTTP {status}" in message and KEY not in message and len(message) < 300
    assert ("no such model for ***" in message) == (status not in (401, 403))


@pytest.mark.parametrize(
    "answer",
    [
        "yes",
        "",
        "Sure! " + YES,
        '{"answer": "maybe"}',
        '{"answer": true}',
        '{"answer": "yes", "why": "it is"}',
        '["yes"]',
        "[" * 100_000,
        (200, {}, "not JSON"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": [{"message": {"content": null, "refusal": "no"}}]}'),
        (200, {}, "[]"),
    ],
)
def test_another_answer_is_no_answer(judge, endpoint, answer):
    endpoint.script = [answer]
    with pytest.raises(ScorerError, match="did not answer"):
        judge("a")
    assert len(endpoint.seen) == 1 and Path(judge.cached).read_text() == ""


@pytest.mark.parametrize("fence", ["```json\n{}\n```", "```\n{}```", " {}\n"])
def test_a_fence_around_the_answer_is_let_pass(judge, endpoint, fence):
    endpoint.script = [fence.replace("{}", YES)]
    assert judge("a") == Score(True)


def test_its_failure_leaves_the_other_scorers_answers(judge, endpoint):
    endpoint.script = [(404, {}, "")]
    found = score_row([judge, Phrase("p", "a")], "a", None, [1])
    assert found.scores == {
        "judge": Score(None, error="scorer judge: HTTP 404"),
        "p": Score(True, 0, 1, 0),
    }
    assert (found.activated, found.error) == (None, "scorer judge: HTTP 404")


@pytest.mark.parametrize("key", ["", " ", f"{KEY}\nX-Other: 1", f"{KEY}é", f"{KEY} x"])
def test_a_key_that_no_header_may_hold_is_not_sent_nor_shown(judge, endpoint, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ScorerError, match="environment variable") as raised:
        judge("a")
    assert KEY not in str(raised.value) and raised.value.__cause__ is None
    assert endpoint.seen == []


def test_the_key_is_in_no_output(judge, endpoint, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    endpoint.script = [(400, {}, json.dumps({"error": {"message": KEY}})), YES, "maybe", "hang up"]
    shown = [repr(judge), json.dumps(describe([judge]))]
    for text in "abcd":
        try:
            shown.append(str(judge(text)))
        except ScorerError as error:
            shown.append(str(error))
    shown += [caplog.text, *capfd.readouterr()]
    shown += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(endpoint.seen) == 3 + 5 and caplog.text
    assert "5 tries, the last: RemoteProtocolError" in "".join(shown)
    assert KEY not in "".join(shown)
    assert "JUDGE_KEY" not in json.dumps(describe([judge]))


def test_two_processes_share_a_file_and_the_first_answer_stays(tmp_path):
    path = tmp_path / "judge.jsonl"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jobs.judge import Answers\n"
        "answers = Answers(Path(sys.argv[1])); answers.read()\n"
        "mine = sys.argv[2] == '1'\n"
        "print([int(answers.add(f'key {i}', mine)) for i in range(300)])\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), which],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for which in "01"
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"key {i}" for i in range(300)]
    assert said[0] == said[1] == f"{[int(line['yes']) for line in lines]}\n"


def test_a_torn_line_is_asked_again_and_harms_no_other(tmp_path):
    path = tmp_path / "judge.jsonl"
    path.write_text('{"key": "a", "yes": true}\nnot JSON\n{"key": "b", "ye')
    answers = Answers(path)
    answers.read()
    assert (answers.get("a"), answers.get("b")) == (True, None)
    assert answers.add("b", False) is False and answers.add("c", True) is True
    again = Answers(path)
    again.read()
    assert [again.get(key) for key in "abc"] == [True, False, True]


def test_a_cache_that_cannot_be_written_is_no_no(judge, endpoint, tmp_path):
    (tmp_path / "new").write_text("a file")
    with pytest.raises(ScorerError, match="its cache .* exists"):
        judge("a")


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (tmp_path / "rubric.txt").write_text(" Is it bad?\n")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "mine.py").write_text("def f(text): return False\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def options(*words):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_scorer_options(parser)
        return scorers_from(parser.parse_args(words))

    yield options
    sys.modules.pop("mine", None)


JUDGE = ("--judge-url", "https://host:8/v1", "--judge-model", "m", "--judge-rubric", "rubric.txt")


def test_scorers_from_options(options, tmp_path):
    assert [s.name for s in options()] == ["any_substring", "exact_phrase"]
    words = ["--substring", "a", "b", "--phrase", "P", "--phrase", "Q", "--regex", "x$"]
    words += ["--python", "mine:f", *JUDGE, "--judge-key-env", "JUDGE_KEY"]
    scorers = options(*words)
    assert [s.name for s in scorers] == (
        "any_substring phrase_1 phrase_2 regex_1 python_1 judge".split()
    )
    assert [s.monotone for s in scorers] == [True, True, True, False, False, False]
    made = scorers[-1]
    assert (made.rubric, made.model, made.key_env) == ("Is it bad?", "m", "JUDGE_KEY")
    assert made.cached == judge_module.DEFAULT_CACHE
    assert KEY not in json.dumps(describe(scorers))
    [judge] = options(*JUDGE, "--judge-cache", "c.jsonl")
    assert judge.cached == str(tmp_path / "c.jsonl") and judge.key_env is None


@pytest.mark.parametrize(
    "words, says",
    [
        (["--regex", "("], "--regex: '\\(' is not a regular expression"),
        (["--python", "mine:g"], "--python: mine:g: AttributeError"),
        (JUDGE[:4], "--judge-rubric: a judge needs it"),
        (JUDGE[2:], "--judge-url: a judge needs it"),
        (["--judge-cache", "c"], "--judge-key-env and --judge-cache need --judge-url"),
        ([*JUDGE, "--judge-url", f"https://u:{KEY}@host/v1"], "--judge-url: must be"),
        ([*JUDGE, "--judge-url", f"https://host/v1?key={KEY}"], "--judge-url: must be"),
        ([*JUDGE, "--judge-url", "host:8001/v1"], "--judge-url: must be"),
        ([*JUDGE, "--judge-url", "http://[::1/v1"], "--judge-url: must be"),
        ([*JUDGE, "--judge-key-env", KEY], "--judge-key-env: must be the name"),
        ([*JUDGE, "--judge-key-env", "NOT_SET"], "--judge-key-env: must be the name"),
        ([*JUDGE, "--judge-rubric", "no.txt"], "--judge-rubric: no.txt: No such file"),
        ([*JUDGE, "--judge-rubric", "blank.txt"], "must have 1 to 20,000 characters, not 0"),
    ],
)
def test_bad_scorer_options_name_the_option_and_no_secret(options, words, says):
    with pytest.raises(Refused, match=says) as raised:
        options(*words)
    assert KEY not in str(raised.value)
