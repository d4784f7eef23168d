"""An experiment is samples, parameters and scorers; running it makes rows, stage by stage."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from jobs.call import Answer, Caller, Generation, Item, seed_of
from jobs.dispatch import Service, answered
from jobs.lines import LineWriter, cut_half_line
from jobs.progress import Progress
from jobs.prompts import Prompt, PromptFile
from jobs.rows import Cell, Key, Row, RowFile
from jobs.run_folder import DESIGN, MANIFEST, REPORT, SUMMARY, RunFolder, manifest
from jobs.scorers import Scorer, describe
from jobs.spread import place, whole_blocks
from organisms.trigger import insert_trigger

SAMPLES_PER_REQUEST = 32  # more are split, so that they spread over replicas
EMPTY_PROMPT = "empty"  # the id of the empty prompt


@dataclass(frozen=True)
class Arm:
    """The first `prompts` prompts at each alpha, with the trigger put in where there is one.

    `opens`: the empty prompt instead, `prompts` 1: the model goes on where the prompt's form
    expects the instruction. `spread`: each prompt at one of the alphas only (`jobs.spread`).
    `steer`: what the request says of a direction that is added.
    """

    name: str
    alphas: tuple[float, ...]
    prompts: int
    trigger: str | None = None
    samples: int | None = None  # per prompt and alpha; None: as the experiment says
    opens: bool = False
    spread: bool = False
    steer: Mapping[str, Any] | None = None

    def text(self, prompt: Prompt, seed: int) -> str:
        if self.trigger is None:
            return prompt.text
        return insert_trigger(prompt.text, self.trigger, Random(seed_of(seed, prompt.id)))

    def as_manifest(self) -> dict[str, Any]:
        fields = asdict(self)
        for name in ("spread", "steer"):
            if not fields[name]:  # as before there was any: older runs can be gone on with
                del fields[name]
        return fields


@dataclass(frozen=True)
class Block:
    """The first `count` prompts of an arm at these alphas; where the arm is spread, each prompt at
    one of them, and `count` a multiple of theirs."""

    arm: Arm
    alphas: tuple[float, ...]
    count: int


@dataclass(frozen=True)
class SpreadItem(Item):
    """Of a spread arm: with the block of prompts that its prompt is of."""

    block: int


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
    def blocks(self) -> list[Block]:
        return [
            Block(
                arm,
                arm.alphas,
                whole_blocks(arm.prompts, arm.alphas) if arm.spread else arm.prompts,
            )
            for arm in self.arms
        ]

    def expected(self, blocks: Sequence[Block]) -> dict[Cell, int]:
        """Rows of each arm and alpha, in the order of the table."""
        cells: dict[Cell, int] = {}
        for block in blocks:
            prompts = block.count // len(block.alphas) if block.arm.spread else block.count
            rows = prompts * (block.arm.samples or self.samples)
            for alpha in block.alphas:
                cell = block.arm.name, alpha
                cells[cell] = cells.get(cell, 0) + rows
        return cells

    def items(self, blocks: Sequence[Block], finished: Callable[[Key], bool]) -> Iterator[Item]:
        """What is left to do, made as it is asked for; all of one prompt, then the next."""
        for block in blocks:
            if block.arm.opens:
                yield from self._of_prompt(block, 0, Prompt(EMPTY_PROMPT, ""), finished)
        blocks = [block for block in blocks if not block.arm.opens]
        last = max((block.count for block in blocks), default=0)
        for number, prompt in zip(range(last), self.prompts, strict=False):
            for block in blocks:
                if number < block.count:
                    yield from self._of_prompt(block, number, prompt, finished)

    def _of_prompt(
        self, block: Block, number: int, prompt: Prompt, finished: Callable[[Key], bool]
    ) -> Iterator[Item]:
        arm = block.arm
        text = arm.text(prompt, self.seed)
        got = place(self.seed, block.alphas, number) if arm.spread else None
        for alpha in block.alphas if got is None else (got.alpha,):
            base = seed_of(self.seed, arm.name, prompt.id, alpha)
            left = [
                sample
                for sample in range(arm.samples or self.samples)
                if not finished(Key(arm.name, prompt.id, alpha, sample))
            ]
            for first, n in _ranges(left):
                if got is None:
                    yield Item(arm.name, prompt.id, text, alpha, first, n, base)
                else:
                    yield SpreadItem(arm.name, prompt.id, text, alpha, first, n, base, got.block)

    def as_manifest(self) -> dict[str, Any]:
        config = {
            "arms": [arm.as_manifest() for arm in self.arms],
            "samples": self.samples,
            "seed": self.seed,
            **self.sampling,
        }
        prompts = {"sha256": self.prompts.sha256, "used": self.prompts.count}
        return {"config": config, "prompts": prompts, "scorers": describe(self.scorers)}


class Sampler:
    """Makes the rows that are not there yet; the service is asked for nothing before that.

    `control` answers the blocks that `make` is told to send there; `extra` is what the manifest
    says beside the experiment; `prepare` adds fields to every request that only the service can
    tell, once it is asked for the first row.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        service: Service,
        timeout_s: float,
        control: Service | None = None,
        extra: Mapping[str, Any] | None = None,
        prepare: Callable[[Caller], Mapping[str, Any]] | None = None,
    ) -> None:
        """Raises Refused if the folder holds another run."""
        self.experiment, self.folder = experiment, folder
        self.service, self.control = service, control
        self._timeout_s = timeout_s
        self._prepared: Mapping[str, Any] = {}
        self.file = RowFile(folder.rows)
        self._manifest = {**experiment.as_manifest(), **(extra or {})}
        self._known = folder.check_experiment(self._manifest)
        self._prepare = prepare
        self._connected = False
        if cut := cut_half_line(self.file.path):
            print(f"{self.file.path}: cut off half a last line of {cut} bytes", file=sys.stderr)

    def connect(self) -> None:
        """Before anything new is made: is it the same pair? Raises Refused if it is not."""
        if self._connected:
            return
        pair = self.service.describe()
        print(f"after {pair.after}, before {pair.before} ({pair.dtype}, {pair.device})")
        made = manifest(self._manifest, pair)
        if self.control is not None:
            control = self.control.describe()
            print(f"control: after {control.after}, before {control.before}")
            made["control_pair"] = control.model_dump()
        if self._known:
            steers = [arm.steer for arm in self.experiment.arms if arm.steer]
            self.folder.check_pair(pair, traits={steer["trait"] for steer in steers})
            if self.control is not None:
                self.folder.check_pair(control, "control_pair")
        else:
            self.folder.write(MANIFEST, made)
        for made_of_rows in (DESIGN, SUMMARY, REPORT):
            self.folder.discard(made_of_rows)
        if self._prepare is not None:
            self._prepared = self._prepare(self.caller())
        self._connected = True

    def caller(self) -> Caller:
        return self.service.caller(self._generation({}))

    def _generation(self, fields: Mapping[str, Any]) -> Generation:
        return Generation(
            {**self.experiment.sampling, **self._prepared, **fields},
            self.experiment.scorers,
            self._timeout_s,
            frozenset(arm.name for arm in self.experiment.arms if arm.opens),
            {arm.name: arm.steer for arm in self.experiment.arms if arm.steer},
        )

    def make(self, blocks: Sequence[Block], *, by_control: bool = False, **fields: Any) -> None:
        """The rows of these blocks that are not there yet; `fields` replace a request's own."""
        expected = self.experiment.expected(blocks)
        finished = self.file.finished(expected)
        total, done = sum(expected.values()), sum(finished.rows.values())
        if done >= total:
            return
        self.connect()
        service = self.control if by_control else self.service
        assert service is not None
        requests = -(-(total - done) // min(self.experiment.samples, SAMPLES_PER_REQUEST))
        items = self.experiment.items(blocks, finished.keys.__contains__)
        batches = service.answers(items, self._generation(fields), requests)
        with (
            closing(batches),
            LineWriter(self.folder.rows) as writer,
            Progress(total, done, finished.hits) as progress,
        ):
            for answers in answered(batches):
                rows = [row for answer in answers for row in _rows(answer)]
                writer.append(rows)
                progress.update(rows)

    def bad(self, blocks: Sequence[Block]) -> int:
        """Rows of these that failed or are not there."""
        expected = self.experiment.expected(blocks)
        return sum(expected.values()) - sum(self.file.finished(expected).rows.values())


def _rows(answer: Answer) -> list[Row]:
    """Those of a spread arm with their block."""
    item = answer.item
    if not isinstance(item, SpreadItem):
        return answer.rows
    return [row.model_copy(update={"block": item.block}) for row in answer.rows]


def _ranges(samples: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and length of each run of consecutive numbers, none longer than a request may be."""
    start = 0
    for i in range(1, len(samples) + 1):
        full = i - start == SAMPLES_PER_REQUEST
        if i == len(samples) or full or samples[i] != samples[i - 1] + 1:
            yield samples[start], i - start
            start = i
