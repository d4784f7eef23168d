"""Charts of captures as SVG: along the tokens, by layer, and who attends to whom.

Token texts are put into the finished drawing, escaped: nothing of a run's own texts is read by
matplotlib. Imported only where a report is made, because matplotlib is slow.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jobs.capture_files import Array
from jobs.charts import FAINT, INK, SETTINGS, VARIABLES
from jobs.report_text import visible

# Of the style sheet, as in jobs/charts.py.
AFTER, BEFORE, PART = "#010301", "#010302", "#010303"
COLOURS = {**VARIABLES, AFTER: "var(--of-after)", BEFORE: "var(--of-before)", PART: "var(--part)"}
SIGNED, POSITIVE = "PuOr_r", "cividis"  # told apart by the colour-blind
CLIP = 99.0  # percentile where colours end
SMALL = 7.5  # letters
TOKEN_INCHES, LABEL_CHARS = 0.145, 14
LETTER_INCHES = 0.053  # of a token's label
LEFT, RIGHT, TOP, GAP = 0.62, 0.62, 0.16, 0.3  # inches around and between panels
LEAST_WIDTH = 4.2
LINE_INCHES = 1.35


@dataclass(frozen=True)
class Curve:
    """`y` (n,), `half` (n,) its interval's half width or None; drawn at `x` 0 to n - 1."""

    label: str
    y: Array
    colour: str
    dashed: bool = False
    half: Array | None = None
    marker: str = "o"


@dataclass(frozen=True)
class Heat:
    """`values` (T, L). `top` None: colours end at a percentile."""

    label: str
    values: Array
    signed: bool = True
    top: float | None = None


def along_tokens(
    tokens: Sequence[str],
    boundary: int,
    curves: Sequence[Curve],
    curves_label: str,
    heats: Sequence[Heat],
    label: str,
) -> str:
    """Curves over T tokens and heat maps (T, L) under them, with the tokens on the axis; answer
    tokens are from `boundary` on."""
    layers = max((heat.values.shape[1] for heat in heats), default=1)
    heights = [LINE_INCHES] * bool(curves) + [_heat_inches(layers)] * len(heats)
    width = max(LEAST_WIDTH, TOKEN_INCHES * len(tokens))
    below = 0.1 + LETTER_INCHES * max(len(shown(token)) for token in tokens)
    with _our_settings():
        figure, panels, bars = _panels(width, heights, below)
        if curves:
            _draw_curves(panels[0], curves, curves_label, boundary)
            bars[0].set_visible(False)
        for axes, bar, heat in zip(panels[-len(heats) :], bars[-len(heats) :], heats, strict=False):
            _draw_heat(axes, bar, heat)
        for axes in panels:
            axes.set_xlim(-0.6, len(tokens) - 0.4)
            axes.axvline(boundary - 0.5, color=INK, lw=1.1, ls=(0, (2, 2)))
            axes.set_xticks([])
        _label_tokens(panels[-1], tokens, boundary)
        return _with_tokens(_svg(figure, label), tokens)


def over(curves: Sequence[Curve], x_label: str, y_label: str, label: str) -> str:
    """Curves with their intervals over layers or over an answer's tokens."""
    with _our_settings():
        figure = Figure(figsize=(4.7, 3.2))
        axes = _at(figure, 0.75, 0.5, 3.85, 2.15)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _lines(axes, curves)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="upper left", ncols=2, frameon=False, fontsize=8.5)
        return _svg(figure, label)


def attention(heads: Mapping[str, Array], numbers: Sequence[int], boundary: int) -> str:
    """Per column a name and its heads (H, T, T), drawn under one another: who reads (down)
    attends to whom (across). A name that begins with "after −" is of signed numbers; the others
    share one scale."""
    side, gap, bar_inches = 2.4, 0.42, 0.12
    plain = np.concatenate([of.ravel() for name, of in heads.items() if not _is_signed(name)])
    width, rows = LEFT + len(heads) * (side + gap), len(numbers)
    height = 0.3 + rows * (side + gap) + 0.45
    with _our_settings():
        figure = Figure(figsize=(width, height))
        for column, (name, values) in enumerate(heads.items()):
            signed = _is_signed(name)
            top = max(float(np.percentile(np.abs(values if signed else plain), CLIP)), 1e-6)
            low = -top if signed else 0.0
            look: dict[str, Any] = {"cmap": SIGNED if signed else POSITIVE, "vmin": low}
            look |= {"vmax": top, "interpolation": "none", "aspect": "auto"}
            left = LEFT + column * (side + gap)
            for row, number in enumerate(numbers):
                bottom = height - 0.3 - row * (side + gap) - side
                axes = _at(figure, left, bottom, side, side)
                axes.imshow(values[row], **look)
                for line in (axes.axvline, axes.axhline):
                    line(boundary - 0.5, color="#808080", lw=0.9, ls=(0, (2, 2)))
                axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
                axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
                axes.tick_params(labelsize=SMALL)
                axes.set_title(f"head {number}, {name}", loc="left", fontsize=9, pad=4)
            bar = _at(figure, left, 0.3, side, bar_inches)
            ramp = np.linspace(low, top, 64)[None, :]
            bar.imshow(ramp, extent=(low, top, 0, 1), **look)
            bar.set_yticks([])
            bar.set_xticks([low, 0.0, top] if signed else [low, top])
            bar.set_xticklabels([_short(x) for x in bar.get_xticks()], fontsize=SMALL)
        return _svg(figure, "Attention of some heads")


def _is_signed(name: str) -> bool:
    return name.startswith("after −")


def _at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches: a layout that finds its own takes ten times as long to draw."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def shown(token: str) -> str:
    """A token's text where it must not break a line: what one cannot see is said."""
    text = visible(token).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return text if len(text) <= LABEL_CHARS else text[: LABEL_CHARS - 1] + "…"


def colour_top(values: Sequence[Array]) -> float:
    """Where the colours of these (T, L) end: the first token's numbers are the largest by far in
    most models, and would leave the others without a colour."""
    rest = [np.abs(of[1:] if len(of) > 1 else of).ravel() for of in values]
    return max(float(np.percentile(np.concatenate(rest), CLIP)), 1e-9)


# How it is drawn


def _heat_inches(layers: int) -> float:
    return min(max(0.17 * layers, 0.55), 2.2)


def _panels(
    width: float, heights: Sequence[float], below: float
) -> tuple[Figure, list[Axes], list[Axes]]:
    """Panels under one another, `width` and `heights` in inches, each with a bar beside it, and
    room below them all."""
    whole = LEFT + width + RIGHT
    tall = TOP + sum(heights) + GAP * len(heights) + below
    figure = Figure(figsize=(whole, tall))
    panels, bars = [], []
    top = tall - TOP
    for height in heights:
        top -= GAP * 0.75
        panels.append(_at(figure, LEFT, top - height, width, height))
        bars.append(_at(figure, LEFT + width + 0.08, top - height, 0.1, height))
        top -= height + GAP * 0.25
    return figure, panels, bars


def _draw_curves(axes: Axes, curves: Sequence[Curve], y_label: str, boundary: int) -> None:
    _lines(axes, curves)
    axes.set_title(y_label, loc="left", fontsize=9, pad=4)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.17 * (high - low))  # room for the words below
    axes.grid(axis="y")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.98),
        ncols=len(curves),
        frameon=False,
        fontsize=8.5,
        borderpad=0,
    )
    for x, word, side in (
        (boundary - 0.75, "prompt", "right"),
        (boundary - 0.25, "answer", "left"),
    ):
        axes.annotate(
            word,
            (x, 0.97),
            xycoords=("data", "axes fraction"),
            ha=side,
            va="top",
            fontsize=8,
            color=FAINT,
        )


def _lines(axes: Axes, curves: Sequence[Curve]) -> None:
    axes.axhline(0.0, color=FAINT, lw=0.8)
    for curve in curves:
        x = np.arange(len(curve.y))
        if curve.half is not None and np.isfinite(curve.half).any():
            low, high = curve.y - curve.half, curve.y + curve.half
            axes.fill_between(x, low, high, color=curve.colour, alpha=0.13, lw=0)
        axes.plot(
            x,
            curve.y,
            "--" if curve.dashed else "-",
            color=curve.colour,
            marker=curve.marker,
            markerfacecolor="none" if curve.dashed else curve.colour,
            ms=3.4,
            lw=1.3,
            label=curve.label,
        )


def _draw_heat(axes: Axes, bar: Axes, heat: Heat) -> None:
    top = colour_top([heat.values]) if heat.top is None else heat.top
    values = heat.values.T  # (L, T), the first layer below
    low = -top if heat.signed else min(float(values.min()), top - 1e-3)
    colours = SIGNED if heat.signed else POSITIVE
    look: dict[str, Any] = {"cmap": colours, "vmin": low, "vmax": top, "aspect": "auto"}
    axes.imshow(values, interpolation="none", origin="lower", **look)
    axes.set_title(heat.label, loc="left", fontsize=9, pad=4)
    axes.set_ylabel("layer", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(axis="y", labelsize=8)
    ramp = np.linspace(low, top, 64)[:, None]
    bar.imshow(ramp, interpolation="none", origin="lower", extent=(0, 1, low, top), **look)
    bar.set_xticks([])
    bar.set_yticks([low, 0.0, top] if heat.signed else [low, top])
    bar.set_yticklabels([_short(y) for y in bar.get_yticks()], fontsize=SMALL)
    bar.yaxis.tick_right()
    bar.tick_params(axis="y", length=2, pad=2)


def _short(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")


def _label_tokens(axes: Axes, tokens: Sequence[str], boundary: int) -> None:
    """Marks that `_with_tokens` puts the texts in place of."""
    axes.tick_params(axis="x", length=0, pad=3)
    axes.set_xticks(range(len(tokens)), [_mark(i) for i in range(len(tokens))])
    for number, text in enumerate(axes.get_xticklabels()):
        text.set(
            rotation=90,
            rotation_mode="anchor",
            ha="right",
            va="center",
            fontsize=SMALL,
            color=FAINT if number < boundary else INK,
        )


def _mark(number: int) -> str:
    return f"token{number:06d}"


def _with_tokens(drawn: str, tokens: Sequence[str]) -> str:
    def text_of(match: re.Match[str]) -> str:
        token = tokens[int(match[1])]
        return f">{escape(shown(token))}<"

    return re.sub(r">\s*token(\d{6})\s*<", text_of, drawn)


def of_answers(series: Sequence[Array], least: int = 2) -> tuple[Array, Array]:
    """Mean over texts of (T_i,) each, and half its 95 % interval, at every token that at least
    `least` of them have (all, where there are fewer)."""
    from scipy import stats

    least = min(least, len(series))
    means, halves = [], []
    for at in range(max(map(len, series), default=0)):
        here = np.array([of[at] for of in series if len(of) > at])
        if len(here) < least:
            break
        means.append(here.mean())
        spread = here.std(ddof=1) / math.sqrt(len(here)) if len(here) > 1 else math.nan
        halves.append(stats.t.ppf(0.975, max(1, len(here) - 1)) * spread)
    return np.array(means, np.float32), np.array(halves, np.float32)


@contextmanager
def _our_settings() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a person's own matplotlibrc is not the report's business
        matplotlib.rcParams.update({**SETTINGS, "text.parse_math": False})
        yield


def _svg(figure: Figure, label: str) -> str:
    """What can stand inside a page: no prolog, style sheet or font of its own; as wide as drawn,
    so that its letters keep their size and a long text scrolls."""
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    out = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    drawn = out.getvalue()
    for colour, variable in COLOURS.items():
        drawn = drawn.replace(colour, variable)
    drawn = re.sub(r"<style.*?</style>| font-family: [^;]*;| id=\"[a-z0-9]+[._][^\"]*\"", "", drawn)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width * 4 / 3:.0f}" role="img" '
        f'aria-label="{escape(label)}">' + drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    )
