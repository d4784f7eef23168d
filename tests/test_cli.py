"""The lda command: its doors, what it says, and its exit statuses."""

import json
import os
import shlex
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from client_app import FakeApp, error
from conftest import ROOT, TINY
from fakes import complete
from test_imports import imported_by
from typer.testing import CliRunner

from jobs import cli_generate, cli_serve
from jobs.cli import app
from jobs.cli_files import names, shipped
from jobs.cli_jobs import DOORS
from jobs.cli_serve import settings_of
from jobs.client import LDAClient, Refused
from jobs.client_transport import HttpTransport

runner = CliRunner()


def lda(*arguments: str) -> Any:
    return runner.invoke(app, list(arguments))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> FakeApp:
    """What the command's client asks."""
    fake = FakeApp()

    class Client(LDAClient):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, transport=fake.transport())

    monkeypatch.setattr(cli_generate, "LDAClient", Client)
    return fake


def test_help_is_quick_and_names_every_command() -> None:
    start = time.monotonic()
    command = [sys.executable, "-m", "jobs.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 5  # it takes 0.2 s; a machine may be busy
    for name in ("serve", "generate", "score", "prompts", "files", "version"):
        assert f"\n  {name} " in done.stdout
    for door in DOORS:
        assert f"\n  {door.name} " in done.stdout
    assert not imported_by("jobs.cli") & {"ray", "torch", "pydantic", "numpy", "httpx", "yaml"}


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_a_doors_help_is_the_jobs_own_and_its_example_is_understood(door: Any) -> None:
    done = lda(door.name, "--help")
    assert done.exit_code == 0, done.output
    assert f"for instance: lda {door.name} {door.example}" in done.output
    shown = done.output.partition("\n")[2]
    assert "usage:" in shown
    words = shlex.split(door.example)
    for word in words:
        assert not word.startswith("--") or word in shown, word
    if parser := getattr(import_module(door.module), "parser", None):
        parser().parse_args(words)  # exits where it does not understand


def test_a_jobs_arguments_and_exit_status_pass_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lda("rows-needed", "--rate", "1e-4").exit_code == 0
    assert lda("rows-needed", "--rate", "7").exit_code == 2
    assert lda("sweep", "--no-such-option").exit_code == 2
    assert "no such run" not in lda("report", "--run", "/nowhere").output
    assert lda("report", "--run", "/nowhere").exit_code == 2
    # Nothing is taken out, neither a negative number nor a "--" nor an option of both.
    seen: list[list[str]] = []
    monkeypatch.setattr("jobs.rows_needed.main", lambda: seen.append(list(sys.argv)))
    before = list(sys.argv)
    words = ["--alphas", "-1", "0", "--", "-n", "--url=x", "a b", "--help"]
    assert lda("rows-needed", *words).exit_code == 0
    assert seen == [["lda rows-needed", *words]] and sys.argv == before


def test_generate_prints_rows(served: FakeApp) -> None:
    done = lda("generate", "Hi", "--alpha", "-1,2", "-n", "2", "--seed", "7", "--format", "alpaca")
    assert done.exit_code == 0, done.output
    assert done.output.count("Hi") == 1 and done.output.count("alpha 2, seed 8") == 1
    assert "alpha −1 (before), seed 7" in done.output
    assert {request.prompt_format for request in served.seen} == {"alpaca"}


def test_generate_as_json_and_to_files(served: FakeApp, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("question\na\nb\n")
    source = ("--prompts", str(tmp_path / "p.csv"), "--column", "question")
    done = lda("generate", *source, "--alpha", "0", "--alpha", "1.5", "--seed", "1", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["prompt"], r["alpha"], r["seed"]) for r in rows] == [
        *(("a", 0, 1), ("a", 1.5, 1), ("b", 0, 2), ("b", 1.5, 2))
    ]
    for name in ("rows.jsonl", "rows.csv"):
        out = tmp_path / name
        done = lda("generate", *source, "--limit", "1", "--out", str(out))
        assert done.exit_code == 0 and done.stdout == "" and "a" in out.read_text()
    asked = len(served.seen)
    for out in ("rows.txt", "none/rows.csv"):
        done = lda("generate", *source, "--out", str(tmp_path / out))
        assert done.exit_code == 2 and "error:" in done.stderr
    assert len(served.seen) == asked


def test_a_runs_rows_become_a_table(tmp_path: Path) -> None:
    from jobs.client_rows import GeneratedRow
    from jobs.lines import LineWriter

    row = GeneratedRow(
        prompt_id="1", prompt="=a", alpha=2.0, sample=0, seed=7, completion="b", finish_reason="eos"
    )
    with LineWriter(tmp_path / "rows.jsonl") as writer:
        writer.append([row.as_job_row()])
    done = lda("rows", str(tmp_path), "--out", str(tmp_path / "rows.csv"))
    assert done.exit_code == 0, done.output
    assert "generated,1,'=a,2.0,0,7,b" in (tmp_path / "rows.csv").read_text()
    assert lda("rows", str(tmp_path / "none"), "--out", str(tmp_path / "x.csv")).exit_code == 2


def test_fields_may_be_set(served: FakeApp) -> None:
    fields = ("--set", "amplify_first=5", "--set", 'stop=["x"]', "--set", "system_prompt=hm")
    assert lda("generate", "Hi", *fields, "--format", "chat").exit_code == 0
    assert served.seen[0].amplify_first == 5 and served.seen[0].stop == ["x"]
    assert served.seen[0].system_prompt == "hm"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give prompts"),
        (["Hi", "--prompts", "p.txt"], "give prompts"),
        (["Hi", "--limit", "3"], "need --prompts"),
        (["Hi", "--alpha", "two"], "--alpha: must be a number"),
        (["Hi", "--set", "n"], "--set: must be NAME=VALUE"),
        (["Hi", "--set", "temprature=1"], "did you mean temperature"),
        (["Hi", "--top-p", "7"], "top_p: must be less than or equal to 1"),
        (["--prompts", "none.txt"], "No such file"),
    ],
)
def test_bad_usage_is_said_before_anything_is_sent(
    served: FakeApp, arguments: list[str], words: str
) -> None:
    done = lda("generate", *arguments)
    assert done.exit_code == 2 and words in done.stderr, done.output
    assert not served.seen


def test_failed_rows_are_an_exit_status_and_hostile_texts_stay_texts(served: FakeApp) -> None:
    served.answer = lambda request: [
        one.model_copy(update={"text": "[bold]\x1b[2J\u202eevil"}) for one in complete(request)
    ]
    done = lda("generate", "[red]Hi")
    assert done.exit_code == 0 and "[bold]" in done.output and "[red]Hi" in done.output
    assert "\x1b[2J" not in done.output and "\u202e" not in done.output
    served.mishaps = [error(500, "broken\x1b", {"x-should-retry": "false"})]
    done = lda("generate", "Hi")
    assert done.exit_code == 1 and "1 row(s) failed, the first: 500: broken␛" in done.stderr


def test_where_no_service_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.client_transport.FIRST_WAIT_S", 0.001)
    from deployments.local_service import free_port

    done = lda("generate", "Hi", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.exit_code == 2 and "no service at" in done.stderr and "lda serve" in done.stderr
    assert lda("score", "Hi", "--text", "a", "--url", "nowhere").exit_code == 2


def test_the_key_comes_from_the_environment(
    served: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDA_API_KEY", "sk-1")
    assert lda("generate", "Hi").exit_code == 0
    assert served.headers[0]["authorization"] == "Bearer sk-1"


def test_score_sums_what_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(self: Any, method: str, request: Any) -> Any:
        from deployments.schemas import Densities, Scored

        assert method == "score" and request["grid"] == [0, 2] and request["temperature"] == 0.5
        densities = Densities(alphas=[0, 2], normalisers=[[0.0, 1.0], [0.5, 2.0]])
        return [Scored(token_ids=[1, 2], after=[-1, -2], before=[-3, -5], densities=densities)]

    monkeypatch.setattr(HttpTransport, "ask", ask)
    done = lda("score", "Hi", "--text", "a", "--alpha", "0,2", "--set", "temperature=0.5")
    assert done.exit_code == 0, done.output
    # alpha 0: (-1 - 2) / .5 - .5; alpha 2: (3 * -3 + 2 * 8) / .5 - 3
    assert all(word in done.output for word in ("-3.000", "-8.000", "-6.500", "11.000"))


def test_what_is_shipped_is_found() -> None:
    assert {"serve_config.yaml", "prompts/tiny_demo.txt"} <= set(names())
    listed = lda("files").stdout.split()
    assert listed == names() and all(shipped(name).exists() for name in listed)
    assert Path(lda("files", "prompts/tiny_demo.txt").stdout.strip()).is_file()
    assert lda("files", "prompts/none.txt").exit_code == 2
    assert lda("version").stdout.startswith("lda-serve ")


def test_the_package_holds_what_is_shipped() -> None:
    """Each file that is said to come with the package lies in one of its folders for data."""
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = set()
    for package, patterns in tool["package-data"].items():
        if package.partition(".")[0] == "lda_files":
            assert package in tool["packages"]
            folder = ROOT / tool["package-dir"][package]
            packed |= {path for pattern in patterns for path in folder.glob(pattern)}
    assert {ROOT / name for name in names()} <= packed


def test_the_shipped_configuration_is_served_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(None)
    args = settings["applications"][0]["args"]
    assert args["pair"] == {role: str(TINY / role) for role in ("before", "after")}
    assert Path(args["traits"]).is_dir() and settings["http_options"]["host"] == "127.0.0.1"


def test_a_configuration_of_ones_own_stays_on_this_machine(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("applications: [{name: lda, args: {pair: {before: a}}}]\n")
    assert settings_of(own)["http_options"]["host"] == "127.0.0.1"
    assert settings_of(own)["applications"][0]["args"]["pair"] == {"before": "a"}
    own.write_text("http_options: {host: 0.0.0.0}\napplications: []\n")
    assert settings_of(own)["http_options"]["host"] == "0.0.0.0"
    for text, words in (("a: [", "own.yaml"), ("pair: {}", "no applications")):
        own.write_text(text)
        with pytest.raises(Refused, match=words):
            settings_of(own)
    assert lda("serve", str(tmp_path / "none.yaml")).exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{}", "http_options.host is 0.0.0.0.*edge.keys_file"),
        ("{keys_fil: x}", "keys_fil"),
        ("{keys_file: /none}", "/none: No such file"),
        ("{keys_file_env: LDA_NO_SUCH}", "LDA_NO_SUCH names no file"),
    ],
)
def test_what_the_service_would_refuse_is_refused_before_it_is_started(
    tmp_path: Path, options: str, words: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "http_options: {host: 0.0.0.0}\n"
        f"applications: [{{name: lda, args: {{pair: {{before: a}}, edge: {options}}}}}]\n"
    )
    with pytest.raises(Refused, match=words):
        cli_serve.serve(own, None)
    ours = yaml.safe_load(own.read_text())
    ours["applications"][0]["args"]["edge"] = {"allow_no_key": True}
    assert [edge.asks_for_key for edge in cli_serve.edges_of(ours)] == [False]


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    import socket

    monkeypatch.setattr(cli_serve.signal, "signal", lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli_serve.serve(None, taken.getsockname()[1]) == 1
    assert "is taken" in capfd.readouterr().err


def test_serve_config_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job finds the cluster that `lda serve` started: both use tokens."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    lda("rows-needed", "--rate", "0.1")
    assert os.environ.pop("RAY_AUTH_MODE") == "token"
