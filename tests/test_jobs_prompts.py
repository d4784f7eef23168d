"""Prompt files, good and bad."""

import hashlib
import tracemalloc

import pytest

from jobs import prompts
from jobs.errors import Refused
from jobs.prompts import Prompt, read_prompts


@pytest.fixture
def make(tmp_path):
    def make(content, name="p.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def test_text_lines_keep_their_numbers(make):
    path = make(b"\xef\xbb\xbffirst\r\n\r\n   \n third \nna\xc3\xafve \xe2\x80\xa8 same line")
    file = read_prompts(path)
    assert list(file) == [
        Prompt("1", "first"),
        Prompt("4", " third "),
        Prompt("5", "naïve \u2028 same line"),
    ]
    assert file.count == 3
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(file) == list(file)


def test_jsonl_ids_default_to_the_line(make):
    path = make(
        '{"id": "a", "prompt": "x"}\n\n{"prompt": "y\\n z"}\n{"id": 7, "prompt": "w"}', "p.jsonl"
    )
    assert list(read_prompts(path)) == [Prompt("a", "x"), Prompt("3", "y\n z"), Prompt("7", "w")]


def test_jsonl_from_another_system_is_the_same(make):
    """With a byte order mark, CRLF and blank lines; numbers and ids are the same."""
    plain = '{"prompt": "x"}\n\n \n{"id": "a", "prompt": "y\\r\\n"}\n'
    file = read_prompts(make(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(), "p.jsonl"))
    assert list(file) == list(read_prompts(make(plain, "q.jsonl")))
    assert list(file) == [Prompt("1", "x"), Prompt("a", "y\r\n")]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_large_file_is_streamed(make, name):
    """Memory is the hashes of the ids, whatever the prompts' length."""
    line = {"p.txt": "x" * 2000, "p.jsonl": '{"prompt": "%s"}' % ("x" * 2000)}[name]
    path = make((line + "\n") * 10_000, name)
    tracemalloc.start()
    try:
        file = read_prompts(path)
        assert sum(1 for _ in file) == file.count == 10_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 10


def test_limit_takes_the_first(make):
    file = read_prompts(make("a\n\nb\nc\n"), limit=2)
    assert [p.text for p in file] == ["a", "b"] and file.count == 2
    assert read_prompts(make("a\nb\n"), limit=9).count == 2


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "not an object"),
        ('{"prompt": 3}', "prompt must be"),
        ('{"prompt": " "}', "prompt must be"),
        ('{"id": "x"}', "prompt must be"),
        ('{"id": true, "prompt": "x"}', "id must be"),
        ('{"id": "", "prompt": "x"}', "id must be"),
        ('{"id": null, "prompt": "x"}', "id must be"),
        ('{"prompt": "x", "label": 1}', "unknown key 'label'"),
        ('{"prompt": "\\ud800"}', "a lone surrogate"),
    ],
)
def test_a_bad_line_is_named(make, line, why):
    path = make('{"prompt": "fine"}\n\n' + line + '\n{"prompt": "fine"}\n', "p.jsonl")
    with pytest.raises(Refused, match=rf"1 bad line.*\n  line 3: {why}"):
        read_prompts(path)


def test_every_bad_line_is_named_up_to_a_bound(make):
    path = make("\n".join(["{"] * 30), "p.jsonl")
    with pytest.raises(Refused, match=r"30 bad line[\s\S]*line 20: [\s\S]*and 10 more"):
        read_prompts(path)


def test_not_utf8(make):
    with pytest.raises(Refused, match="line 2: not UTF-8 at byte 1"):
        read_prompts(make(b"fine\na\xff\n"))


def test_a_line_without_end_is_bounded(make, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_LINE_BYTES", 10)
    with pytest.raises(Refused, match=r"1 bad line[\s\S]*line 2: longer than 10 bytes"):
        read_prompts(make("short\n" + "x" * 95 + "\nshort\n"))


def test_an_id_twice_is_named(make):
    path = make(
        '{"id": "2", "prompt": "x"}\n{"prompt": "y"}\n{"id": "2", "prompt": "z"}\n', "p.jsonl"
    )
    with pytest.raises(Refused, match=r"2 bad line[\s\S]*line 2: id '2' again\n  line 3: id '2'"):
        read_prompts(path)


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_nothing_in_it(make, content):
    with pytest.raises(Refused, match="no prompt in it"):
        read_prompts(make(content))


def test_no_file_and_other_suffixes(make, tmp_path):
    with pytest.raises(Refused, match="No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(Refused, match=r"\.txt or \.jsonl"):
        read_prompts(make("x", "p.csv"))
