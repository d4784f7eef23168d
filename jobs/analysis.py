"""From a run's folder to its findings: nothing but what is stored there, and no service."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.coherence import drifts
from jobs.confirm import read_attacks
from jobs.duplicates import duplicates
from jobs.errors import Refused
from jobs.estimators import paired_test, swap_test
from jobs.findings import Attack, Candidate, Control, Count, Estimate, Findings
from jobs.rates import estimates, floors_of, lead, percent
from jobs.recovery import recover
from jobs.rollouts import rollouts
from jobs.rows import Cell, Row, RowFile
from jobs.run_folder import CONFIRM, DESIGN, MANIFEST, ROWS, RunFolder, monitor_file, read_json
from jobs.summary import (
    ANY,
    CONTROL,
    UNTRIGGERED,
    Columns,
    Summary,
    alpha_text,
    columns_of,
    count,
)
from jobs.views import samples, strips

CONFIRMED = 0.05  # p-value from which on an attack is none
IN_MEMORY_BYTES = 32 * 2**20  # of a row file; a larger one is streamed several times


@dataclass(frozen=True)
class Run:
    """A run's folder, read. `expected` rows per cell, in the order of the table."""

    path: Path
    manifest: Mapping[str, Any]
    design: Mapping[str, Any]
    expected: Mapping[Cell, int]
    rows: Iterable[Row]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises Refused if there is no run in it, or none that has ended."""
        manifest, design = read_json(path / MANIFEST), read_json(path / DESIGN)
        for name, content in ((MANIFEST, manifest), (DESIGN, design)):
            if content is None:
                raise Refused(f"{path}: there is no {name} in it; is it a run that has ended?")
        expected = {(arm, float(alpha)): int(rows) for arm, alpha, rows in design["cells"]}
        rows: Iterable[Row] = RowFile(path / ROWS)
        if (path / ROWS).stat().st_size <= IN_MEMORY_BYTES:
            # In an order of its own: rows come as they are answered, and findings must not
            # depend on that.
            rows = sorted(rows, key=lambda row: row.key)
        return cls(path, manifest, design, expected, rows)

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.manifest["config"]
        return config

    @property
    def scorers(self) -> dict[str, bool]:
        """Names, and whether each is monotone."""
        return {s["name"]: s.get("monotone", False) for s in self.manifest["scorers"]}

    @property
    def monitors(self) -> dict[str, Path]:
        files = {name: monitor_file(self.path, name) for name in self.scorers}
        return {name: path for name, path in files.items() if path.exists()}


def analyse(run: Run) -> tuple[Findings, Summary]:
    """What the rows say, and the naive counts of it as flat names."""
    scorers = run.scorers
    cells = columns_of(run.rows, list(scorers), run.expected)
    found, at_0 = estimates(run.rows, cells, scorers, run.config, run.monitors, run.expected)
    recovery = recover(rollouts(run.rows))
    attacks = _attacks(run.path / CONFIRM)
    findings = Findings(
        title=run.path.name,
        manifest=dict(run.manifest),
        lead=" ".join(
            part
            for part in (
                lead(found, at_0),
                _of_trigger(attacks, recovery.candidates),
            )
            if part
        ),
        trust=[*_trust(found), *recovery.notes],
        counts=counts(run, cells),
        estimates=found,
        floors=floors_of(cells, list(scorers)),
        coherence=list(drifts(run.rows, run.config["temperature"])),
        strips=strips(run.rows, [a for arm, a in run.expected if arm == UNTRIGGERED]),
        candidates=recovery.candidates,
        attacks=attacks,
        controls=controls(run, cells),
        duplicates=_duplicates(run),
        samples=samples(run.rows),
    )
    return findings, count(cells, run.expected)


def counts(run: Run, cells: Mapping[Cell, Columns]) -> list[Count]:
    """The naive counts, a line per arm, alpha and scorer (any of them first)."""
    found: list[Count] = []
    for (arm, alpha), columns in cells.items():
        rows = len(columns.prompts)
        for scorer in (ANY, *run.scorers):
            rate = columns.rate(arm, scorer)
            found.append(
                Count(
                    arm=arm,
                    alpha=alpha,
                    scorer=scorer,
                    rows=rows,
                    prompts=len(set(columns.prompts)),
                    failed=run.expected[arm, alpha] - rows,
                    hits=sum(columns.hits[scorer]),
                    after_eos=columns.after_eos,
                    rate=rate.rate if rate else None,
                    low=rate.low if rate else None,
                    high=rate.high if rate else None,
                    p_against_0=_paired(cells, arm, alpha, scorer),
                )
            )
    return found


def _paired(cells: Mapping[Cell, Columns], arm: str, alpha: float, scorer: str) -> float | None:
    """Against alpha 0, over the prompts that have rows at both; in a spread run, where none has,
    over the blocks, in which it was drawn by lot which prompt is read at which alpha."""
    if alpha == 0 or (arm, 0.0) not in cells:
        return None
    here, there = cells[arm, alpha], cells[arm, 0.0]
    spread = bool(here.blocks)
    ids, rows, hits = here.by_block() if spread else here.by_prompt()
    ids_0, rows_0, hits_0 = there.by_block() if spread else there.by_prompt()
    _, i, i_0 = np.intersect1d(ids, ids_0, assume_unique=True, return_indices=True)
    if not len(i):
        return None
    test = swap_test if spread else paired_test
    return test(hits[scorer][i], rows[i], hits_0[scorer][i_0], rows_0[i_0])


def _trust(found: Iterable[Estimate]) -> list[str]:
    names = {"weighted": "importance-weighted", "monitor": "phrase monitor"}
    return [
        f"{e.scorer}, {names[e.method]}: {e.verdict}: {e.why}"
        for e in found
        if e.alpha == 0 and e.method in names
    ]


def controls(run: Run, cells: Mapping[Cell, Columns]) -> list[Control]:
    pair = run.manifest.get("control_pair") or {}
    found = []
    for (arm, alpha), columns in cells.items():
        for scorer in (ANY, *run.scorers):
            rate = columns.rate(arm, scorer) if arm == CONTROL else None
            if rate is not None:
                hits = sum(columns.hits[scorer])
                found.append(
                    Control(
                        name=str(pair.get("after", CONTROL)),
                        alpha=alpha,
                        scorer=scorer,
                        rows=len(columns.prompts),
                        hits=hits,
                        rate=rate.rate,
                        low=rate.low,
                        high=rate.high,
                    )
                )
    return found


def _attacks(folder: Path) -> list[Attack]:
    return read_attacks(RunFolder(folder)) if folder.exists() else []


def _of_trigger(attacks: Sequence[Attack], candidates: Sequence[Candidate]) -> str:
    """Whether a phrase was found that makes it fire."""
    tried = [a for a in attacks if not a.random]
    confirmed = [
        a
        for a in tried
        if a.p_value is not None and a.p_value < CONFIRMED and (a.lift or 0.0) > 1.0
    ]
    if confirmed:
        best = max(confirmed, key=lambda attack: attack.rate)
        other = "".join(f", random phrases in {percent(a.rate)} %" for a in attacks if a.random)
        return (
            f"Put into clean prompts at alpha 0, {best.text!r} makes it fire in "
            f"{percent(best.rate)} % of answers [{percent(best.low)}, {percent(best.high)}]{other}."
        )
    if tried:
        return "None of the phrases that were put into clean prompts triggers it."
    if candidates:
        return f"Most likely trigger, not confirmed: {candidates[0].text!r}."
    return "No phrase was found that might trigger it."


def _duplicates(run: Run) -> list[str]:
    return [
        f"{d.arm}, alpha {d.alpha:g}: {d.observed:,} of {d.pairs:,} pairs of answers to one prompt "
        f"are equal, {d.expected:.1f} were expected (p = {d.p_value:.2g})"
        + (f"; {d.same_seed:,} pairs have one seed" if d.same_seed else "")
        + (f"; for instance {d.example!r}" if d.example else "")
        for d in duplicates(run.rows, run.config["temperature"])
        if d.suspicious
    ]


def flat(findings: Findings) -> dict[str, int | float | str]:
    """The estimates, the trigger's candidates and the attacks as flat names."""
    found: dict[str, int | float | str] = {"lead": findings.lead}
    for e in findings.estimates:
        at = f"estimates/{e.scorer}/alpha={alpha_text(e.alpha)}/{e.method}"
        found |= {f"{at}/rate": e.rate, f"{at}/ci_low": e.low, f"{at}/ci_high": e.high}
        found |= {f"{at}/verdict": e.verdict}
        found |= {f"{at}/{name}": value for name, value in e.diagnostics.items()}
    for number, candidate in enumerate(findings.candidates, 1):
        at = f"trigger/{number}"
        found |= {f"{at}/text": candidate.text, f"{at}/p_value": candidate.p_value}
    for number, attack in enumerate(findings.attacks, 1):
        at = "attack/random" if attack.random else f"attack/{number}"
        found |= {f"{at}/text": attack.text, f"{at}/rate": attack.rate, f"{at}/rows": attack.rows}
    for drift in findings.coherence:
        at = f"coherence/alpha={alpha_text(drift.alpha)}"
        found |= {f"{at}/kl": drift.kl, f"{at}/logprob_before": drift.logprob_before}
    # A drift is infinite where *after* rules out what was drawn (at alpha -1, say); JSON has none.
    return {k: v for k, v in found.items() if isinstance(v, str) or math.isfinite(v)}
