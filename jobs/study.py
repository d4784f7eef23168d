"""A study: rows made stage by stage, then what they say. Each stage depends on the rows of those
before it and on nothing else, so that a study that was killed goes on to the same end."""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs import confirm, report
from jobs.analysis import Run, analyse, flat
from jobs.attacks import attack_experiment, rare_phrases
from jobs.call import failures
from jobs.choose_alpha import PILOT_ALPHAS, PILOT_PROMPTS, choice_table, choose
from jobs.coherence import drifts
from jobs.copies import copied
from jobs.dispatch import Service
from jobs.errors import Refused, Stopped
from jobs.experiment import Arm, Block, Experiment, Sampler
from jobs.monitor_stage import Monitor
from jobs.recovery import recover
from jobs.rollouts import rollouts
from jobs.run_folder import CONFIRM, DESIGN, REPORT, SUMMARY, RunFolder
from jobs.scorers import Phrase
from jobs.sequential import Design, counts_of, next_round, replay
from jobs.summary import CONTROL, EMPTY, PILOT, UNTRIGGERED
from jobs.table import estimates_table, table

ALPHAS = "alphas.json"  # those that the pilot spoke for
MOST_FAILED = 0.2  # of the pilot's rows
CONFIRM_PROMPTS, CONFIRM_RANDOM = 200, 10
BEFORE = -1.0


@dataclass(frozen=True)
class Study:
    """An experiment and how its alphas and rows are found.

    `auto`: the alphas of the untriggered arm (and control) come from a pilot. `precision`: rows
    are made in rounds, `rows` of the untriggered arm in all. `confirm`: so many candidates for the
    trigger are put into clean prompts.
    """

    experiment: Experiment
    auto: bool = False
    precision: float | None = None
    rows: int | None = None
    confirm: int = 0

    def as_manifest(self) -> dict[str, Any]:
        """What the manifest says beside the experiment."""
        return {
            "study": {
                "auto": self.auto,
                "precision": self.precision,
                "rows": self.rows,
                "confirm": self.confirm,
            }
        }

    @property
    def phrases(self) -> dict[str, str]:
        """Scorer names and the phrases that are monitored, at alpha 0, by rows with densities."""
        if not self.experiment.sampling.get("grid"):
            return {}
        return {s.name: s.phrase for s in self.experiment.scorers if isinstance(s, Phrase)}


def run(
    study: Study,
    out: Path,
    service: Service,
    timeout_s: float,
    control: Service | None = None,
    copy_to: str | None = None,
) -> int:
    """Makes the rows that are not there yet, then summary, report and tables; exit status 0 or 1.

    Raises Refused if the folder holds another run, Stopped if a stage cannot go on, and what
    `copied` raises.
    """
    with RunFolder(out) as folder:
        monitor = Monitor(study.phrases)
        # Before the copy: another run's folder is refused, not copied.
        sampler = Sampler(
            study.experiment,
            folder,
            service,
            timeout_s,
            control,
            study.as_manifest(),
            monitor.prepare,
        )
        with copied(folder, copy_to):
            _make(study, sampler, monitor, timeout_s)
            return conclude(folder)


def _make(study: Study, sampler: Sampler, monitor: Monitor, timeout_s: float) -> None:
    """Stage by stage, until the folder has a design."""
    folder = sampler.folder
    blocks = _choose_alphas(sampler) if study.auto else []
    blocks += _sample(study, sampler)
    design = folder.read(DESIGN)
    if design is None or design["failed"]:  # not yet whole
        sampler.connect()  # nothing may be asked of another pair
        failed = monitor.run(sampler.experiment, folder.path, sampler.file, sampler.caller())
        if study.confirm and (bad := sampler.bad(blocks)):
            print(f"{bad:,} row(s) failed; candidates are confirmed once all are there")
        elif study.confirm:
            failed += _confirm(study, sampler, timeout_s)
        cells = [[*cell, rows] for cell, rows in sampler.experiment.expected(blocks).items()]
        folder.write(DESIGN, {"cells": cells, "failed": failed})


def _choose_alphas(sampler: Sampler) -> list[Block]:
    """Samples the pilot and gives the experiment the alphas that it speaks for."""
    experiment = sampler.experiment
    pilot = Arm(PILOT, PILOT_ALPHAS, min(PILOT_PROMPTS, experiment.prompts.count), samples=1)
    blocks = [Block(pilot, pilot.alphas, pilot.prompts)]
    sampler.make(blocks, grid=list(PILOT_ALPHAS))
    chosen = sampler.folder.read(ALPHAS)
    if chosen is None:
        if (bad := sampler.bad(blocks)) > MOST_FAILED * pilot.prompts * len(pilot.alphas):
            raise Stopped(f"{bad:,} rows of the pilot failed")
        ladder = drifts(sampler.file, experiment.sampling["temperature"], PILOT)
        choice = choose(ladder)
        Console(width=None if sys.stdout.isatty() else 140).print(choice_table(ladder, choice))
        # Kept: a row of the pilot that comes late must not change them any more.
        chosen = [BEFORE, *choice.alphas]
        sampler.folder.write(ALPHAS, chosen)
    alphas = tuple(map(float, chosen))
    arms = tuple(arm if arm.alphas else replace(arm, alphas=alphas) for arm in experiment.arms)
    grid = sorted({*alphas, *experiment.sampling["grid"]})
    sampling = {**experiment.sampling, "grid": grid}
    sampler.experiment = replace(experiment, arms=arms, sampling=sampling)
    return blocks


def _sample(study: Study, sampler: Sampler) -> list[Block]:
    """All arms; what was sampled in the end."""
    blocks = sampler.experiment.blocks
    if study.precision is not None:
        (arm,) = (block.arm for block in blocks if block.arm.name == UNTRIGGERED)
        rounds = _in_rounds(study, sampler, arm)
        blocks = rounds + [block for block in blocks if block.arm.name != UNTRIGGERED]
    sampler.make([block for block in blocks if block.arm.name != CONTROL])
    if sampler.control is not None:
        sampler.make([b for b in blocks if b.arm.name == CONTROL], by_control=True)
    return blocks


def _in_rounds(study: Study, sampler: Sampler, arm: Arm) -> list[Block]:
    """Rows from alpha 0 on whose interval is still too wide, until the budget is spent."""
    experiment = sampler.experiment
    alphas = tuple(alpha for alpha in arm.alphas if alpha >= 0)
    budget = study.rows or len(alphas) * experiment.prompts.count * experiment.samples
    assert study.precision is not None
    design = Design(
        alphas=alphas,
        rows=budget,
        samples=experiment.samples,
        prompts=experiment.prompts.count,
        precision=study.precision,
    )
    ids = [prompt.id for prompt in experiment.prompts]
    last = None
    while True:
        counts = counts_of(sampler.file, ids, design, arm.name)
        todo = next_round(counts, design)
        if todo is None or todo == last:  # done, or rows of this round have failed
            break
        last = todo
        # From the first prompt on: what is there already is not made again.
        blocks = [Block(arm, (a,), first + count) for a, (first, count) in todo.items()]
        sampler.make(blocks)
    found = replay(counts, design)
    for alpha, why in found.stopped.items():
        print(f"alpha {alpha:g}: {why}")
    # Below 0 nothing fires, so precision is no measure there: as many as the least of the others.
    least = min(found.used.values())
    return [Block(arm, (alpha,), found.used.get(alpha, least)) for alpha in arm.alphas]


def _confirm(study: Study, sampler: Sampler, timeout_s: float) -> int:
    """Puts the first candidates into clean prompts; 1 if a row of that failed."""
    experiment = sampler.experiment
    candidates = [c.text for c in recover(rollouts(sampler.file)).candidates]
    rare, _ = rare_phrases(candidates, experiment.prompts)
    if not rare:
        print("no candidate for the trigger to confirm")
        return 0
    recorded = ("logprobs", "grid")
    try:
        attack = attack_experiment(
            rare[: study.confirm],
            experiment.prompts,
            each=CONFIRM_PROMPTS,
            random=CONFIRM_RANDOM,
            samples=1,
            seed=experiment.seed,
            sampling={k: v for k, v in experiment.sampling.items() if k not in recorded},
            scorers=experiment.scorers,
        )
    except Refused as error:  # prompts too few or too short for it: everything else stands
        print(f"candidates are not confirmed: {error}")
        return 0
    return confirm.run(attack, sampler.folder.path / CONFIRM, sampler.service, timeout_s)


def conclude(folder: RunFolder) -> int:
    """Summary, report and tables of the rows that are there; 1 where something failed."""
    run = Run.read(folder.path)
    findings, summary = analyse(run)
    folder.write(SUMMARY, {**summary, **flat(findings)})
    report.write(findings, folder.path / REPORT)
    wide = 100 + 40 * len(run.scorers)
    console = Console(width=None if sys.stdout.isatty() else wide)
    clustered = any(c.rows > c.prompts for c in findings.counts if c.arm != EMPTY)
    title = str(folder.path)
    console.print(table(summary, list(run.expected), list(run.scorers), clustered, title))
    if findings.estimates:
        console.print(estimates_table(findings))
        console.print(findings.lead, markup=False, highlight=False)
    print(f"report: {folder.path / REPORT}")
    if bad := int(summary["failed"] + summary["missing"]):
        errors = Counter(row.error for row in run.rows if row.error is not None)
        print(*failures(errors, bad, "row"), sep="\n", file=sys.stderr)
    if failed := run.design.get("failed", 0):
        print(f"{failed:,} request(s) after the rows failed; run again", file=sys.stderr)
    return 1 if bad or failed else 0
