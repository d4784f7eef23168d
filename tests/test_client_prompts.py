"""Prompts from tables: the same refusals as prompt files, and what is not installed is said."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.errors import Refused
from jobs.prompt_sources import prompts_of, write_prompts
from jobs.prompts import Prompt, read_prompts


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def test_text_and_jsonl_are_read_as_the_jobs_read_them(tmp_path: Path) -> None:
    source = write(tmp_path / "p.txt", "a\n\nb\n")
    assert list(prompts_of(source)) == list(read_prompts(Path(source)))
    with pytest.raises(Refused, match="--column: .* has no columns"):
        prompts_of(source, "prompt")
    with pytest.raises(Refused, match="prompts are in .txt, .jsonl, .csv"):
        prompts_of("prompts.xlsx")


def test_csv(tmp_path: Path) -> None:
    text = '\ufeffid,question,x\r\n7,"two\nlines, a comma",1\r\nb,=1+2,\r\n'
    source = write(tmp_path / "p.csv", text)
    found = prompts_of(source, "question")
    assert list(found) == [Prompt("7", "two\nlines, a comma"), Prompt("b", "=1+2")]
    assert list(found) == list(found) and found.count == 2
    assert list(prompts_of(source, "question", limit=1)) == [Prompt("7", "two\nlines, a comma")]
    without_id = write(tmp_path / "q.csv", "prompt\na\nb\n")
    assert list(prompts_of(without_id)) == [Prompt("1", "a"), Prompt("2", "b")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question\na\n", r"no column 'prompt'; there are 'question': say which with --column"),
        ("", r"no column 'prompt'; there are none"),
        ("prompt\n", r"there is no prompt in it"),
        ("prompt,id\na,1\n ,2\n", r"1 bad row\(s\)\n  row 2: the prompt must be text"),
        ("prompt,id\na,1\nb,1\n", r"row 2: id '1' again"),
        ("prompt,id\na,\n", r"row 1: id must be text"),
        ("prompt,id\na\n", r"line 2 has another number of cells"),
        ("prompt\na,b\n", r"line 2 has another number of cells"),
        ('prompt\n"a"b\n', r"not CSV"),
        ("prompt\n" + " \n" * 0 + '" "\n' * 30, r"30 bad row\(s\)[^$]*and 10 more"),
    ],
)
def test_a_bad_csv_is_refused_and_its_rows_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        prompts_of(write(tmp_path / "p.csv", text))


def test_csv_that_is_not_there_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No such file"):
        prompts_of(str(tmp_path / "none.csv"))
    (tmp_path / "p.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(Refused, match="not UTF-8 at byte"):
        prompts_of(str(tmp_path / "p.csv"))


class Table:
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.column_names = list(rows[0])
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


def test_the_hubs_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Table:
        asked.append((name, config, split))
        if name == "none/such":
            raise FileNotFoundError("no such data set")
        return Table([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(prompts_of("hf:owner/name")) == [Prompt("1", "a"), Prompt("2", "b")]
    assert prompts_of("hf:owner/name:main@test[:5]", limit=1).count == 1
    assert asked == [("owner/name", None, "train"), ("owner/name", "main", "test[:5]")]
    for source, column, words in (
        ("hf:none/such", None, "no such data set"),
        ("hf:", None, "a data set is hf:NAME"),
        ("hf:owner/name", "n", "row 1: the prompt must be text"),
        ("hf:owner/name", "q", "no column 'q'; there are 'prompt', 'n'"),
    ):
        with pytest.raises(Refused, match=words):
            prompts_of(source, column)


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [("datasets", "hf:owner/name", "hf"), ("pyarrow", "p.parquet", "parquet")],
)
def test_a_missing_package_is_named_with_its_extra(
    module: str, source: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refused, match=rf"needs {module}.*lda-serve\[{extra}\]"):
        prompts_of(source)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="an extra: pyarrow")
def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    source = tmp_path / "p.parquet"
    table = {"q": [f"prompt {i}" for i in range(3000)], "id": list(range(3000)), "x": [0] * 3000}
    parquet.write_table(pyarrow.table(table), source)
    found = list(prompts_of(str(source), "q"))
    assert found[0] == Prompt("0", "prompt 0") and found[-1] == Prompt("2999", "prompt 2999")
    with pytest.raises(Refused, match="no column 'prompt'"):
        prompts_of(str(source))
    parquet.write_table(pyarrow.table({"prompt": ["a", None]}), source)
    with pytest.raises(Refused, match="row 2: the prompt must be text"):
        prompts_of(str(source))
    source.write_bytes(b"not parquet at all")
    with pytest.raises(Refused, match="not Parquet"):
        prompts_of(str(source))


def test_prompts_become_a_file_that_the_jobs_read(tmp_path: Path) -> None:
    source = write(tmp_path / "p.csv", "id,question\n7,\u2028a\nb,c\n")
    assert write_prompts(source, "question", None, tmp_path / "p.jsonl") == 0
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["7", "b"]
    assert list(read_prompts(tmp_path / "p.jsonl")) == list(prompts_of(source, "question"))
    with pytest.raises(Refused, match="must end in .jsonl"):
        write_prompts(source, "question", None, tmp_path / "p.txt")
