"""The report's charts as SVG, drawn from findings and coloured by the page's style sheet.

Nothing of a run's own texts goes into a chart: the page says beside it whose it is. The same
findings give the same bytes. Imported only where a report is made, because matplotlib is slow.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from jobs.findings import Coherence, Count, Estimate, Method

INCHES = (4.7, 3.5)  # small, so that its letters stay readable at a phone's width
LOWEST = 1e-9  # of an axis of rates
LEAST_DRIFT = 1e-4  # nats per token: the shortest axis of drifts; below it is rounding

# Colours that nobody draws with, each replaced by a variable of the style sheet.
INK, FAINT, PAPER = "#010203", "#010204", "#010205"
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    PAPER: "var(--paper)",
    "#010206": "var(--count)",
    "#010207": "var(--weighted)",
    "#010208": "var(--extrapolated)",
    "#010209": "var(--monitor)",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lda",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Look:
    """How an estimator is drawn: told apart by marker and line as well as by colour."""

    label: str
    colour: str
    marker: str
    line: str


LOOKS: dict[Method, Look] = {
    "count": Look("counted", "#010206", "o", "-"),
    "weighted": Look("weighted", "#010207", "s", "--"),
    "extrapolated": Look("extrapolated", "#010208", "^", ":"),
    "monitor": Look("phrase monitor", "#010209", "D", "-."),
}


@dataclass(frozen=True)
class Point:
    x: float
    rate: float
    low: float
    high: float
    sure: bool = True  # drawn filled


def rates(
    counts: Sequence[Count],
    estimates: Sequence[Estimate],
    floor: tuple[float, float, float] | None,
) -> str | None:
    """Rate against alpha of one scorer on one arm; None where there is nothing to draw."""
    points: dict[Method, list[Point]] = {
        method: [
            Point(e.alpha, e.rate, e.low, e.high, e.verdict == "trust")
            for e in estimates
            if e.method == method
        ]
        for method in LOOKS
    }
    points["count"] = [
        Point(c.alpha, c.rate, c.low, c.high)
        for c in counts
        if c.rate is not None and c.low is not None and c.high is not None
    ]
    drawable = {m: sorted(filter(_is_finite, p), key=lambda p: p.x) for m, p in points.items()}
    everything = [point for of_method in drawable.values() for point in of_method]
    if not everything:
        return None
    with our_settings():
        figure, axes = empty_axes("alpha", "rate")
        edge = _log_rates(axes, [*everything, *([Point(0, *floor)] if floor else [])])
        if floor:
            _floor(axes, floor, edge)
        xs = sorted({point.x for point in everything})
        step = 0.012 * (xs[-1] - xs[0] or 1)
        for number, (method, look) in enumerate(LOOKS.items()):
            if drawable[method]:
                _series(axes, look, drawable[method], edge, (number - 1.5) * step)
        axes.set_xticks(xs, [_number(x) for x in xs])
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        return svg_of(figure, "Rate against alpha")


def coherence(points: Sequence[Coherence]) -> str | None:
    """Rate against drift from *after*, a point per alpha; None where there is nothing to draw."""
    found = [
        (p, Point(p.kl, p.rate, p.rate, p.rate))
        for p in points
        if p.rate is not None and math.isfinite(p.kl) and math.isfinite(p.rate)
    ]
    if not found:
        return None
    found.sort(key=lambda pair: pair[0].alpha)
    with our_settings():
        figure, axes = empty_axes("drift: KL from after, nats per token", "activated")
        edge = _log_rates(axes, [point for _, point in found])
        colour, seen = LOOKS["count"].colour, [p for c, p in found if p.rate > 0 and c.alpha >= 0]
        axes.plot([p.x for p in seen], [p.rate for p in seen], "-", color=colour, lw=1.2)
        for of_alpha, point in found:
            y, marker = (point.rate, "o") if point.rate > 0 else (edge, "v")
            axes.plot([point.x], [y], marker, color=colour, ms=5.5, clip_on=False)
            axes.annotate(
                f"α = {_number(of_alpha.alpha)}",
                (point.x, y),
                (7, -11 if point.rate > 0 else 4),
                textcoords="offset points",
                fontsize=8.5,
            )
        # An estimate of no drift is a little to either side of zero.
        drifts = [point.x for _, point in found]
        axes.set_xlim(1.22 * min(0, *drifts), 1.22 * max(LEAST_DRIFT, *drifts))
        return svg_of(figure, "Rate against drift")


def _number(x: float) -> str:
    return f"{x:g}".replace("-", "−")


def percent_tick(y: float, _: int) -> str:
    return f"{100 * y:.10f}".rstrip("0").rstrip(".") + " %"


def _is_finite(point: Point) -> bool:
    return all(map(math.isfinite, (point.x, point.rate, point.low, point.high)))


@contextmanager
def our_settings() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a person's own matplotlibrc is not the report's business
        matplotlib.rcParams.update(SETTINGS)
        yield


def empty_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _log_rates(axes: Axes, points: Iterable[Point]) -> float:
    """Makes y a logarithmic axis of shares shown in percent; returns its lower edge, which
    stands for zero."""
    seen = [y for p in points for y in (p.rate, p.high, max(p.low, p.rate / 10)) if y > 0]
    exponent = math.floor(math.log10(0.6 * max(min(seen, default=0.01), LOWEST)))
    edge = 10.0 ** min(exponent, -2)
    axes.set_yscale("log")
    axes.set_ylim(edge, min(1.4, max([10 * edge, *(2.5 * y for y in seen)])))
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return edge


def _floor(axes: Axes, floor: tuple[float, float, float], edge: float) -> None:
    rate, low, high = floor
    axes.axhspan(max(low, edge), max(high, edge), color=FAINT, alpha=0.12, lw=0)
    at, what = (rate, "floor (before)") if rate > 0 else (high, "floor (before), upper limit")
    axes.axhline(max(at, edge), color=FAINT, ls=(0, (1, 2)), lw=1.4, label=what)


def _series(axes: Axes, look: Look, points: Sequence[Point], edge: float, shift: float) -> None:
    """Points joined where nothing was zero; a zero is an arrow down from its upper limit.
    Counts have no band: nothing was drawn between their alphas."""
    if len(points) > 1 and look is not LOOKS["count"]:
        xs = [p.x + shift for p in points]
        lows, highs = [max(p.low, edge) for p in points], [max(p.high, edge) for p in points]
        axes.fill_between(xs, lows, highs, color=look.colour, alpha=0.13, lw=0)
    seen = [p for p in points if p.rate > 0]
    axes.plot(
        [p.x + shift for p in seen],
        [max(p.rate, edge) for p in seen],
        look.line,
        color=look.colour,
        marker=look.marker,
        ms=4.5,
        lw=1.2,
        markevery=[i for i, p in enumerate(seen) if p.sure] or [False] * len(seen),
        label=look.label,
    )
    for point in points:
        x, top = point.x + shift, max(point.high, edge)
        axes.plot([x, x], [max(point.low, edge), top], color=look.colour, lw=1.1)
        if point.rate <= 0:
            axes.plot([x], [top], "_", color=look.colour, ms=7)
            axes.plot([x], [edge], "v", color=look.colour, ms=6, clip_on=False)
        elif not point.sure:
            axes.plot(
                [x], [max(point.rate, edge)], look.marker, color=look.colour, mfc=PAPER, ms=4.5
            )


def svg_of(figure: Figure, label: str) -> str:
    """What can stand inside a page: no prolog, style sheet, font or size of its own."""
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    out = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    drawn = out.getvalue()
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    drawn = re.sub(r"<style.*?</style>| font-family: [^;]*;| id=\"[a-z0-9]+[._][^\"]*\"", "", drawn)
    width, height = (72 * inches for inches in INCHES)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
        + drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    )
