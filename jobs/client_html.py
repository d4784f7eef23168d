"""Rows as a notebook shows them: a table of texts with coloured tokens. No script, no style sheet:
notebooks drop both from pages that they do not trust.
"""

import html
from collections.abc import Sequence

from jobs.report_text import alpha_name, nats, visible
from jobs.rollout_view import Piece, pieces
from jobs.rows import Row

# Those of report.css and report.js, where the report's viewer has them: orange is what the
# training made more probable, blue what it made less so.
AFTER, BEFORE = "230, 126, 20", "30, 120, 190"
STEPS = (0.25, 1.0, 2.0, 4.0)  # of the log-ratio, in nats
OPACITY = {AFTER: (0.16, 0.34, 0.54, 0.76), BEFORE: (0.14, 0.3, 0.46, 0.64)}
SHOWN = 50
CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;unicode-bidi:isolate"
HEADINGS = ("prompt", "alpha", "seed", "completion")


def as_html(rows: Sequence[tuple[Row, str | None]]) -> str:
    """The first SHOWN rows, each with its error, if it has one."""
    head = "".join(f'<th style="{CELL}">{name}</th>' for name in HEADINGS)
    body = "".join(_row(row, error) for row, error in rows[:SHOWN])
    more = f"<p>and {len(rows) - SHOWN:,} more rows</p>" if len(rows) > SHOWN else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def coloured(piece: Piece) -> tuple[str, float] | None:
    """Colour and opacity of a piece; None where nothing is known or the models agree."""
    if piece.after is None or piece.before is None:
        return None
    ratio = piece.after - piece.before
    step = sum(abs(ratio) >= least for least in STEPS)
    if not step:
        return None
    colour = AFTER if ratio > 0 else BEFORE
    return colour, OPACITY[colour][step - 1]


def _row(row: Row, error: str | None) -> str:
    if error is None:
        text = "".join(map(_span, pieces(row)))
    else:
        text = f"<em>failed: {_escaped(error)}</em>"
    cells = (_escaped(row.prompt), _escaped(alpha_name(row.alpha)), str(row.seed), text)
    return "<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"


def _span(piece: Piece) -> str:
    text = "⏹" if piece.eos else _escaped(piece.text)
    if piece.after is None or piece.before is None:
        return text
    said = f"after {nats(piece.after)}, before {nats(piece.before)}"
    said += f": {nats(piece.after - piece.before)} nats" + " (end of the answer)" * piece.eos
    found = coloured(piece)
    style = "" if found is None else f' style="background:rgba({found[0]}, {found[1]})"'
    return f'<span title="{html.escape(said)}"{style}>{text}</span>'


def _escaped(text: str) -> str:
    return html.escape(visible(text))
