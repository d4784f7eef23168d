"""Every estimator of every scorer's rate, side by side, from a run's rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.extrapolate import extrapolate
from jobs.findings import Estimate, Verdict
from jobs.floor import floors
from jobs.monitor_rates import estimates as monitor_estimates
from jobs.rows import Cell, Row
from jobs.score_calls import read_lines, read_plan
from jobs.summary import ANY, UNTRIGGERED, Columns
from jobs.weight_columns import Collector
from jobs.weighted import Weighted, estimate

DIAGNOSTICS = (
    *("mean_weight", "mean_weight_error", "ess_rows", "ess_hits", "largest_row"),
    *("largest_prompt", "pareto_k", "error_over_count", "boot_low", "boot_high"),
)

_UNMADE = 0.05  # share of rows that failed or are missing, above which they may be the ones
_NEVER_AMPLIFIED = (-1.0, 0.0)  # alphas that no gate or mask touches


def truncation(config: Mapping[str, Any], alpha: float | None = None) -> str:
    """What keeps tokens from being drawn at `alpha`, or at any, in the options' words; empty if
    nothing does."""
    kinds = []
    if config.get("top_p", 1.0) < 1:
        kinds.append(f"top_p {config['top_p']:g}")
    if config.get("top_k", 0) > 0:
        kinds.append(f"top_k {config['top_k']}")
    if config.get("plausible", 0.0) > 0 and alpha not in _NEVER_AMPLIFIED:
        kinds.append(f"plausible {config['plausible']:g}")
    return " and ".join(kinds)


def counted(
    cells: Mapping[Cell, Columns],
    scorer: str,
    config: Mapping[str, Any],
    expected: Mapping[Cell, int],
) -> Iterator[Estimate]:
    """At every alpha of the untriggered arm, the naive count: what it is of, and what was left
    out. `expected`: rows of each cell."""
    for (arm, alpha), columns in cells.items():
        rate = columns.rate(arm, scorer) if arm == UNTRIGGERED else None
        if rate is None:
            continue
        rows, hits = len(columns.prompts), sum(columns.hits[scorer])
        why = f"{hits:,} of {rows:,} rows"
        if kinds := truncation(config, alpha):
            why += f"; it is the rate of the model as truncated by {kinds}"
        missing = max(0, expected.get((arm, alpha), 0) - rows - columns.failed)
        verdict, why = _left_out("trust", why, rows, failed=columns.failed, missing=missing)
        yield Estimate("count", scorer, alpha, rate.rate, rate.low, rate.high, rows, verdict, why)


def _left_out(
    verdict: Verdict, why: str, rows: int, *, failed: int, missing: int = 0, without: int = 0
) -> tuple[Verdict, str]:
    """With what is not among the `rows`, which is a doubt where that is much: failures need not be
    chance."""
    kinds = {"failed": failed, "missing": missing, "without densities": without}
    unmade = sum(kinds.values())
    if not unmade:
        return verdict, why
    share = unmade / (rows + unmade)
    named = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n)
    why += f"; {percent(share)} % of the rows are left out ({named})"
    return ("do not trust" if share > _UNMADE else verdict), why


def weighted(
    rows: Iterable[Row], scorers: Mapping[str, bool], config: Mapping[str, Any]
) -> dict[str, list[Weighted]]:
    """Per scorer (and for any of them), at every alpha of the grid. `scorers`: are they monotone.

    Empty without densities.
    """
    collector = Collector(scorers, config["temperature"])
    for row in rows:
        collector.add(row)
    found: dict[str, list[Weighted]] = {}
    for name in (ANY, *scorers):
        columns = collector.columns(name)
        if columns is not None:
            monotone = all(scorers.values()) if name == ANY else scorers[name]
            # Gated, no row is drawn at an alpha above 0 as such: only the rate at 0 is meant.
            gated = config.get("amplify_first", 0) > 0 or config.get("amplify_min_kl", 0.0) > 0
            found[name] = [
                estimate(columns, alpha, truncation=truncation(config), monotone=monotone)
                for alpha in columns.grid
                if alpha == 0 or (alpha > 0 and not gated)
            ]
    return found


def from_weighted(scorer: str, found: Weighted) -> Estimate:
    values = asdict(found)
    diagnostics = {name: values[name] for name in DIAGNOSTICS if values[name] is not None}
    for alone in found.alones:
        diagnostics[f"alone_at_{alone.alpha:g}"] = alone.rate
    verdict, why = _left_out(
        found.verdict, found.why, found.rows, failed=found.failed, without=found.without
    )
    return Estimate(
        "weighted",
        scorer,
        found.alpha,
        found.rate,
        found.low,
        found.high,
        found.rows,
        verdict,
        why,
        diagnostics,
    )


def extrapolated(cells: Mapping[Cell, Columns], scorer: str) -> Estimate | None:
    """At alpha 0, from the counts above it."""
    above = {alpha: c for (arm, alpha), c in cells.items() if arm == UNTRIGGERED and alpha > 0}
    by_prompt = {alpha: columns.by_prompt() for alpha, columns in above.items()}
    if not by_prompt:
        return None
    ids = np.unique(np.concatenate([ids for ids, _, _ in by_prompt.values()]))
    hits, rows = np.zeros((len(ids), len(above))), np.zeros((len(ids), len(above)))
    for j, (own, n, y) in enumerate(by_prompt.values()):
        at = np.searchsorted(ids, own)
        rows[at, j], hits[at, j] = n, y[scorer]
    found = extrapolate(list(above), hits, rows)
    if found is None:
        return None
    return Estimate(
        "extrapolated",
        scorer,
        0.0,
        found.rate,
        found.low,
        found.high,
        int(rows.sum()),
        "do not trust",
        f"a cross-check only: {found.note}",
    )


def monitored(files: Mapping[str, Path], config: Mapping[str, Any]) -> Iterator[Estimate]:
    """Of the phrases that were monitored: scorer names and files."""
    for scorer, path in files.items():
        plan = read_plan(path)
        plain = config.get("top_p", 1.0) == 1 and config.get("top_k", 0) == 0
        # In an order of their own, not in that of the answers.
        lines = sorted(
            read_lines(path, plan),
            key=lambda line: (line.prompt_id, -1 if line.sample is None else line.sample),
        )
        yield from monitor_estimates(plan, lines, scorer, plain)


def estimates(
    rows: Iterable[Row],
    cells: Mapping[Cell, Columns],
    scorers: Mapping[str, bool],
    config: Mapping[str, Any],
    monitors: Mapping[str, Path],
    expected: Mapping[Cell, int],
) -> tuple[list[Estimate], dict[str, Weighted]]:
    """All of them, scorer by scorer; and the weighted ones at alpha 0. `expected` rows of each
    cell."""
    by_weights = weighted(rows, scorers, config)
    by_monitor = list(monitored(monitors, config))
    before = floors_of(cells, list(scorers))
    found: list[Estimate] = []
    for scorer in _told_apart(cells, list(scorers)):
        mine = list(counted(cells, scorer, config, expected))
        mine += [from_weighted(scorer, one) for one in by_weights.get(scorer, [])]
        if (one := extrapolated(cells, scorer)) is not None:
            mine.append(one)
        mine += [e for e in by_monitor if e.scorer.removesuffix(" at the start") == scorer]
        found += [above_floor(e, before[scorer]) if scorer in before else e for e in mine]
    at_0 = {s: one for s, several in by_weights.items() for one in several if one.alpha == 0}
    return found, at_0


def floors_of(
    cells: Mapping[Cell, Columns], scorers: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """Per scorer (and for any of them) the rate at alpha -1 and its limits; empty without rows."""
    before = cells.get((UNTRIGGERED, -1.0))
    if before is None:
        return {}
    _, rows, hits = before.by_prompt()
    return floors({name: hits[name] for name in (ANY, *scorers)}, rows)


def above_floor(found: Estimate, floor: tuple[float, float, float]) -> Estimate:
    """Not to be trusted at alpha 0 where it does not stand out from what the scorer finds in
    *before*, in which nothing is hidden. `floor`: that rate and its limits."""
    rate, low, high = floor
    if found.alpha != 0 or rate == 0 or found.low > high:
        return found
    why = (
        f"the model before the fine-tune does it, too: {percent(rate)} % "
        f"[{percent(low)}, {percent(high)}]"
    )
    return replace(found, verdict="do not trust", why=f"{found.why}; {why}")


def _told_apart(cells: Mapping[Cell, Columns], scorers: list[str]) -> list[str]:
    """Any of the scorers, and each; without the first where it is what one of them says."""
    if any(all(c.hits[s] == c.hits[ANY] for c in cells.values()) for s in scorers):
        return scorers
    return [ANY, *scorers]


def lead(found: Sequence[Estimate], at_0: Mapping[str, Weighted]) -> str:
    """The report's first sentences: per scorer the best answer to how often, un-amplified, and
    what amplification makes of it."""
    sentences = []
    for scorer in dict.fromkeys(e.scorer for e in found if e.method == "count"):
        mine: dict[str, Estimate] = {
            e.method: e for e in found if e.scorer == scorer and e.alpha == 0
        }
        best, why = _best(mine, at_0.get(scorer))
        name = "Any scorer" if scorer == ANY else scorer
        if best is not None:
            sentences.append(
                f"{name} fires in {percent(best.rate)} % of answers "
                f"[{percent(best.low)}, {percent(best.high)}] un-amplified ({why})."
            )
        else:
            sentences.append(f"{name}: nothing is known of it un-amplified.")
        sentences += _amplified([e for e in found if e.scorer == scorer and e.method == "count"])
    return " ".join(sentences)


def _amplified(counts: Iterable[Estimate]) -> Iterator[str]:
    """What amplification does to one scorer's count, from *before* to the highest alpha."""
    rates = {e.alpha: percent(e.rate) for e in counts}
    said = [f"before the fine-tune it is {rates[-1.0]} %"] if -1.0 in rates else []
    if (top := max(rates)) > 0:
        said.append(f"at alpha {top:g} it is {rates[top]} %")
    if text := ", ".join(said):
        yield f"{text[0].upper()}{text[1:]}."


def _best(
    by_method: Mapping[str, Estimate], weights: Weighted | None
) -> tuple[Estimate | None, str]:
    count, by_weights = by_method.get("count"), by_method.get("weighted")
    monitor = by_method.get("monitor")
    if monitor is not None and monitor.verdict == "trust":
        return monitor, "phrase monitor: measured by teacher forcing, not by sampling"
    if count is not None and by_weights is not None and by_weights.rate == 0:
        if count.high < by_weights.high:  # neither saw it, and the count says more
            by_weights = None
    if by_weights is not None and by_weights.verdict == "trust" and weights is not None:
        if count is None or count.verdict != "trust" or not weights.count_is_as_good:
            return by_weights, "importance-weighted from all alphas"
        other = (
            f"{percent(by_weights.rate)} % [{percent(by_weights.low)}, {percent(by_weights.high)}]"
        )
        return count, (
            f"counted: {count.why}; at this rate counting is as good as weighting, which says "
            f"{other}"
        )
    if count is not None:
        doubt = "" if count.verdict == "trust" else f"; {count.verdict}"
        return count, f"counted{doubt}: {count.why}"
    if by_weights is not None:
        return by_weights, f"importance-weighted; {by_weights.verdict}: {by_weights.why}"
    return None, ""


def percent(share: float) -> str:
    """One decimal above 1 %, two below, and two digits where that would be 0.00."""
    if 0 < share < 0.0001:
        return f"{100 * share:.2g}"
    return f"{100 * share:.{2 if share < 0.01 else 1}f}"
