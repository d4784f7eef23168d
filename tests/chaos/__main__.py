"""All figures, or some: a table and a line of JSON. Exit status 1 where one is not as it must be.

PYTHONPATH=tests python -m chaos [--long] [--only NAME ...]
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

# Before torch and ray are imported, as in conftest.py.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402

from deployments.local_service import LocalService, free_port, local_service  # noqa: E402

from . import canary, fuzz, kill_at_write, killer, oom, overload, same_text, soak, stalled  # noqa: E402
from .asked import ROOT  # noqa: E402
from .figures import HEAD, Line  # noqa: E402

JSON_LINE = (
    *("requests", "lost", "wrong", "kills", "oom_rows_lost", "resumes", "resumes_equal"),
    *("fuzz_cases", "fuzz_5xx", "stalled_p99_ratio", "overload_lost", "rows_changed"),
    *("canary_found", "seconds"),
)
# Told in the short form, judged in the long one, on an idle machine.
MAX_RATIO, MAX_MS = 1.1, 50
KILLS = ("kills", "last_ones", "killed_for_s")

Found = dict[str, Any]


class Services:
    """The shipped service and the small one, started when asked for; one at a time, ended by
    `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: dict[str, LocalService] = {}
        self._stack = ExitStack()

    @property
    def shipped(self) -> LocalService:
        """Two replicas of the tiny pair."""
        config, log = ROOT / "serve_config.yaml", self.folder / "serve.log"
        return self._only("shipped", lambda: local_service(config, port=free_port(), log=log))

    @property
    def small(self) -> LocalService:
        return self._only("small", lambda: overload.small_service(self.folder))

    def _only(self, name: str, make: Callable[[], AbstractContextManager[LocalService]]) -> Any:
        if name not in self._running:
            self.close()
            self._running[name] = self._stack.enter_context(make())
        return self._running[name]

    def close(self) -> None:
        self._running.clear()
        self._stack.close()


def figures(services: Services, long: bool) -> dict[str, Callable[[], Found]]:
    """In an order in which each service is started once."""

    def of_canary() -> Found:
        folder = services.folder / "canary"
        folder.mkdir()
        return canary.run(services.small, folder)

    found: dict[str, Callable[[], Found]] = {
        "oom": lambda: oom.run(stride=11 if long else 499),
        "resumes": lambda: kill_at_write.run(200 if long else 25, seed=4),
        "overload": lambda: overload.run(services.small),
        "canary": of_canary,
        "same_text": lambda: same_text.run(services.shipped, 10_000 if long else 96),
        "stalled": lambda: stalled.run(services.shipped, 1000 if long else 100),
        "fuzz": lambda: fuzz.run(
            services.shipped, 50_000 if long else 2_000, 2_000 if long else 300
        ),
        "killer": lambda: killer.run(services.shipped, 10_000 if long else 1_500),
    }
    if long:
        found["soak"] = lambda: soak.run(services.shipped, services.folder / "soak", 100_000)
    return found


def lines(found: Found, long: bool) -> list[Line]:
    """The table, of what there is."""

    def note(*names: str) -> str:
        said = [f"{name.replace('_', ' ')} {found[name]}" for name in names if name in found]
        return ", ".join(said)

    made = []

    def line(what: str, bad: int, n: int, about: str = "") -> None:
        made.append(Line(what, bad, n, about))

    if "requests" in found:
        both = found["lost"] + found["wrong"]
        line("requests lost or wrong under kills", both, found["requests"], note(*KILLS))
    if "oom_rows" in found:
        n, about = found["oom_rows"], note("oom_faults")
        line("rows lost to memory that ran out", found["oom_rows_lost"], n, about)
    if "resumes" in found:
        unequal = found["resumes"] - found["resumes_equal"]
        line("resumed jobs with other rows", unequal, found["resumes"])
    if "fuzz_cases" in found:
        line("5xx without a cause", found["fuzz_5xx"], found["fuzz_cases"], note("statuses"))
        about = ", ".join(found["never_accepted"])
        refused = len(found["never_accepted"])
        line("routes that accepted nothing of it", refused, found["routes"], about)
    if "stalled" in found:
        ratio, n = found["stalled_p99_ratio"], found["stalled"]
        about = f"p99 of the others x {ratio}, {note('p99_ms', 'requests_timed')}"
        line("stalled bodies that were dropped", n - found["still_open"], n, about)
        if long:
            line(f"others slowed by more than {MAX_RATIO}", ratio > MAX_RATIO, 1)
    if "overload_requests" in found:
        about = note("answered", "refused", "refused_ms", "refused_in_the_crowd_ms")
        line(
            "requests lost at 10 x the load",
            found["overload_lost"],
            found["overload_requests"],
            about,
        )
        if long:
            line(f"refusals above {MAX_MS} ms (median)", found["refused_ms"][0] > MAX_MS, 1)
    if "rows" in found:
        n, about = found["rows"], note("passes", "served_by", "unanswered")
        line("rows whose text changed", found["rows_changed"], n, about)
    if "canary_found" in found:
        line("outputs with a secret", found["canary_found"], found["outputs"], note("secrets"))
    if "soak_processes" in found:
        about = note("soak_rows", "soak_seconds", "bytes_per_row", "worst_growth", "analysis_mb")
        line("processes that grew", found["grew"], found["soak_processes"], about)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="hours instead of minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, found, failed = time.monotonic(), Found(), list[str]()
    with tempfile.TemporaryDirectory() as folder, closing(Services(Path(folder))) as services:
        all_of_them = figures(services, args.long)
        if unknown := set(args.only or ()) - set(all_of_them):
            parser.error(f"no figure {sorted(unknown)[0]!r}; there are {', '.join(all_of_them)}")
        for name in args.only or all_of_them:
            began = time.monotonic()
            try:
                one = all_of_them[name]()
            except Exception as error:  # the others are still worth knowing
                failed.append(f"no figure of {name}: {type(error).__name__}: {error}")
                print(failed[-1], file=sys.stderr)
                continue
            for why in one.pop("why", []):
                print(f"{name}: {why}", file=sys.stderr)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
            found |= one
    table = lines(found, args.long)
    print(HEAD, *table, *failed, sep="\n")  # again: what was said first is far above
    found["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps({name: found.get(name) for name in JSON_LINE}))
    return int(bool(failed) or any(line.found for line in table))


if __name__ == "__main__":
    # Or a service that was started would go on, and keep others from submitting jobs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
