"""The page's files and the runs' reports over HTTP: what is served, with which headers, and what
never is."""

import os
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deployments import page_routes
from deployments.http_errors import install_error_handlers
from deployments.page_routes import add_page_routes

PAGE = Path(page_routes.__file__).parent / "page"


def client_of(results: Path | None) -> TestClient:
    app = FastAPI()
    install_error_handlers(app)
    add_page_routes(app, lambda: results)
    return TestClient(app)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two runs, a night's step, and what must stay hidden."""
    folder = tmp_path / "results"
    for i, name in enumerate(["old/report.html", "night/steps/one/report.html", "new/report.html"]):
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(f"<p>{name}</p>")
        os.utime(path, (1_700_000_000 + i, 1_700_000_000 + i))
    (folder / "old" / "rows.jsonl").write_text("secret")
    (folder / "new" / "summary.json").write_text('{"rate": 1}')
    os.utime(folder / "new" / "summary.json", (1_700_000_002, 1_700_000_002))
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "manifest.json").write_text("{}")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "report.html").write_text("secret")
    (tmp_path / "report.html").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.html").write_text("secret")
    (folder / "old" / "report_link.html").symlink_to(tmp_path / "report.html")
    (folder / "old" / "report_rows.html").symlink_to(folder / "old" / "rows.jsonl")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    return folder


def test_the_page_may_ask_this_server_only_and_run_its_own_files_only() -> None:
    answer = client_of(None).get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_all_files_of_the_page_are_served_and_small() -> None:
    client = client_of(None)
    for file in PAGE.iterdir():
        path = "/" if file.suffix == ".html" else f"/page/{file.name}"
        answer = client.get(path)
        assert answer.content == file.read_bytes()
        assert answer.headers["content-security-policy"]
        assert len(file.read_text().splitlines()) < 260
    assert client.get("/page/index.html").status_code == 404
    assert client.get("/page/..%2fpage_routes.py").status_code == 404
    assert client.get("/page/none.js").json()["error"]["message"] == "no such file"


def test_nothing_inline_and_no_markup_from_text() -> None:
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert not re.search(r"https?://", html)
    for script in PAGE.glob("*.js"):
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in script.read_text(), (script.name, word)


def test_runs_are_listed_newest_first(results: Path) -> None:
    answer = client_of(results).get("/runs").json()
    assert answer["configured"] is True
    assert [run["name"] for run in answer["runs"]] == ["new", "night/steps/one", "old"]
    assert answer["runs"][0]["files"] == ["report.html", "summary.json"]
    assert answer["runs"][0]["modified"] == "2023-11-14T22:13:22+00:00"
    assert answer["runs"][2]["files"] == ["report.html"]  # neither the link out nor the rows


def test_a_folder_whose_name_is_no_text_is_left_out(results: Path) -> None:
    odd = os.fsencode(results) + b"/\xff\xfe"
    os.mkdir(odd)
    with open(odd + b"/report.html", "w") as file:
        file.write("<p>odd</p>")
    assert len(client_of(results).get("/runs").json()["runs"]) == 3


def test_without_a_results_folder_there_are_no_runs(tmp_path: Path) -> None:
    assert client_of(None).get("/runs").json() == {"configured": False, "runs": []}
    assert client_of(None).get("/runs/old/report.html").status_code == 404
    gone = client_of(tmp_path / "gone")
    assert gone.get("/runs").json() == {"configured": True, "runs": []}
    assert gone.get("/runs/report.html").status_code == 404


def test_a_report_is_shown_in_a_sandbox(results: Path) -> None:
    client = client_of(results)
    answer = client.get("/runs/night/steps/one/report.html")
    assert answer.text == "<p>night/steps/one/report.html</p>"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'")
    assert "allow-same-origin" not in policy and "connect-src" not in policy
    assert client.get("/runs/new/summary.json").headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "path",
    [
        "old/rows.jsonl",
        "old",
        "",
        "old/report_link.html",
        "old/report_rows.html",
        "linked/report.html",
        ".hidden/report.html",
        "..%2freport.html",
        "old/..%2f..%2freport.html",
        "%2e%2e/report.html",
        "old%2f%2freport.html",
        "%2fetc/report.html",
        "old/report.html%00.html",
        "old/report.html%00",
        "x" * 300 + "/report.html",
    ],
)
def test_nothing_else_is_served(results: Path, path: str) -> None:
    assert client_of(results).get(f"/runs/{path}").status_code == 404
