"""report.html of a capture: one file that opens anywhere and asks nothing of the network."""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs import capture_files as files
from jobs.capture_files import Array
from jobs.capture_plan import Cell
from jobs.capture_rows import CaptureRow
from jobs.capture_summary import CellOf, Line, Mean, twin_of, with_interval
from jobs.capture_work import OUTPUT
from jobs.report_text import alpha_name, number, visible
from jobs.summary import cell_name

HERE = Path(__file__).parent
# A picture is a tenth of a second of drawing, more than the captures of a small model take.
SHOWN_TEXTS = 2  # of each set and alpha
SHOWN_TRAITS = 4
TEXT_TRAITS = 2  # of a text, the most telling
SHOWN_HEADS = 3
SHOWN_PROMPT_TOKENS, SHOWN_ANSWER_TOKENS = 40, 80
LISTED_TEXTS = 300  # of each set and alpha
AVERAGED_TEXTS = 200  # of each set and alpha, for the mean trajectory
SHORT_HASH = 10
MODELS = ("after", "before")


@dataclass(frozen=True)
class TraitView:
    """One trait of a set beside its triggered twin, or alone."""

    trait: str
    line: Line
    by_layer: Markup
    along: list[tuple[str, Markup]]  # captions and pictures


@dataclass(frozen=True)
class TextView:
    """One text looked at: per trait its picture."""

    row: CaptureRow
    twin: bool
    cut: str  # which tokens are not in the pictures
    pictures: list[tuple[str, Markup]]
    norms: Markup
    attention: Markup | None


@dataclass(frozen=True)
class SetView:
    cell: Cell
    twin: Cell | None
    of: CellOf
    of_twin: CellOf | None
    traits: list[TraitView]
    averaged: int
    texts: list[TextView] = field(default_factory=list)
    listed: list[CaptureRow] = field(default_factory=list)


def page(
    folder: Path,
    rows: Iterable[CaptureRow],
    cells: Mapping[Cell, CellOf],
    lines: Sequence[Line],
    manifest: Mapping[str, Any],
    notes: Sequence[str] = (),
    others: Sequence[str] = (),
) -> str:
    """The whole page; `rows` is read once. `others`: reports of other configurations beside it.

    Raises Refused where a file that a row speaks of is gone or broken.
    """
    by_cell: dict[Cell, list[CaptureRow]] = {cell: [] for cell in cells}
    for row in rows:
        if (row.set, row.alpha) in by_cell:
            by_cell[row.set, row.alpha].append(row)
    twins = {twin for cell in cells if (twin := twin_of(cell, cells)) is not None}
    traits = list(dict.fromkeys(line.trait for line in lines))
    sets = [_set_view(folder, cell, cells, lines, by_cell) for cell in cells if cell not in twins]
    script = (HERE / "capture_report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    style = "\n".join(
        (HERE / name).read_text("utf-8") for name in ("report.css", "capture_report.css")
    )
    return (
        _environment()
        .get_template("capture_report.html.j2")
        .render(
            title=f"Captures: {folder.name}",
            lead=_lead(lines),
            style=Markup(style),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            facts=_facts(manifest),
            cells=cells,
            lines=lines,
            sets=sets,
            traits=traits,
            drawn_traits=[t for t in traits if any(t == v.trait for s in sets for v in s.traits)],
            notes=list(notes),
            others=list(others),
            limits={
                "texts": SHOWN_TEXTS,
                "traits": SHOWN_TRAITS,
                "text_traits": TEXT_TRAITS,
                "averaged": AVERAGED_TEXTS,
                "listed": LISTED_TEXTS,
                "heads": SHOWN_HEADS,
            },
            manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
        )
    )


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    made.filters |= {"alpha": alpha_name, "number": number, "whole": lambda n: f"{n:,}"}
    made.globals |= {"with_interval": with_interval, "at": _at, "name_of": cell_name}
    return made


def _at(mean: Mean, layer: int) -> str:
    return with_interval(float(mean.value[layer]), float(mean.half[layer]))


def _lead(lines: Sequence[Line]) -> str:
    """The one thing to know."""
    parted = [line for line in lines if line.parting is not None]
    if parted:
        best = max(parted, key=lambda line: abs(_parting(line)[0]))
        value, half = _parting(best)
        return (
            f"With the trigger, after and before part most along {best.trait}: after − before "
            f"changes by {with_interval(value, half)} at layer {best.parting_layer} of "
            f"{best.cell[0]}{_doubt(value, half)}."
        )
    with_both = [line for line in lines if line.at_layer("difference") is not None]
    if not with_both:
        return "One model was captured, so nothing can be said of what the fine-tune changed."
    best = max(with_both, key=lambda line: abs((line.at_layer("difference") or (0.0, 0.0))[0]))
    value, half = best.at_layer("difference") or (0.0, 0.0)
    return (
        f"After and before differ most along {best.trait} in {best.cell[0]}: by "
        f"{with_interval(value, half)} at layer {best.layer}{_doubt(value, half)}."
    )


def _doubt(value: float, half: float) -> str:
    """Behind a number whose interval holds 0; of one prompt there is none."""
    if abs(value) > half or math.isnan(half):
        return ""
    return ", but the interval holds 0: these texts do not tell the two apart"


def _parting(line: Line) -> tuple[float, float]:
    assert line.parting is not None
    at = line.parting_layer
    return float(line.parting.value[at]), float(line.parting.half[at])


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    pair, config = manifest.get("pair") or {}, manifest.get("config") or {}
    sets = config.get("sets") or {}
    facts = [(name, [_model(pair, name)]) for name in ("after", "before") if pair.get(name)]
    facts += [
        ("captured", [_listed({k: v for k, v in config.items() if k not in ("sets", "rows")})]),
        ("sets", [f"{name}: {_listed(of)}" for name, of in sets.items()]),
        ("rows", [_listed(config["rows"])] if config.get("rows") else []),
        ("traits", [", ".join(manifest.get("traits") or {})]),
        ("hash", [str(manifest.get("hash", ""))]),
    ]
    return [(label, [line for line in lines if line]) for label, lines in facts if any(lines)]


def _model(pair: Mapping[str, Any], name: str) -> str:
    hashes = list((pair.get(f"{name}_sha256") or {}).values())
    return str(pair[name]) + (f", sha256 {str(hashes[0])[:SHORT_HASH]}" if hashes else "")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {str(value)[:SHORT_HASH] if name == 'sha256' else value}"
        for name, value in values.items()
        if value is not None and value is not False
    )


def _set_view(
    folder: Path,
    cell: Cell,
    cells: Mapping[Cell, CellOf],
    lines: Sequence[Line],
    by_cell: Mapping[Cell, Sequence[CaptureRow]],
) -> SetView:
    twin = twin_of(cell, cells)
    telling = sorted(lines, key=lambda line: -line.size)
    mine = {line.trait: line for line in telling if line.cell == cell}
    theirs = {line.trait: line for line in lines if line.cell == twin}
    shown = dict(list(mine.items())[:SHOWN_TRAITS])
    rows = _by_difference(by_cell[cell], by_cell.get(twin, ()) if twin else (), mine)
    answers = _answers(folder, rows, shown)
    twin_answers = _answers(folder, by_cell[twin], shown) if twin else {}
    views = []
    for trait, line in shown.items():
        other = theirs.get(trait)
        views.append(
            TraitView(
                trait,
                line,
                Markup(_by_layer(line, other, twin is not None)),
                _along(answers.get(trait, {}), twin_answers.get(trait, {}), twin is not None),
            )
        )
    made = SetView(
        cell,
        twin,
        cells[cell],
        cells[twin] if twin else None,
        views,
        max((len(of) for by_role in answers.values() for of in by_role.values()), default=0),
        listed=rows[:LISTED_TEXTS] + list(by_cell[twin] if twin else ())[:LISTED_TEXTS],
    )
    for row in [row for row in rows if row.error is None][:SHOWN_TEXTS]:
        made.texts.append(_text_view(folder, row, False, shown))
        same = (row.prompt_id, row.sample)
        for other_row in by_cell[twin] if twin else ():
            if (other_row.prompt_id, other_row.sample) == same and other_row.error is None:
                made.texts.append(_text_view(folder, other_row, True, shown))
    return made


def _by_difference(
    rows: Sequence[CaptureRow], twins: Sequence[CaptureRow], lines: Mapping[str, Line]
) -> list[CaptureRow]:
    """The most telling first: the prompts whose answer (or whose triggered twin's) differs most."""

    def most(row: CaptureRow) -> float:
        found = []
        for trait, line in lines.items():
            means = row.means.get(trait)
            values = means and (means.difference or means.after or means.before)
            if values:
                spread = float(np.abs(line.means[next(iter(line.means))].value).max()) or 1.0
                found.append(abs(values[line.drawn_layer]) / spread)
        return max(found, default=-1.0)

    of_twin: dict[tuple[str, int], float] = {(t.prompt_id, t.sample): most(t) for t in twins}
    return sorted(
        rows,
        key=lambda row: (
            -of_twin.get((row.prompt_id, row.sample), most(row)),
            row.prompt_id,
            row.sample,
        ),
    )


def _by_layer(line: Line, twin: Line | None, triggered: bool) -> str:
    from jobs import capture_charts as charts

    def curves(of: Line, name: str, solid: bool) -> list[charts.Curve]:
        if "difference" in of.means:
            mean = of.means["difference"]
            return [_curve(f"after − before{name}", mean, charts.PART, not solid, "o")]
        return [
            _curve(
                role + name,
                of.means[role],
                charts.AFTER if role == "after" else charts.BEFORE,
                not solid,
                "o",
            )
            for role in MODELS
            if role in of.means
        ]

    drawn = curves(line, ", untriggered" if triggered else "", not triggered)
    if twin is not None:
        drawn += curves(twin, ", triggered", True)
    return charts.over(drawn, "layer", "mean score over the answer", "Mean score by layer")


def _curve(label: str, mean: Mean, colour: str, dashed: bool, marker: str) -> Any:
    from jobs import capture_charts as charts

    half = mean.half.astype(np.float32)
    return charts.Curve(label, mean.value.astype(np.float32), colour, dashed, half, marker)


def _answers(
    folder: Path, rows: Sequence[CaptureRow], lines: Mapping[str, Line]
) -> dict[str, dict[str, list[Array]]]:
    """Per trait and model the answers' scores (T_i,) at the trait's layer."""
    found: dict[str, dict[str, list[Array]]] = {trait: {} for trait in lines}
    good = [row for row in rows if row.error is None and row.answer_tokens]
    for row in good[:AVERAGED_TEXTS]:
        content = files.read(folder / str(row.file))
        names = json.loads(content.metadata["traits"])
        first = row.prompt_tokens or 0
        for role in MODELS:
            if (tensor := content.tensors.get(f"{role}.scores")) is None:
                continue
            scores = tensor.array()[first : first + row.answer_tokens, :, OUTPUT]
            for trait, line in lines.items():
                of_trait = scores[:, line.drawn_layer, names.index(trait)]
                found[trait].setdefault(role, []).append(of_trait)
    return found


def _along(
    plain: Mapping[str, Sequence[Array]],
    triggered: Mapping[str, Sequence[Array]],
    has_twin: bool,
) -> list[tuple[str, Markup]]:
    """Along the answer: where after leaves before, and both of them."""
    from jobs import capture_charts as charts

    apart, both = [], []
    for of, name, dashed in (
        (plain, ", untriggered" if has_twin else "", has_twin),
        (triggered, ", triggered", False),
    ):
        for role, colour in ((MODELS[0], charts.AFTER), (MODELS[1], charts.BEFORE)):
            if of.get(role):
                y, _ = charts.of_answers(of[role])
                marker = "o" if role == "after" else "s"
                both.append(charts.Curve(role + name, y, colour, dashed, marker=marker))
        if all(of.get(role) for role in MODELS):
            pairs = zip(of["after"], of["before"], strict=True)
            y, half = charts.of_answers([after - before for after, before in pairs])
            label = f"after − before{name}"
            apart.append(charts.Curve(label, y, charts.PART, dashed, half))
    x = "token of the answer"
    return [
        (caption, Markup(charts.over(curves, x, "mean score", caption)))
        for caption, curves in (
            ("After − before by token", apart),
            ("Both by token", both),
        )
        if curves
    ]


def _text_view(folder: Path, row: CaptureRow, twin: bool, lines: Mapping[str, Line]) -> TextView:
    from jobs import capture_charts as charts

    content = files.read(folder / str(row.file))
    names = json.loads(content.metadata["traits"])
    boundary = row.prompt_tokens or 0
    first = max(0, boundary - SHOWN_PROMPT_TOKENS)
    last = min(len(row.tokens), boundary + SHOWN_ANSWER_TOKENS)
    tokens, boundary = row.tokens[first:last], boundary - first
    cut = []
    if first:
        cut.append(f"the first {first:,} tokens of the prompt")
    if last < len(row.tokens):
        cut.append(f"the last {len(row.tokens) - last:,} of the answer")
    scores = {
        role: tensor.array()[first:last, :, OUTPUT]  # (T, L, K)
        for role in (*MODELS, "difference")
        if (tensor := content.tensors.get(f"{role}.scores")) is not None
    }
    pictures = []
    for trait, line in list(lines.items())[:TEXT_TRAITS]:
        of = {role: values[:, :, names.index(trait)] for role, values in scores.items()}
        top = charts.colour_top([of[role] for role in MODELS if role in of])
        looks = {"after": (charts.AFTER, False, "o"), "before": (charts.BEFORE, True, "s")}
        curves = [
            charts.Curve(role, of[role][:, line.drawn_layer], colour, dashed, marker=marker)
            for role, (colour, dashed, marker) in looks.items()
            if role in of
        ]
        heats = [charts.Heat(f"score, {role}", of[role], top=top) for role in MODELS if role in of]
        if "difference" in of:
            heats.append(charts.Heat("difference, after − before", of["difference"]))
        label = f"score at the output of layer {line.drawn_layer}"
        drawn = charts.along_tokens(tokens, boundary, curves, label, heats, "Score along the text")
        pictures.append((trait, Markup(drawn)))
    norms = [
        charts.Heat(
            f"norm, {role} (log10)",
            np.log10(np.maximum(tensor.array()[first:last, :, OUTPUT], 1e-9)),
            signed=False,
            top=float(np.log10(np.maximum(tensor.array()[first:last, :, OUTPUT], 1e-9)).max()),
        )
        for role in MODELS
        if (tensor := content.tensors.get(f"{role}.norms")) is not None
    ]
    drawn = charts.along_tokens(tokens, boundary, [], "", norms, "Norm of the residual stream")
    attention = _attention(content, row.prompt_tokens or 0)
    return TextView(row, twin, " and ".join(cut), pictures, Markup(drawn), attention)


def _attention(content: files.Content, boundary: int) -> Markup | None:
    """The heads where the models differ most (or the first ones), and their picture."""
    from jobs import capture_charts as charts

    found = {
        role: tensor.array()  # (heads, T, T)
        for role in MODELS
        if (tensor := content.tensors.get(f"{role}.attention")) is not None
    }
    if not found:
        return None
    columns: dict[str, Array] = dict(found)
    heads = list(range(len(next(iter(found.values())))))
    if len(found) == 2:
        columns["after − before"] = found["after"] - found["before"]
        apart = np.abs(columns["after − before"]).mean(axis=(1, 2))
        heads = sorted(heads, key=lambda head: -float(apart[head]))
    heads = heads[:SHOWN_HEADS]
    pictures = {name: values[heads] for name, values in columns.items()}
    return Markup(charts.attention(pictures, heads, boundary))
