"""The tables a person reads: counts from summary.json alone, estimates from the findings."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from jobs.findings import Findings
from jobs.rates import percent
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


METHODS = {
    "count": "counted",
    "weighted": "importance-weighted",
    "extrapolated": "extrapolated",
    "monitor": "phrase monitor",
}


def estimates_table(findings: Findings, alpha: float = 0.0) -> Table:
    """All estimators of the rate at one alpha side by side, a line per scorer and method."""
    made = Table(title=f"rate at alpha {alpha_text(alpha)}", caption="95 % intervals")
    for heading in ("scorer", "estimate", RATE, "verdict"):
        made.add_column(heading, no_wrap=heading == RATE)
    made.add_column("why", overflow="fold")
    for estimate in findings.estimates:
        if estimate.alpha == alpha:
            rate, low, high = (percent(x) for x in (estimate.rate, estimate.low, estimate.high))
            made.add_row(
                escape(estimate.scorer),
                METHODS[estimate.method],
                rf"{rate} \[{low}, {high}]",
                estimate.verdict,
                escape(estimate.why),
            )
    return made


def _rate(summary: Mapping[str, int | float], prefix: str) -> str:
    if f"{prefix}/rate" not in summary:
        return "-"
    rate, low, high = (percent(summary[f"{prefix}/{k}"]) for k in ("rate", "ci_low", "ci_high"))
    return rf"{rate} \[{low}, {high}]"
