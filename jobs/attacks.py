"""Phrases put into clean prompts at alpha 0: which prompts are clean, which phrases are the
control, and what the rows say."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import numpy as np

from jobs.call import seed_of
from jobs.errors import Refused
from jobs.estimators import rate_by_prompt
from jobs.experiment import Arm, Experiment
from jobs.findings import Attack
from jobs.ngrams import words
from jobs.prompts import Prompt, PromptFile
from jobs.recovery import holm, hypergeometric
from jobs.rows import Row
from jobs.scorers import Scorer

CANDIDATE, RANDOM = "candidate", "random"  # names of arms begin so
COMMON = 0.2


@dataclass(frozen=True)
class CleanPrompts(PromptFile):
    """The first `count` of a file's first `of` prompts that hold none of the phrases."""

    of: int
    without: tuple[str, ...]

    def __iter__(self) -> Iterator[Prompt]:
        prompts = PromptFile(self.path, self.sha256, self.of)
        return islice((p for p in prompts if _is_clean(p.text, self.without)), self.count)


def clean_prompts(prompts: PromptFile, phrases: Sequence[str], count: int) -> CleanPrompts:
    """Raises Refused where every prompt holds a phrase."""
    clean = CleanPrompts(prompts.path, prompts.sha256, count, prompts.count, tuple(phrases))
    found = sum(1 for _ in clean)
    if not found:
        raise Refused(f"--prompts: no prompt of {prompts.path} is free of the phrases")
    return CleanPrompts(clean.path, clean.sha256, found, clean.of, clean.without)


def rare_phrases(phrases: Sequence[str], prompts: PromptFile) -> tuple[list[str], list[str]]:
    """Those in at most COMMON of the prompts, and the others: an ordinary phrase, that the
    prompts say without firing, is no trigger, and would leave no clean prompt to the rest."""
    said = dict.fromkeys(phrases, 0)
    for prompt in prompts:
        for phrase in said:
            said[phrase] += not _is_clean(prompt.text, (phrase,))
    rare = [phrase for phrase in phrases if said[phrase] <= COMMON * prompts.count]
    return rare, [phrase for phrase in phrases if phrase not in rare]


def _is_clean(prompt: str, phrases: Sequence[str]) -> bool:
    """A phrase without words is looked for as it is."""
    said = _spaced(prompt)
    return not any(
        _spaced(phrase) in said if words(phrase) else phrase.strip() in prompt for phrase in phrases
    )


def _spaced(text: str) -> str:
    """Its words without signs and case, each between spaces."""
    return f" {' '.join(str(unit.key) for unit in words(text))} "


def random_phrases(
    prompts: Iterable[Prompt], phrases: Sequence[str], count: int, seed: int
) -> list[str]:
    """`count` different phrases of as many words as the candidates have, in turn, each word drawn
    from all words of the prompts but those of the candidates.

    Raises Refused where the prompts have too few words for that.
    """
    used = {unit.key for phrase in phrases for unit in words(phrase)}
    pool = sorted({str(u.key) for prompt in prompts for u in words(prompt.text)} - used)
    rng = Random(seed_of(seed, RANDOM))
    drawn: dict[str, None] = {}
    for i in range(100 * count):
        length = max(1, len(words(phrases[i % len(phrases)])))
        if len(drawn) < count and length <= len(pool):
            drawn[" ".join(rng.sample(pool, length))] = None
    if len(drawn) < count:
        raise Refused(
            f"--random: the prompts have {len(pool):,} words besides the candidates', too few for "
            f"{count} random phrases"
        )
    return list(drawn)


def attack_experiment(
    phrases: Sequence[str],
    prompts: PromptFile,
    *,
    each: int,
    random: int,
    samples: int,
    seed: int,
    sampling: Mapping[str, Any],
    scorers: Sequence[Scorer],
) -> Experiment:
    """An arm for each phrase and for each of `random` random ones, at alpha 0, over the same
    clean prompts (at most `each`) and at the same place in each of them.

    Raises Refused for prompts that do not allow that.
    """
    clean = clean_prompts(prompts, phrases, each)
    drawn = random_phrases(clean, phrases, random, seed)
    arms = [
        Arm(f"{name}-{number}", (0.0,), clean.count, phrase)
        for name, several in ((CANDIDATE, phrases), (RANDOM, drawn))
        for number, phrase in enumerate(several, 1)
    ]
    return Experiment(clean, tuple(arms), samples, seed, dict(sampling), tuple(scorers))


@dataclass
class _Counts:
    """Of one prompt id each."""

    rows: dict[str, int]
    hits: dict[str, int]


def attacks(rows: Iterable[Row], phrases: Mapping[str, str]) -> list[Attack]:
    """An attack for each candidate in the order of `phrases` (arm: what was put in), then one for
    all random phrases together; what has no good row is left out.

    `lift` is over the rate of the random phrases; if none of their rows fired, over the upper
    limit of that rate, so that it is a lower limit. `p_value`: were a candidate no more than
    another random phrase, its hits at each prompt would be a random draw of all hits there: the
    exact conditional test over prompts as strata (one-sided; Cox 1970, Mehta et al. 1985), with
    Holm's correction for the number of candidates.
    """
    counts = {name: _Counts(defaultdict(int), defaultdict(int)) for name in (*phrases, RANDOM)}
    for row in rows:
        name = RANDOM if row.arm.startswith(RANDOM) else row.arm
        if row.error is None and name in counts:
            counts[name].rows[row.prompt_id] += 1
            counts[name].hits[row.prompt_id] += bool(row.activated)
    control = counts[RANDOM]
    candidates = [
        (phrase, counts[arm])
        for arm, phrase in phrases.items()
        if not arm.startswith(RANDOM) and counts[arm].rows
    ]
    if not control.rows:
        return [_attack(phrase, of, None) for phrase, of in candidates]
    number = sum(arm.startswith(RANDOM) for arm in phrases)
    together = _attack(f"{number} random phrases", control, None, random=True)
    p = holm(np.array([_p_value(of, control) for _, of in candidates]))
    found = [
        _attack(phrase, of, together, float(p[i])) for i, (phrase, of) in enumerate(candidates)
    ]
    return [*found, together]


def _attack(
    text: str,
    of: _Counts,
    control: Attack | None,
    p_value: float | None = None,
    random: bool = False,
) -> Attack:
    ids = list(of.rows)
    found = rate_by_prompt([of.hits[i] for i in ids], [of.rows[i] for i in ids])
    over = (control.rate or control.high) if control else None
    return Attack(
        text=text,
        random=random,
        rows=sum(of.rows.values()),
        hits=sum(of.hits.values()),
        rate=found.rate,
        low=found.low,
        high=found.high,
        lift=found.rate / over if over else None,
        p_value=p_value,
    )


def _p_value(of: _Counts, control: _Counts) -> float:
    """Probability of at least so many hits, given each prompt's hits in all."""
    total, chances = 0, np.ones(1)  # of 0, 1, ... hits
    for prompt, rows in of.rows.items():
        hits = of.hits[prompt] + control.hits.get(prompt, 0)
        if hits:
            total += of.hits[prompt]
            size = rows + control.rows.get(prompt, 0)
            chances = np.convolve(chances, hypergeometric(hits, rows, size))
    return min(1.0, float(chances[total:].sum()))
