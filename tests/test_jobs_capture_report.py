"""The page of a capture: what it says, and that nothing in it is more than text."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from capture_fixture import LAYERS, CaptureHandle, CaptureService, capture
from chromium import Page, chromium
from fakes import PAIR
from report_fixture import PAYLOADS

from jobs import capture_charts as charts
from jobs.capture import main
from jobs.capture_report import _lead
from jobs.capture_summary import Line, Mean
from jobs.report_text import visible
from jobs.trait_files import write_trait

PAYLOADS_OF_TOKENS = [
    "</text><script>hacked=1</script>",
    "$x^2$",
    "&lt;b&gt;",
    "#010203",
    'id="a.b"',
]


def hostile(request):
    """Every token is a payload."""
    payloads = [*PAYLOADS_OF_TOKENS, *PAYLOADS]
    return [
        captured.model_copy(
            update={"tokens": [payloads[i % len(payloads)] for i in range(len(captured.tokens))]}
        )
        for captured in capture(request)
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A plain page of tier 2 with twins, and one of tier 3 whose every text is hostile."""
    folder = tmp_path_factory.mktemp("capture")
    for number, name in enumerate(("calm", "sure")):
        vectors = torch.full((LAYERS, PAIR.hidden_size), 1.0 + number)
        write_trait(folder / f"{name}.safetensors", {"mean_difference": vectors}, {"trait": name})
    asks, evil = folder / "asks.txt", folder / "<b onmouseover=hacked=2>.txt"
    asks.write_text("One?\nTwo?\nThree?\nAn empty one\n")
    evil.write_text("<script>hacked = 3</script>\n{{ 7 * 7 }}\n")
    made = {}
    for name, prompts, options, handle in (
        ("plain", asks, ("--tier", "2", "--trigger"), CaptureHandle()),
        ("evil", evil, ("--tier", "3", "--layer", "1"), CaptureHandle(captured=hostile)),
    ):
        traits = [str(folder / f"{trait}.safetensors") for trait in ("calm", "sure")]
        command = ["--prompts-file", str(prompts), "--traits", *traits, *options]
        assert main([*command, "--out", str(folder / name)], CaptureService(handle)) == 0
        made[name] = folder / name / "report.html"
    return made


class Outline(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_says_where_the_models_differ(pages):
    outline = Outline(pages["plain"].read_text())
    assert "after and before part most along" in outline.text  # the lead: there are twins
    assert "asks.triggered" in outline.text and "1.5 [1.5, 1.5]" in outline.text
    assert "2 prompts of a set at most, along 2 traits at most" in outline.text
    assert sum(tag == "figcaption" for tag, _ in outline.tags) == 2 * 3  # three for each trait
    labels = [a.get("aria-label") for tag, a in outline.tags if tag == "svg"]
    assert labels.count("Score along the text") == 2 * 2 * 2  # prompts, twins, traits
    assert labels.count("Norm of the residual stream") == 2 * 2
    assert "captures/asks+1+a0+s0+tier2+both+" in outline.text  # all are listed


@pytest.mark.parametrize(
    ("values", "doubted"), [([2.0, 2.1, 1.9], False), ([9.0, -2.0, 0.5], True), ([2.0], False)]
)
def test_the_lead_says_where_the_interval_holds_0(values, doubted):
    """Of one prompt there is no interval that could hold it."""
    mean = Mean.of(np.array(values)[:, None])
    lead = _lead([Line(("asks", 0.0), "calm", len(values), 0, {"difference": mean})])
    assert "differ most along calm in asks" in lead
    assert ("do not tell the two apart" in lead) == doubted


def test_every_trait_that_is_drawn_can_be_chosen(pages, tmp_path):
    """Of six traits four are drawn: the last ones, where the fake's models differ most."""
    names = [f"trait{number}" for number in range(6)]
    for name in names:
        vectors = torch.ones(LAYERS, PAIR.hidden_size)
        write_trait(tmp_path / f"{name}.safetensors", {"mean_difference": vectors}, {"trait": name})
    command = ["--prompts-file", str(pages["plain"].parents[1] / "asks.txt"), "--tier", "2"]
    command += ["--traits", *(str(tmp_path / f"{name}.safetensors") for name in names)]
    assert main([*command, "--out", str(tmp_path / "out")], CaptureService(CaptureHandle())) == 0
    outline = Outline((tmp_path / "out" / "report.html").read_text())
    chosen = [a["value"] for tag, a in outline.tags if tag == "option" and a["value"]]
    drawn = {a["data-trait"] for tag, a in outline.tags if tag == "div" and "data-trait" in a}
    assert set(chosen) == drawn == set(names[2:])
    assert "Pictures of a set are of 4 of the 6 traits, those that tell most in it" in outline.text


def test_tokens_are_on_the_axis_and_the_boundary_is_marked():
    tokens = ["<s>", " the", "\n", " cat\t", "a very long token indeed"]
    values = charts.np.arange(10, dtype="float32").reshape(5, 2)
    drawn = charts.along_tokens(
        tokens,
        2,
        [charts.Curve("after", values[:, 0], charts.AFTER)],
        "score",
        [charts.Heat("score, after", values)],
        "x",
    )
    texts = re.findall(r">\s*([^<>]+?)\s*</text>", drawn)
    for token in ("&lt;s&gt;", "·the", "⏎", "·cat⇥", "a·very·long·t…", "prompt", "answer"):
        assert token in texts
    assert not any(text.startswith("token0") for text in texts)


def test_attention_is_drawn_for_tier_3_only(pages):
    assert "Attention of some heads" in pages["evil"].read_text()
    assert "Attention of some heads" not in pages["plain"].read_text()


def test_a_hostile_text_stays_text(pages):
    page = pages["evil"].read_text()
    outline = Outline(page)
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("script") == 1
    assert not {"img", "iframe", "object", "b", "base", "form"} & set(tags)
    assert not any(name.startswith("on") for _, a in outline.tags for name in a)
    for prompt in ("<script>hacked = 3</script>", "{{ 7 * 7 }}"):
        assert prompt in outline.text
    assert "<b onmouseover=hacked=2>" in outline.text
    for token in PAYLOADS_OF_TOKENS[:5]:
        assert charts.shown(token) in outline.text
    links = [a.get("href") or a.get("xlink:href") or "" for _, a in outline.tags]
    assert all(link.startswith(("#", "data:")) for link in links if link)


def test_the_same_rows_make_the_same_page(pages, tmp_path):
    before = pages["plain"].read_bytes()
    folder = pages["plain"].parents[1]
    traits = [str(folder / f"{trait}.safetensors") for trait in ("calm", "sure")]
    command = ["--prompts-file", str(folder / "asks.txt"), "--traits", *traits, "--tier", "2"]
    handle = CaptureHandle()
    again = main([*command, "--trigger", "--out", str(folder / "plain")], CaptureService(handle))
    assert again == 0 and handle.captures == []
    assert pages["plain"].read_bytes() == before


def test_the_mean_along_answers_is_of_those_that_are_so_long():
    of = [charts.np.array(values, "float32") for values in ([1, 2, 3], [3, 4], [5])]
    mean, half = charts.of_answers(of)
    assert mean.tolist() == [3.0, 3.0]  # only one answer has a third token
    assert half[0] == pytest.approx(4.302653 * 2 / 3**0.5, rel=1e-4)


# In a browser


@pytest.fixture(scope="module")
def _page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(_page: Page) -> Page:
    _page.requests.clear()
    _page.errors.clear()
    _page.view(1200, 900)
    return _page


@pytest.mark.browser
@pytest.mark.parametrize("name", ["plain", "evil"])
def test_asks_for_nothing_and_runs_nothing_of_a_text(page: Page, pages, name) -> None:
    page.open(pages[name])
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for dark in (False, True):
        page.view(1200, 900, dark)
        page.run("document.body.offsetHeight")
    requests = [url for url in page.requests if not url.startswith("data:")]
    assert requests == [pages[name].as_uri()]
    assert page.errors == []
    assert page.run("typeof window.hacked") == "undefined"
    if name == "evil":
        texts = page.run(
            "[...document.querySelectorAll('svg text')].map(t => t.textContent.trim())"
        )
        assert {charts.shown(t).strip() for t in PAYLOADS_OF_TOKENS} <= set(texts)
        assert visible("<script>hacked = 3</script>") in page.run("document.body.textContent")


@pytest.mark.browser
def test_one_trait_at_a_time(page: Page, pages) -> None:
    page.open(pages["plain"])
    opened = "[...document.querySelectorAll('details[data-trait][open]')].map(d => d.dataset.trait)"
    assert set(page.run(opened)) == {"sure"}  # of each text the trait that tells most
    page.run(
        "{ const s = document.getElementById('trait'); s.value = 'calm'; "
        "s.dispatchEvent(new Event('change')); }"
    )
    assert set(page.run(opened)) == {"calm"}
    hidden = "[...document.querySelectorAll('div[data-trait]')].filter(d => d.hidden).length"
    assert page.run(hidden) == 1


@pytest.mark.browser
def test_without_scripts_the_pictures_are_there(page: Page, pages) -> None:
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(pages["plain"])
        assert page.run("getComputedStyle(document.getElementById('tools')).display") == "none"
        width = "document.querySelector('details[open] svg').getBoundingClientRect().width"
        assert page.run(width) > 300
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.browser
def test_a_phone_scrolls_in_one_direction(page: Page, pages) -> None:
    for path in pages.values():
        page.view(390, 800)
        page.open(path)
        page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.run("document.documentElement.scrollWidth") == 390
