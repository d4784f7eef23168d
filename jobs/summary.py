"""summary.json from rows: flat names to numbers, for any tracker. Streams; needs no service.

Per arm and alpha, under `untriggered/alpha=2/`: `n` good rows, `prompts` they came from, `failed`
and `missing` rows (in no denominator), `activated` with `rate`, `ci_low`, `ci_high` (before EOS),
`activated_after_eos`, and for each scorer `NAME/activated`, `NAME/rate`, `NAME/ci_low`,
`NAME/ci_high`. Where n is 0 there is no rate.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np

from jobs.errors import Refused
from jobs.estimators import Rate, rate_by_prompt
from jobs.rows import Cell, Row

Summary = dict[str, int | float]
UNTRIGGERED, EMPTY, CONTROL = "untriggered", "empty", "control"  # arms
ANY = "activated"  # any scorer


def alpha_text(alpha: float) -> str:
    return str(int(alpha)) if alpha.is_integer() else repr(alpha)


def cell_name(cell: Cell) -> str:
    return f"{cell[0]}/alpha={alpha_text(cell[1])}"


class Columns:
    """What the rows of one cell say, in 9 bytes a row, 1 more per scorer and, in a spread run, 8
    for its block."""

    def __init__(self, scorers: Sequence[str]) -> None:
        self.prompts = array("Q")  # (n,) 64-bit hashes of prompt ids
        self.blocks = array("q")  # (n,) of a spread run, else empty
        self.hits = {name: array("b") for name in (ANY, *scorers)}  # (n,) each
        self.after_eos = self.failed = 0

    def add(self, row: Row) -> None:
        if row.error is not None:
            self.failed += 1
            return
        digest = blake2b(row.prompt_id.encode(), digest_size=8).digest()
        self.prompts.append(int.from_bytes(digest, "big"))
        if row.block is not None:
            self.blocks.append(row.block)
        self.after_eos += bool(row.activated_after_eos)
        for name, column in self.hits.items():
            fired = row.activated if name == ANY else row.scores[name].fired
            column.append(bool(fired))

    def by_prompt(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Prompts (k,) as hashes in rising order, rows (k,) and, per scorer, hits (k,) of each."""
        return self._by(np.array(self.prompts, np.uint64))

    def by_block(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """The same of blocks: in a spread run each has one prompt here, its rows all of one."""
        return self._by(np.array(self.blocks, np.int64))

    def _by(self, of_row: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        ids, at = np.unique(of_row, return_inverse=True)
        rows = np.bincount(at, minlength=len(ids))
        hits = {
            name: np.bincount(at, weights=column, minlength=len(ids))
            for name, column in self.hits.items()
        }
        return ids, rows, hits

    def rate(self, arm: str, scorer: str) -> Rate | None:
        """Clustered by prompt; None without a good row. Rollouts of the empty prompt are all of
        one: there it is their own rate that is meant, and they are independent."""
        if not self.prompts:
            return None
        if arm == EMPTY:
            return rate_by_prompt(np.array(self.hits[scorer]), np.ones(len(self.prompts)))
        _, rows, hits = self.by_prompt()
        return rate_by_prompt(hits[scorer], rows)


def columns_of(
    rows: Iterable[Row], scorers: Sequence[str], expected: Mapping[Cell, int]
) -> dict[Cell, Columns]:
    """The rows of each cell. Raises Refused for a row of another cell."""
    cells = {cell: Columns(scorers) for cell in expected}
    for row in rows:
        if (row.arm, row.alpha) not in cells:
            raise Refused(f"a row of arm {row.arm}, alpha {row.alpha:g} is not of this run")
        cells[row.arm, row.alpha].add(row)
    return cells


def summarise(rows: Iterable[Row], scorers: Sequence[str], expected: Mapping[Cell, int]) -> Summary:
    """`expected` rows per cell, in the order of the table.

    Raises Refused for a row of another cell.
    """
    return count(columns_of(rows, scorers, expected), expected)


def count(cells: Mapping[Cell, Columns], expected: Mapping[Cell, int]) -> Summary:
    """The naive counts of `summarise`."""
    summary: Summary = {"rows": 0, "failed": 0, "missing": 0}
    for cell, columns in cells.items():
        n, at = len(columns.prompts), cell_name(cell)
        missing = expected[cell] - n - columns.failed
        summary |= {
            f"{at}/n": n,
            f"{at}/prompts": len(set(columns.prompts)),
            f"{at}/failed": columns.failed,
            f"{at}/missing": missing,
        }
        for name, hits in columns.hits.items():
            prefix = at if name == ANY else f"{at}/{name}"
            summary[f"{prefix}/activated"] = sum(hits)
            if rate := columns.rate(cell[0], name):
                summary[f"{prefix}/rate"] = rate.rate
                summary[f"{prefix}/ci_low"] = rate.low
                summary[f"{prefix}/ci_high"] = rate.high
        summary[f"{at}/activated_after_eos"] = columns.after_eos
        summary["rows"] += n
        summary["failed"] += columns.failed
        summary["missing"] += missing
    return summary
