"""From a run's folder to its findings: nothing but what is stored there, and no service."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.errors import Refused
from jobs.estimators import paired_test, rate_by_prompt
from jobs.findings import Count, Findings, Strip
from jobs.floor import floors
from jobs.rows import Cell, Row, RowFile
from jobs.run_folder import DESIGN, MANIFEST, ROWS, read_json
from jobs.summary import Columns, Summary, columns_of, count

ANY = "activated"
UNTRIGGERED = "untriggered"
STRIPS = 60  # prompts in the heat strip
VIEWED_PROMPTS = 40


@dataclass(frozen=True)
class Run:
    """A run's folder, read. `expected` rows per cell, in the order of the table."""

    path: Path
    manifest: Mapping[str, Any]
    expected: Mapping[Cell, int]
    rows: RowFile

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises Refused if there is no run in it."""
        manifest = read_json(path / MANIFEST)
        if manifest is None:
            raise Refused(f"{path}: there is no {MANIFEST} in it")
        design = read_json(path / DESIGN)
        if design is None:
            raise Refused(f"{path}: there is no {DESIGN} in it: the run was not finished")
        expected = {(arm, float(alpha)): int(rows) for arm, alpha, rows in design["cells"]}
        return cls(path, manifest, expected, RowFile(path / ROWS))

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.manifest["config"]
        return config

    @property
    def scorers(self) -> list[str]:
        return [scorer["name"] for scorer in self.manifest["scorers"]]

    def alphas(self, arm: str) -> list[float]:
        return [alpha for name, alpha in self.expected if name == arm]


def counts(run: Run, cells: Mapping[Cell, Columns]) -> list[Count]:
    """The naive counts, a line per arm, alpha and scorer (any of them first)."""
    found: list[Count] = []
    for cell, columns in cells.items():
        arm, alpha = cell
        ids, rows, hits = columns.by_prompt()
        n = len(columns.prompts)
        for scorer in (ANY, *run.scorers):
            rate = rate_by_prompt(hits[scorer], rows) if n else None
            found.append(
                Count(
                    arm,
                    alpha,
                    scorer,
                    n,
                    len(ids),
                    run.expected[cell] - n,
                    int(hits[scorer].sum()),
                    columns.after_eos,
                    rate.rate if rate else None,
                    rate.low if rate else None,
                    rate.high if rate else None,
                    _paired(cells, arm, alpha, scorer),
                )
            )
    return found


def _paired(cells: Mapping[Cell, Columns], arm: str, alpha: float, scorer: str) -> float | None:
    """Against alpha 0 over the prompts that have rows at both."""
    if alpha == 0 or (arm, 0.0) not in cells:
        return None
    ids, rows, hits = cells[arm, alpha].by_prompt()
    ids_0, rows_0, hits_0 = cells[arm, 0.0].by_prompt()
    _, here, there = np.intersect1d(ids, ids_0, assume_unique=True, return_indices=True)
    if not len(here):
        return None
    return paired_test(hits[scorer][here], rows[here], hits_0[scorer][there], rows_0[there])


def analyse(run: Run) -> tuple[Findings, Summary]:
    """What the rows say, and the naive counts of it as flat names. Streams the rows a few times."""
    cells = columns_of(run.rows, run.scorers, run.expected)
    at_0 = counts(run, cells)
    findings = Findings(
        title=run.path.name,
        manifest=dict(run.manifest),
        lead="",
        trust=[],
        counts=at_0,
        estimates=[],
        floors=_floors(cells, run.scorers),
        coherence=[],
        strips=strips(run),
        candidates=[],
        attacks=[],
        controls=[],
        duplicates=[],
        samples=samples(run),
    )
    return findings, count(cells, run.expected)


def _floors(
    cells: Mapping[Cell, Columns], scorers: list[str]
) -> dict[str, tuple[float, float, float]]:
    before = cells.get((UNTRIGGERED, -1.0))
    if before is None:
        return {}
    _, rows, hits = before.by_prompt()
    return floors({name: hits[name] for name in (ANY, *scorers)}, rows)


def strips(run: Run) -> list[Strip]:
    """The prompts of the untriggered arm that activated most often."""
    fired: dict[str, int] = {}
    for row in run.rows:
        if row.arm == UNTRIGGERED and row.error is None and row.alpha >= 0:
            fired[row.prompt_id] = fired.get(row.prompt_id, 0) + bool(row.activated)
    chosen = dict.fromkeys(sorted(fired, key=lambda id: -fired[id])[:STRIPS])
    alphas = run.alphas(UNTRIGGERED)
    texts: dict[str, str] = {}
    tally = {id: {alpha: [0, 0] for alpha in alphas} for id in chosen}
    for row in run.rows:
        if row.arm == UNTRIGGERED and row.error is None and row.prompt_id in chosen:
            texts[row.prompt_id] = row.prompt
            tally[row.prompt_id][row.alpha][0] += bool(row.activated)
            tally[row.prompt_id][row.alpha][1] += 1
    return [
        Strip(id, texts[id], {a: hits / n if n else None for a, (hits, n) in tally[id].items()})
        for id in chosen
    ]


def samples(run: Run) -> list[Row]:
    """For the viewer: the first sample at every alpha of prompts that activated, then of others.

    A prompt that activates at a lower alpha comes first: it needed less to show.
    """
    lowest: dict[str, float] = {}
    for row in run.rows:
        if row.arm == UNTRIGGERED and row.error is None and row.sample == 0:
            at = row.alpha if row.activated else math.inf
            lowest[row.prompt_id] = min(at, lowest.get(row.prompt_id, math.inf))
    order = sorted(lowest, key=lambda id: lowest[id])
    half = [id for id in order if lowest[id] < math.inf][: VIEWED_PROMPTS * 3 // 4]
    chosen = [*half, *(id for id in order if id not in half)][:VIEWED_PROMPTS]
    place = {id: i for i, id in enumerate(chosen)}
    rows = [
        row
        for row in run.rows
        if row.arm == UNTRIGGERED and row.sample == 0 and row.prompt_id in place
    ]
    return sorted(rows, key=lambda row: (place[row.prompt_id], row.alpha))


def flat(findings: Findings) -> Summary:
    """The estimates as flat names, beside the counts."""
    return {}
