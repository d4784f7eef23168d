"""An experiment is samples, parameters and scorers; running it makes rows, then counts them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from jobs.call import Generation, Item, seed_of
from jobs.dispatch import Service, answered
from jobs.progress import Progress
from jobs.prompts import Prompt, PromptFile
from jobs.rows import Cell, Key, RowFile, RowWriter
from jobs.run_folder import MANIFEST, SUMMARY, RunFolder, manifest
from jobs.scorers import Scorer, describe
from jobs.summary import summarise
from jobs.table import table
from organisms.trigger import insert_trigger

SAMPLES_PER_REQUEST = 32  # more are split, so that they spread over replicas


@dataclass(frozen=True)
class Arm:
    """The first `prompts` prompts at each alpha, with the trigger put in where there is one."""

    name: str
    alphas: tuple[float, ...]
    prompts: int
    trigger: str | None = None

    def text(self, prompt: Prompt, seed: int) -> str:
        if self.trigger is None:
            return prompt.text
        return insert_trigger(prompt.text, self.trigger, Random(seed_of(seed, prompt.id)))


@dataclass(frozen=True)
class Experiment:
    """Samples, parameters and scorers: all that decides the rows."""

    prompts: PromptFile
    arms: tuple[Arm, ...]
    samples: int
    seed: int
    sampling: dict[str, Any]
    scorers: tuple[Scorer, ...]

    @property
    def expected(self) -> dict[Cell, int]:
        """Rows of each arm and alpha, in the order of the table."""
        return {(a.name, x): a.prompts * self.samples for a in self.arms for x in a.alphas}

    def items(self, finished: Callable[[Key], bool]) -> Iterator[Item]:
        """What is left to do, made as it is asked for; all of one prompt, then the next."""
        for number, prompt in enumerate(self.prompts):
            for arm in (a for a in self.arms if number < a.prompts):
                text = arm.text(prompt, self.seed)
                for alpha in arm.alphas:
                    base = seed_of(self.seed, arm.name, prompt.id, alpha)
                    left = [
                        sample
                        for sample in range(self.samples)
                        if not finished(Key(arm.name, prompt.id, alpha, sample))
                    ]
                    for first, n in _ranges(left):
                        yield Item(arm.name, prompt.id, text, alpha, first, n, base)

    def as_manifest(self) -> dict[str, Any]:
        config = {
            "arms": [asdict(arm) for arm in self.arms],
            "samples": self.samples,
            "seed": self.seed,
            **self.sampling,
        }
        prompts = {"sha256": self.prompts.sha256, "used": self.prompts.count}
        return {"config": config, "prompts": prompts, "scorers": describe(self.scorers)}


def run(experiment: Experiment, out: Path, service: Service, timeout_s: float) -> int:
    """Makes the rows that are not there yet, then the summary and the table; exit status 0 or 1."""
    expected, names = experiment.expected, [s.name for s in experiment.scorers]
    with RunFolder(out) as folder:
        known = folder.check_experiment(experiment.as_manifest())
        file = RowFile(folder.rows)
        if cut := file.cut_half_line():
            print(f"{file.path}: cut off half a last line of {cut} bytes", file=sys.stderr)
        finished, hits = file.finished(expected)
        left = sum(expected.values()) - len(finished)
        if left:
            pair = service.describe()
            print(f"after {pair.after}, before {pair.before} ({pair.dtype}, {pair.device})")
            if known:
                folder.check_pair(pair)
            else:
                folder.write(MANIFEST, manifest(experiment.as_manifest(), pair))
            folder.discard(SUMMARY)
            generation = Generation(experiment.sampling, experiment.scorers, timeout_s)
            requests = -(-left // min(experiment.samples, SAMPLES_PER_REQUEST))
            items = experiment.items(finished.__contains__)
            batches = service.answers(items, generation, requests)
            with (
                closing(batches),
                RowWriter(folder.rows) as writer,
                Progress(sum(expected.values()), len(finished), hits) as progress,
            ):
                for answers in answered(batches):
                    rows = [row for answer in answers for row in answer.rows]
                    writer.append(rows)
                    progress.update(rows)
        summary = summarise(file, names, expected)
        folder.write(SUMMARY, summary)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(summary, list(expected), names, experiment.samples > 1, str(out)))
    if bad := summary["failed"] + summary["missing"]:
        print(f"{bad:,} row(s) failed; run again to retry them", file=sys.stderr)
    return 1 if bad else 0


def _ranges(samples: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and length of each run of consecutive numbers, none longer than a request may be."""
    start = 0
    for i in range(1, len(samples) + 1):
        full = i - start == SAMPLES_PER_REQUEST
        if i == len(samples) or full or samples[i] != samples[i - 1] + 1:
            yield samples[start], i - start
            start = i
