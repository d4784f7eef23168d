"""A study: rows made stage by stage, then what they say. Each stage depends on the rows of those
before it and on nothing else, so that a study that was killed goes on to the same end."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.analysis import Run, analyse, flat
from jobs.dispatch import Service
from jobs.experiment import Experiment, Sampler
from jobs.run_folder import DESIGN, SUMMARY, RunFolder
from jobs.table import table

CONTROL = "control"


@dataclass(frozen=True)
class Study:
    experiment: Experiment

    def extra(self) -> dict[str, Any]:
        """What the manifest says beside the experiment."""
        return {}


def run(
    study: Study, out: Path, service: Service, timeout_s: float, control: Service | None = None
) -> int:
    """Makes the rows that are not there yet, then summary, report and table; exit status 0 or 1.

    Raises Refused if the folder holds another run, Stopped if a stage cannot go on.
    """
    with RunFolder(out) as folder:
        sampler = Sampler(study.experiment, folder, service, timeout_s, control, study.extra())
        blocks = study.experiment.blocks
        sampler.make([block for block in blocks if block.arm.name != CONTROL])
        if control is not None:
            sampler.make([b for b in blocks if b.arm.name == CONTROL], by_control=True)
        cells = [[*cell, rows] for cell, rows in study.experiment.expected(blocks).items()]
        folder.write(DESIGN, {"cells": cells})
        return conclude(folder)


def conclude(folder: RunFolder) -> int:
    """Summary, report and table of the rows that are there; 1 where a row is not good."""
    run = Run.read(folder.path)
    findings, summary = analyse(run)
    folder.write(SUMMARY, {**summary, **flat(findings)})
    console = Console(width=None if sys.stdout.isatty() else 140)
    cells, clustered = list(run.expected), bool(run.config["samples"] > 1)
    console.print(table(summary, cells, run.scorers, clustered, str(folder.path)))
    if bad := summary["failed"] + summary["missing"]:
        print(f"{bad:,} row(s) failed; run again to retry them", file=sys.stderr)
    return 1 if bad else 0
