"""Full garbage collections in the processes that every request passes, counted in a fresh one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# As a process of Serve's has it: what was there before is frozen. Then come the objects of 1,000
# requests that wait, and stay.
CODE = """
import gc
from deployments import collector, proxy_guard
gc.collect(); gc.freeze(); gc.set_threshold(700, 10, 10)
{made_rare}
full = []
gc.callbacks.append(lambda phase, info: full.append(1) if info["generation"] == 2 else None)
kept = [[] for _ in range(280_000)]
print(len(full) // 2)
"""


def full_collections(made_rare: str) -> int:
    code = CODE.format(made_rare=made_rare)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    "made_rare", ["collector.make_full_collections_rare()", "proxy_guard.middlewares()"]
)
def test_a_thousand_that_wait_are_not_gone_through(made_rare: str) -> None:
    assert full_collections("") >= 3
    assert full_collections(made_rare) == 0
