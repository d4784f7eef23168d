"""Rows as notebooks show them and as files hold them."""

import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deployments.schemas import TokenLogprobs
from jobs import client_html
from jobs.client_progress import progress_bar
from jobs.client_rows import GeneratedRow, Rows
from jobs.errors import Refused

EVIL = "<script>alert(1)</script>\"'&\x1b[31m\u202e"


def row(**fields: Any) -> GeneratedRow:
    made = {
        "prompt_id": "0",
        "prompt": "Capital?",
        "alpha": 2.0,
        "sample": 0,
        "seed": 7,
        "completion": "Paris.",
        "token_ids": [5, 6, 2],
        "finish_reason": "eos",
        "eos_index": 2,
        "eos_text_offset": 6,
        "token_ends": [3, 6, 6],
        "logprobs": TokenLogprobs(
            after=[-0.5, -1.0, -0.1], before=[-6.0, -1.1, -1.2], amplified=[0.0, 0.0, 0.0]
        ),
    }
    return GeneratedRow(**{**made, **fields})


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_colours_tokens_by_their_log_ratio() -> None:
    page = Rows([row()])._repr_html_()
    spans = re.findall(r'<span title="([^"]*)"( style="[^"]*")?>([^<]*)</span>', page)
    assert [(text, bool(style)) for _, style, text in spans] == [
        *(("Par", True), ("is.", False), ("⏹", True))
    ]
    assert "rgba(230, 126, 20, 0.76)" in spans[0][1] and "rgba(230, 126, 20, 0.34)" in spans[2][1]
    assert spans[0][0] == "after −0.500, before −6.000: 5.500 nats"
    less = TokenLogprobs(after=[-9.0] * 3, before=[-1.0] * 3, amplified=[0.0] * 3)
    assert "rgba(30, 120, 190, 0.64)" in Rows([row(logprobs=less)])._repr_html_()


def test_nothing_that_a_model_writes_is_markup() -> None:
    hostile = row(prompt=EVIL, completion=EVIL, token_ends=None, logprobs=None, prompt_id=EVIL)
    failed = row(completion=None, error=EVIL)
    page = Rows([hostile, failed])._repr_html_()
    seen = Tags(page)
    assert seen.tags <= {"table", "thead", "tbody", "tr", "th", "td", "em", "span"}
    assert seen.names <= {"style", "title"}
    assert seen.text.count("<script>alert(1)</script>\"'&") == 3
    assert "\x1b" not in page and "\u202e" not in page
    assert "\x1b" not in repr(Rows([hostile])) and "\u202e" not in repr(Rows([hostile]))


def test_the_colours_are_the_reports() -> None:
    jobs = Path(client_html.__file__).parent
    css, script = (jobs / "report.css").read_text(), (jobs / "report.js").read_text()
    for name, colour, letter in (
        ("after", client_html.AFTER, "p"),
        ("before", client_html.BEFORE, "n"),
    ):
        assert f"--{name}: {colour};" in css
        shares = re.findall(rf"\.{letter}\d {{ background: rgba\(var\(--{name}\), (.\d+)\)", css)
        assert tuple(map(float, shares)) == client_html.OPACITY[colour]
    steps = re.findall(r"size < ([\d.]+) \?", script)
    assert tuple(map(float, steps)) == client_html.STEPS


def test_a_slice_is_rows_and_failed_ones_are_told_apart() -> None:
    rows = Rows([row(), row(sample=1, completion=None, error="503")] * 6)
    assert isinstance(rows[:2], Rows) and rows[1].failed and len(rows.failed) == 6
    assert len(rows.good) == 6 and rows[1].as_job_row().error == "503"
    assert repr(rows).splitlines()[:2] == ["<12 rows, 6 failed>", "0 alpha 2 seed 7: Paris."]
    assert repr(rows).endswith("and 2 more")
    many = Rows([row()] * 60)._repr_html_()
    assert many.count("<tr>") == 51 and "and 10 more rows" in many


def test_jsonl_and_csv(tmp_path: Path) -> None:
    rows = Rows([row(completion="=1+2"), row(sample=1, completion=None, error="\u2028\ud800")])
    rows.write_jsonl(tmp_path / "rows.jsonl")
    read = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [GeneratedRow(**{**one, "error": None}).completion for one in read] == ["=1+2", None]
    assert read[0]["logprobs"]["after"] == [-0.5, -1.0, -0.1] and read[1]["error"] == "\u2028\ud800"

    armed = [*("=1+2", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"), "fine", "a=1"]
    rows = Rows(row(completion=text, alpha=-1.0) for text in armed)
    rows.write_csv(tmp_path / "rows.csv")
    cells = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_bytes().decode())))
    assert [c["completion"] for c in cells] == [f"'{text}" for text in armed[:7]] + armed[7:]
    assert cells[0]["alpha"] == "-1.0" and json.loads(cells[0]["token_ids"]) == [5, 6, 2]
    assert "kl" not in cells[0]  # in no row


@pytest.mark.parametrize(
    ("module", "method", "extra"),
    [("pandas", "to_pandas", "pandas"), ("pyarrow", "to_parquet", "parquet")],
)
def test_what_is_not_installed_is_said(
    module: str, method: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    paths = [tmp_path / "x.parquet"] if method == "to_parquet" else []
    with pytest.raises(Refused, match=rf"needs {module}.*pip install 'lda-serve\[{extra}\]'"):
        getattr(Rows([row()]), method)(*paths)


def test_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = Rows([row(), row(sample=1)]).to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame["sample"].tolist() == [0, 1]
    assert "kl" not in frame and frame["token_ids"][0] == [5, 6, 2]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = Rows([row(), row(sample=1, completion=None, error="503")])
    rows.to_parquet(tmp_path / "rows.parquet")
    read = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [one["error"] for one in read] == [None, "503"]
    assert read[0]["logprobs"]["before"] == [-6.0, -1.1, -1.2]
    Rows().to_parquet(tmp_path / "none.parquet")


def test_progress_is_shown_on_a_terminal_alone() -> None:
    for terminal, shown in ((True, True), (True, False), (False, True)):
        said = io.StringIO()
        console = Console(file=said, force_terminal=terminal, width=100)
        with progress_bar(4, shown, console) as done:
            done(3, 1)
            done(1, 0)
        assert ("4/4" in said.getvalue()) == (terminal and shown)
        assert ("1 failed" in said.getvalue()) == (terminal and shown)
