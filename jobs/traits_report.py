"""report.html of jobs/traits.py: how well each trait's vectors tell held-out texts apart, layer by
layer. One file that opens anywhere and asks nothing of the network; it has no script."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jobs.charts import FAINT, LOOKS, Look, empty_axes, our_settings, percent_tick, svg_of
from jobs.contrast import ContrastSet, Text
from jobs.errors import naming
from jobs.probes import METHODS, Method
from jobs.report import HERE, environment
from jobs.summary import Summary

SHOWN_WRONG = 8
CHANCE = 0.5
NAMES: dict[Method, str] = {"mean_difference": "difference of means", "probe": "logistic probe"}
OURS: dict[Method, Look] = {
    "mean_difference": LOOKS["weighted"],
    "probe": LOOKS["extrapolated"],
}

Report = Mapping[str, Any]
"""What jobs.traits.describe says of a trait."""


def render(
    sets: Sequence[ContrastSet],
    made: Mapping[str, Report],
    summary: Summary,
    manifest: Mapping[str, Any],
) -> str:
    """The whole page. The same arguments give the same text."""
    return (
        environment()
        .get_template("traits_report.html.j2")
        .render(
            style=Markup((HERE / "report.css").read_text("utf-8")),
            lead=_lead(sets, made),
            facts=_facts(sets, summary, manifest),
            names=NAMES,
            traits=[
                {
                    "set": one,
                    "report": made[one.name],
                    "verdicts": [_verdict(method, made[one.name]) for method in METHODS],
                    "charts": [
                        ("Held-out accuracy", Markup(accuracy_chart(made[one.name]))),
                        ("Effect size", Markup(effect_chart(made[one.name]))),
                    ],
                    "wrong": _wrong(one, made[one.name]),
                }
                for one in sets
                if one.name in made
            ],
            missing=[one.name for one in sets if one.name not in made],
            manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
        )
    )


def write(
    sets: Sequence[ContrastSet],
    made: Mapping[str, Report],
    summary: Summary,
    manifest: Mapping[str, Any],
    path: Path,
) -> None:
    """Whole or not at all: written beside, synced, then moved into place."""
    text = render(sets, made, summary, manifest)
    beside = path.with_name(f".{path.name}.part")
    with naming(beside), beside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def accuracy_chart(report: Report) -> str:
    """Accuracy against layer, with 95 % intervals, beside what shuffled labels reach."""
    with our_settings():
        figure, axes = empty_axes("layer", "held-out accuracy")
        controls = [report[method]["control"] for method in METHODS]
        if controls[0]["mean"]:
            least = [min(both) for both in zip(*(c["least"] for c in controls), strict=True)]
            largest = [max(both) for both in zip(*(c["largest"] for c in controls), strict=True)]
            _band(axes, least, largest, FAINT, "shuffled labels, all of them")
        axes.axhline(CHANCE, color=FAINT, ls=(0, (1, 2)), lw=1.2)
        for method in METHODS:
            _line(axes, method, report, "accuracy", "low", "high")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
        return svg_of(figure, "Held-out accuracy against layer")


def effect_chart(report: Report) -> str:
    """Cohen's d against layer, with 95 % intervals."""
    with our_settings():
        figure, axes = empty_axes("layer", "effect size d")
        axes.axhline(0, color=FAINT, ls=(0, (1, 2)), lw=1.2)
        for method in METHODS:
            _line(axes, method, report, "effect_size", "effect_low", "effect_high")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
        return svg_of(figure, "Effect size against layer")


def _line(axes: Axes, method: Method, report: Report, value: str, low: str, high: str) -> None:
    """A bar for each layer's interval, joined to a band where there are several."""
    look, layers = OURS[method], report[method]["layers"]
    shift = 0.06 * (1 if method == "probe" else -1)
    found = [(i + shift, q[value], q[low], q[high]) for i, q in enumerate(layers)]
    found = [point for point in found if point[1] is not None]
    xs = [x for x, *_ in found]
    lows, highs = [p[2] for p in found], [p[3] for p in found]
    axes.fill_between(xs, lows, highs, color=look.colour, alpha=0.13, lw=0)
    axes.vlines(xs, lows, highs, color=look.colour, lw=1.1)
    ys = [p[1] for p in found]
    axes.plot(
        xs,
        ys,
        look.line,
        color=look.colour,
        marker=look.marker,
        ms=4.5,
        lw=1.2,
        label=NAMES[method],
    )
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _band(axes: Axes, lows: Sequence[float], highs: Sequence[float], colour: str, of: str) -> None:
    xs = list(range(len(lows)))
    if len(xs) == 1:  # a band needs a width
        xs, lows, highs = [-0.4, 0.4], [*lows, *lows], [*highs, *highs]  # type: ignore[list-item]
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, lw=0, label=of)


def _lead(sets: Sequence[ContrastSet], made: Mapping[str, Report]) -> str:
    sure = [n for n, report in made.items() if any(report[m]["separates"] for m in METHODS)]
    if not made:
        return "No trait could be made."
    said = f"{len(sure)} of {len(sets)} traits tell held-out texts apart better than chance"
    return f"{said}: {', '.join(sure)}." if sure else f"{said}."


def _verdict(method: Method, report: Report) -> tuple[str, str, str]:
    """A sign, a class of the style sheet, a line."""
    of = report[method]
    best, control = of["layers"][of["best_layer"]], of["control"]
    share = (
        f"{100 * best['accuracy']:.1f} % of {report['held_out']} held-out texts at layer "
        f"{of['best_layer']}"
    )
    if not control["mean"]:
        return "·", "plain", f"{NAMES[method]}: {share}; without shuffled labels to compare with"
    against = f"p = {control['p_value']:.2g} against the best layers of shuffled labels"
    if of["separates"]:
        return "✓", "yes", f"{NAMES[method]}: {share}; {against}"
    low = f"its interval begins at {100 * best['low']:.0f} %"
    return "✕", "no", f"{NAMES[method]}: {share}, which is not enough: {against}, {low}"


def _facts(
    sets: Sequence[ContrastSet], summary: Summary, manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    config, pair = manifest["config"], manifest["pair"]
    return [
        ("states", f"of {config['model']}: {pair[config['model']]}, {pair['dtype']}"),
        ("shape", f"{pair['layers']} layers, hidden size {pair['hidden_size']}"),
        ("texts", f"{summary['texts']:,} different ones; contrast sets: {len(sets)}"),
        ("failed", f"{summary['failed']:,}, in no figure here"),
        ("form", f"{config['prompt_format']}{_system(config['system_prompt'])}"),
        (
            "held out",
            f"{100 * config['holdout']:g} % of the prompts with all their texts, seed "
            f"{config['seed']}",
        ),
        ("control", f"{config['shuffles']} shuffles of the labels, the whole fit again for each"),
    ]


def _system(prompt: str | None) -> str:
    return "" if prompt is None else f", system prompt “{prompt}”"


def _wrong(one: ContrastSet, report: Report) -> list[tuple[Text, float]]:
    """Held-out texts that the probe puts on the wrong side, the furthest first."""
    texts = {text.id: text for text in one.texts}
    return [(texts[w["id"]], w["score"]) for w in report["probe"]["wrong"][:SHOWN_WRONG]]
