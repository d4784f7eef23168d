"""All figures, or some: a table and a line of JSON. Exit status 1 where one is not as it must be.

PYTHONPATH=tests python -m chaos [--long] [--only NAME ...]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
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
# Two cores that a service, its clients and whoever else share: the long form, on an idle machine,
# is judged by the 10 % that the figure is about.
STALLED_RATIO = {"short": 2.0, "long": 1.1}
KILLS = ("kills", "last_ones", "killed_for_s")

Found = dict[str, Any]


class Services:
    """Started when first asked for, ended by `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._stack = stack
        self._shipped: LocalService | None = None

    @property
    def shipped(self) -> LocalService:
        """Two replicas of the tiny pair, the canary's secrets in their environment."""
        if self._shipped is None:
            config, log = ROOT / "serve_config.yaml", self.folder / "serve.log"
            self._stack.enter_context(canary.secrets_in_the_environment())
            service = local_service(config, port=free_port(), log=log)
            self._shipped = self._stack.enter_context(service)
        return self._shipped


def figures(services: Services, long: bool) -> dict[str, Callable[[], Found]]:
    def of_overload() -> Found:
        with overload.small_service(services.folder) as small:
            return overload.run(small)

    def of_canary() -> Found:
        folder = services.folder / "canary"
        folder.mkdir()
        return canary.run(services.shipped, folder)

    found: dict[str, Callable[[], Found]] = {
        "oom": lambda: oom.run(stride=1 if long else 293),
        "resumes": lambda: kill_at_write.run(200 if long else 25, seed=4),
        "overload": of_overload,
        "same_text": lambda: same_text.run(services.shipped, 10_000 if long else 96),
        "stalled": lambda: stalled.run(services.shipped, 1000 if long else 100),
        "fuzz": lambda: fuzz.run(
            services.shipped, 50_000 if long else 2_000, 2_000 if long else 300
        ),
        "killer": lambda: killer.run(services.shipped, 10_000 if long else 1_500),
        "canary": of_canary,  # last: it reads the logs of all the others
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
    if "stalled" in found:
        ratio = found["stalled_p99_ratio"]
        slow = int(ratio > STALLED_RATIO["long" if long else "short"])
        about = f"p99 of the others x {ratio} ({note('p99_ms', 'requests_timed')})"
        line(f"others slowed by {found['stalled']} stalled bodies", slow, 1, about)
    if "overload_requests" in found:
        about = note("answered", "refused", "refused_ms", "refused_in_the_crowd_ms")
        n = found["overload_requests"]
        line("requests lost at 10 x the load", found["overload_lost"], n, about)
    if "rows" in found:
        n, about = found["rows"], note("passes", "served_by")
        line("rows whose text changed", found["rows_changed"], n, about)
    if "canary_found" in found:
        line("outputs with a secret", found["canary_found"], found["outputs"], note("secrets"))
    if "soak_processes" in found:
        about = note("soak_rows", "worst_growth")
        line("processes that grew", found["grew"], found["soak_processes"], about)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="hours instead of minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, found, failed = time.monotonic(), Found(), list[str]()
    with ExitStack() as stack:
        all_of_them = figures(Services(stack), args.long)
        if unknown := set(args.only or ()) - set(all_of_them):
            parser.error(f"no figure {sorted(unknown)[0]!r}; there are {', '.join(all_of_them)}")
        for name in args.only or all_of_them:
            began = time.monotonic()
            try:
                one = all_of_them[name]()
            except Exception as error:  # the others are still worth knowing
                failed.append(name)
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            for why in one.pop("why", []):
                print(f"{name}: {why}", file=sys.stderr)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
            found |= one
    table = lines(found, args.long)
    print(HEAD, *table, sep="\n")
    found["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps({name: found.get(name) for name in JSON_LINE}))
    return int(bool(failed) or any(line.found for line in table))


if __name__ == "__main__":
    sys.exit(main())
