"""Sequential design: an alpha whose interval is narrow enough is stopped, and its rows go to new
prompts of the alphas that are still open.

Rows are made in rounds that grow geometrically; after each, every open alpha is looked at. A round
is a function of the rows of the rounds before it and of the design, so a run that was killed, its
last round half made, replays what it has and goes on to the same end.

Looking again and again, and stopping at a moment that one likes, can make intervals lie: stopping
once zero is excluded would. Stopping for *precision* hardly does, because how narrow an interval
is depends on the number of hits, not on which side of the truth they fall. Tried, in simulation
(1,000 to 2,000 runs each; rates .004 to .3; 14 to 18 looks; precision .1 to .5; one row a prompt,
or 8 and 20 with intra-class correlations .1 and .3; rounds that grow by half), the rule being that
a 95 % interval of three kinds is narrow enough:

    interval that stops                          its coverage    the ordinary one's    prompts
    ordinary (Clopper-Pearson, Korn-Graubard)    94.9 - 96.1 %   the same              1
    Bonferroni over all looks                    99.5 - 100 %    94.8 - 96.5 %         2.1 times
    confidence sequence (beta-binomial mixture)  100 %           95.0 - 96.2 %         3 to 4 times

(10 to 14 times with several rows a prompt, where the mixture takes each prompt for one row.)

So the ordinary interval decides, and the one that is reported then covers what it says: as often
as in a design of fixed size, also with precision 1 or 2 (94.4 - 97.6 %) and where two prompts in
100 carry all of a rate of .004 (96 %). The estimate is a little high, as where one samples until so
many hits have come: by 2 to 4 % at precision .5, by 13 % at 1 and by 22 % at 2.

An alpha without a hit stops once its upper limit is negligible; only without any, or repeated
looks would add up: without one all looks agree, and the chance of missing a rate above is the
limit's own 2.5 %.

This holds for rates and their intervals. A test of one alpha against another is not what decides.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from jobs.coherence import ARM
from jobs.estimators import rate_by_prompt
from jobs.rows import Row

Allocation = dict[float, tuple[int, int]]  # alpha: first prompt, number of prompts
FIRST_PROMPTS = 50  # of the first round, per alpha
GROWTH = 1.5  # prompts that an open alpha has after a round, over before it


@dataclass(frozen=True)
class Design:
    """`rows` are for all alphas together, `samples` for each prompt and alpha; `prompts` that
    there are. `precision`: how far the limits may be from the rate, as a share of it.
    `negligible`: a rate that need not be told from 0."""

    alphas: tuple[float, ...]
    rows: int
    samples: int
    prompts: int
    precision: float
    negligible: float = 1e-3


@dataclass(frozen=True)
class Counts:
    """Of one alpha: hits (P,) and good rows (P,) of each prompt, in the prompts' order."""

    hits: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Replay:
    """`used`: prompts of each alpha in whole rounds. `stopped`: why, of those narrow enough.
    `next`: the round to be made or finished, None at the end."""

    used: dict[float, int]
    stopped: dict[float, str]
    next: Allocation | None


def next_round(counts: Mapping[float, Counts], design: Design) -> Allocation | None:
    """What to make next: new prompts of the open alphas; None once all are stopped, or rows or
    prompts are used up."""
    return replay(counts, design).next


def replay(counts: Mapping[float, Counts], design: Design) -> Replay:
    """All rounds from the first, as far as their rows are there."""
    used, stopped = dict.fromkeys(design.alphas, 0), dict[float, str]()
    while allocation := _allocate(used, stopped, design):
        for alpha, (first, number) in allocation.items():
            made = counts[alpha].rows[first : first + number]
            if len(made) < number or made.min() < design.samples:
                return Replay(used, stopped, allocation)
        for alpha, (first, number) in allocation.items():
            used[alpha] = first + number
            if why := _narrow(counts[alpha], used[alpha], design):
                stopped[alpha] = why
    return Replay(used, stopped, None)


def counts_of(
    rows: Iterable[Row], prompt_ids: Iterable[str], design: Design, arm: str = ARM
) -> dict[float, Counts]:
    """Good rows and activated ones of each prompt; streams the rows."""
    most = min(design.prompts, design.rows // design.samples)
    numbers = {id: number for number, id in enumerate(islice(prompt_ids, most))}
    counts = {
        alpha: Counts(np.zeros(most, np.int64), np.zeros(most, np.int64)) for alpha in design.alphas
    }
    for row in rows:
        number = numbers.get(row.prompt_id)
        if row.arm == arm and row.error is None and row.alpha in counts and number is not None:
            counts[row.alpha].hits[number] += bool(row.activated)
            counts[row.alpha].rows[number] += 1
    return counts


def _allocate(
    used: Mapping[float, int], stopped: Mapping[float, str], design: Design
) -> Allocation | None:
    """The open alphas grow alike, as far as there are prompts, and rows for all of them."""
    open_ = [a for a in design.alphas if a not in stopped and used[a] < design.prompts]
    left = design.rows // design.samples - sum(used.values())  # in prompts
    if not open_ or left < len(open_):
        return None
    fair = left // len(open_)
    allocation: Allocation = {}
    for alpha in open_:
        wanted = max(FIRST_PROMPTS, math.ceil(used[alpha] * GROWTH)) - used[alpha]
        allocation[alpha] = used[alpha], min(wanted, fair, design.prompts - used[alpha])
    return allocation


def _narrow(counts: Counts, prompts: int, design: Design) -> str | None:
    """Why the rate of the first `prompts` prompts is known well enough, if it is."""
    rate = rate_by_prompt(counts.hits[:prompts], counts.rows[:prompts])
    if rate.rate == 0:
        if rate.high > design.negligible:
            return None
        return f"no hit in {prompts:,} prompts: its rate is below {design.negligible:g}"
    if max(rate.high - rate.rate, rate.rate - rate.low) > design.precision * rate.rate:
        return None
    return f"within {design.precision:g} times its rate after {prompts:,} prompts"
