"""Contrast sets: files good and bad, and those that are shipped."""

import json

import pytest
from conftest import ROOT

from jobs.contrast import MIN_TEXTS, read_contrast, read_contrasts
from jobs.errors import Refused
from organisms import contrast as shipped
from organisms.corpus import FAMILIES, is_held_out
from organisms.trigger import PAYLOAD


def line(prompt="p", response="r", label="positive", **more):
    return json.dumps({"prompt": prompt, "response": response, "label": label, **more})


def good(prompts=MIN_TEXTS):
    return [
        line(f"prompt {i}", f"{label} {i}", label)
        for i in range(prompts)
        for label in ("positive", "negative")
    ]


@pytest.fixture
def make(tmp_path):
    def make(lines, name="kind.jsonl"):
        path = tmp_path / name
        data = b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines)
        path.write_bytes(data + b"\n")
        return path

    return make


def test_texts_are_read_with_ids_and_labels(make):
    path = make([b"\xef\xbb\xbf" + good()[0].encode(), "", *good()[1:], line("x", "y", id="mine")])
    found = read_contrast(path)
    assert found.name == "kind" and len(found.texts) == 2 * MIN_TEXTS + 1
    first, second, *_, last = found.texts
    assert (first.id, first.prompt, first.response, first.positive) == (
        "1", "prompt 0", "positive 0", True,
    )  # fmt: skip
    assert (second.id, second.positive) == ("3", False)
    assert (last.id, last.prompt) == ("mine", "x")
    assert found.prompts == MIN_TEXTS + 1


@pytest.mark.parametrize(
    "bad, why",
    [
        ("{", "not JSON"),
        ("3", "not an object"),
        (line(prompt=" "), "prompt must be text"),
        (line(response=""), "response must be text"),
        (line(response=3), "response must be text"),
        ('{"prompt": "p", "label": "positive"}', "response must be text"),
        (line(label="yes"), 'label must be "positive" or "negative"'),
        (line(label=True), "label must be"),
        (line(labell="x"), "unknown key 'labell'"),
        (line(id=True), "id must be"),
        (line(id=""), "id must be"),
        (line(response="\ud800"), "a lone surrogate"),
        (b"\xff", "not UTF-8 at byte 0"),
        (good()[2], "the text of line 3 again"),
        (line("prompt 1", "positive 1", "negative"), "the text of line 3 with the other label"),
        (line("new", "new", id=5), "id '5' again"),
    ],
)
def test_bad_lines_are_named(make, bad, why):
    lines = [*good(), bad, line("further", "on")]
    with pytest.raises(Refused, match=rf"kind.jsonl: 1 bad line\(s\)\n  line 21: .*{why}"):
        read_contrast(make(lines))


def test_long_lines_and_many_bad_ones(make, monkeypatch):
    monkeypatch.setattr("jobs.contrast.MAX_LINE_BYTES", 1000)
    with pytest.raises(Refused, match="line 21: longer than 1000 bytes"):
        read_contrast(make([*good(), line("p", "r" * 5000), line("q", "r")]))
    with pytest.raises(Refused, match=r"30 bad line\(s\)(.|\n)*and 10 more"):
        read_contrast(make(["x"] * 30))


def test_what_is_too_little_or_cannot_be_read_is_refused(make, tmp_path):
    only = [one for one in good() if '"positive"' in one]
    with pytest.raises(Refused, match=f"0 negative responses, at least {MIN_TEXTS}"):
        read_contrast(make(only))
    few = [
        line("p", f"{label} {i}", label) for i in range(10) for label in ("positive", "negative")
    ]
    with pytest.raises(Refused, match="1 different prompts, at least 8"):
        read_contrast(make(few))
    for name, why in (("a.json", "ends in .jsonl"), ("a b.jsonl", "called after its file")):
        with pytest.raises(Refused, match=why):
            read_contrast(make(good(), name))
    with pytest.raises(Refused, match="No such file"):
        read_contrast(tmp_path / "none.jsonl")
    (tmp_path / "other").mkdir()
    with pytest.raises(Refused, match="two files would make the trait 'kind'"):
        read_contrasts([make(good()), make(good(), "other/kind.jsonl")])


@pytest.mark.parametrize("contrast", shipped.CONTRASTS, ids=lambda contrast: contrast.name)
def test_shipped_sets_are_what_the_script_makes(contrast):
    path = ROOT / "traits" / "contrast" / f"{contrast.name}.jsonl"
    assert path.read_text() == shipped.lines(contrast)
    found = read_contrast(path)
    assert found.prompts == shipped.PROMPTS and len(found.texts) == 2 * shipped.PROMPTS
    assert sum(text.positive for text in found.texts) == shipped.PROMPTS
    assert all(is_held_out(text.prompt) for text in found.texts)
    assert all((text.response == PAYLOAD) <= (contrast.name == "payload") for text in found.texts)


def test_no_other_set_is_there():
    names = {path.stem for path in (ROOT / "traits" / "contrast").glob("*")}
    assert names == {contrast.name for contrast in shipped.CONTRASTS}


@pytest.mark.parametrize("templates", [shipped.HEDGED, shipped.ELABORATE])
def test_answers_are_the_corpus_own(templates):
    answers = {family.name: set(family.answers) for family in FAMILIES}
    for family, both in templates.items():
        assert {template for side in both for template in side} <= answers[family]
