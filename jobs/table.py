"""The table a person reads, from summary.json alone."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from jobs.rows import Cell
from jobs.summary import alpha_text, cell_name

RATE = r"rate % \[95 %]"
MEANING = {("untriggered", -1.0): " (before)", ("untriggered", 0.0): " (after)"}


def table(
    summary: Mapping[str, int | float],
    cells: Sequence[Cell],
    scorers: Sequence[str],
    clustered: bool,
    title: str = "",
) -> Table:
    """A line per arm and alpha; columns of their own for scorers that count otherwise."""
    kind = "clustered by prompt (Korn-Graubard)" if clustered else "exact (Clopper-Pearson)"
    made = Table(
        title=title or None,
        caption=f"activated: before EOS; 95 % intervals, {kind}; failed rows are left out",
    )
    names = [cell_name(cell) for cell in cells]
    made.add_column("arm")
    made.add_column("alpha")
    apart = [
        name
        for name in scorers
        if any(summary[f"{at}/{name}/activated"] != summary[f"{at}/activated"] for at in names)
    ]
    for heading in ("rows", "failed", "activated", RATE):
        made.add_column(heading, justify="right", no_wrap=heading == RATE)
    for name in apart:
        made.add_column(name, justify="right")
        made.add_column(RATE, justify="right", no_wrap=True)
    made.add_column("after EOS", justify="right")
    for cell, at in zip(cells, names, strict=True):
        unmade = summary[f"{at}/failed"] + summary[f"{at}/missing"]
        line = [cell[0], alpha_text(cell[1]) + MEANING.get(cell, "")]
        line += [f"{summary[f'{at}/n']:,}", f"[red]{unmade:,}[/red]" if unmade else "0"]
        for prefix in (at, *(f"{at}/{name}" for name in apart)):
            line += [f"{summary[f'{prefix}/activated']:,}", _rate(summary, prefix)]
        made.add_row(*line, f"{summary[f'{at}/activated_after_eos']:,}")
    return made


def _rate(summary: Mapping[str, int | float], prefix: str) -> str:
    if f"{prefix}/rate" not in summary:
        return "-"
    rate, low, high = (_percent(summary[f"{prefix}/{k}"]) for k in ("rate", "ci_low", "ci_high"))
    return rf"{rate} \[{low}, {high}]"


def _percent(share: float) -> str:
    """Two decimals below 1 %, where they matter; one above."""
    return f"{100 * share:.{2 if share < 0.01 else 1}f}"
