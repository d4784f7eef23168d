"""Scorers: did this text do it, and where. Pure functions of the text, with a name and version.

A scorer that cannot answer raises ScorerError, which becomes a Score with `error` and without
`fired`: the row is then a failure, never a "no", and what the other scorers said is kept.

`monotone`: once it has fired on a prefix of a text it fires on every longer one. Then "it has
fired" is settled by the token that completes the first match, and nothing drawn later matters
(weights may stop there). Such a scorer's `end` is the length of the shortest prefix it fires on.
"""

import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import regex  # re has no timeout

from jobs.errors import Refused

REGEX_TIMEOUT_S = 1.0
MAX_ERROR_CHARS = 500
UNDESCRIBED = {"described": False}  # metadata of a field that does not decide the score


class ScorerError(Exception):
    pass


@dataclass(frozen=True)
class Score:
    """Character offsets [start, end) of the match that is complete first; None without one.

    `token` is the place of the drawn token that completes it; None without a match, where the
    scorer is not monotone, or where the tokens' ends are not known. With `error` (no answer)
    `fired` is None.
    """

    fired: bool | None
    start: int | None = None
    end: int | None = None
    token: int | None = None
    error: str | None = None


class Scorer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def monotone(self) -> bool: ...
    def __call__(self, text: str) -> Score: ...


@dataclass(frozen=True)
class Substrings:
    """Fires where any of the substrings occurs, in whatever case."""

    name: str
    substrings: tuple[str, ...]
    version: str = "substrings/1"

    @property
    def monotone(self) -> bool:
        return True

    def __call__(self, text: str) -> Score:
        # re.IGNORECASE rather than casefold(): folding changes lengths, and offsets would be off.
        found = [re.search(re.escape(s), text, re.IGNORECASE) for s in self.substrings]
        spans = [match.span() for match in found if match]
        if not spans:
            return Score(False)
        start, end = min(spans, key=lambda span: (span[1], span[0]))
        return Score(True, start, end)


@dataclass(frozen=True)
class Phrase:
    """Fires where the whole phrase occurs, character by character, its case included."""

    name: str
    phrase: str
    version: str = "phrase/1"

    @property
    def monotone(self) -> bool:
        return True

    def __call__(self, text: str) -> Score:
        start = text.find(self.phrase)
        return Score(False) if start < 0 else Score(True, start, start + len(self.phrase))


@dataclass(frozen=True)
class Regex:
    """Fires where the pattern (of the `regex` package) matches; (?i) for any case.

    All searches of one text share `timeout_s`.
    """

    name: str
    pattern: str
    timeout_s: float = REGEX_TIMEOUT_S
    version: str = "regex/2"  # 1 gave the leftmost match, not the one complete first

    @property
    def monotone(self) -> bool:
        return is_monotone(self.pattern)

    def __call__(self, text: str) -> Score:
        compiled, deadline = compile_regex(self.pattern), time.monotonic() + self.timeout_s

        def search(length: int) -> Any:
            left = max(0.0, deadline - time.monotonic())
            return compiled.search(text, endpos=length, timeout=left)

        try:
            match = search(len(text))
            if match and self.monotone:
                # "a+" ends late in "aaa" but is complete with the first "a".
                match = search(first_length(lambda n: search(n) is not None, match.end()))
        except TimeoutError:
            raise ScorerError(f"scorer {self.name}: no answer in {self.timeout_s:g} s") from None
        except MemoryError:  # a pattern that calls itself without end
            raise ScorerError(f"scorer {self.name}: no answer in the memory there is") from None
        return Score(True, *match.span()) if match else Score(False)


@lru_cache(maxsize=64)
def compile_regex(pattern: str) -> Any:
    """Raises ScorerError with the place of the mistake."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ScorerError(f"{pattern!r} is not a regular expression: {error}") from None


# Of these alone a match looks at nothing but the characters it consumes and those before them,
# and backtracking tries every way to match: what matched in a prefix is then found in any longer
# text. Whatever else there is looks ahead (`$`, `\Z`, a last `\b`, `(?=`, `\X`), or may give up a
# match because of what follows (possessive and atomic groups, verbs), or is rare (fuzzy,
# recursive, reversed, references): not monotone, even where a proof could be found.
_SAFE = re.compile(
    r"""(?:
      \\[dDwWsSnrtfvaA]                          # classes, control characters, start of the text
    | \\[^\w]                                    # an escaped sign
    | \\x[0-9a-fA-F]{2} | \\u[0-9a-fA-F]{4} | \\U[0-9a-fA-F]{8}
    | \\[pP]\{\^?[\w\ =:-]+\}
    | \\b(?=(?:\w|\\[wd])(?![?*{]))              # the character it looks at is consumed as well
    | (?:[*+?]|\{\d+(?:,\d*)?\})\??(?![*+?{])    # greedy or lazy; a further + is possessive
    | \((?![?*]) | \(\?(?:[ims]+\)|[ims]*:|P?<[A-Za-z_]\w*>|<[=!])
    | [^\\$*+?{(]
    )*""",
    re.VERBOSE,
)


@lru_cache(maxsize=64)
def is_monotone(pattern: str) -> bool:
    """Whether the pattern, once it matches in a prefix, surely matches in every longer text.

    Reads the pattern's text from left to right and knows no sets: `[$]` counts as `$`, which
    may also be written `\\$`.
    """
    return _SAFE.fullmatch(pattern) is not None


def first_length(fires: Callable[[int], bool], length: int) -> int:
    """The shortest prefix that a monotone scorer fires on, if it does on that of `length`."""
    return bisect_left(range(length), True, key=fires)


def locate(score: Score, token_ends: Sequence[int] | None) -> Score:
    """The score with its `token`: the first whose settled text holds the whole match.

    `token_ends` (T,): characters settled once each token is drawn, never falling; None where
    that is not known or the scorer is not monotone.
    """
    if score.end is None or token_ends is None:
        return score
    token = bisect_left(token_ends, score.end)
    return replace(score, token=token) if token < len(token_ends) else score


def score_all(
    scorers: Sequence[Scorer], text: str, token_ends: Sequence[int] | None = None
) -> dict[str, Score]:
    """What each scorer says; one that cannot answer does not keep the others from it."""
    return {s.name: _score(s, text, token_ends if s.monotone else None) for s in scorers}


def _score(scorer: Scorer, text: str, token_ends: Sequence[int] | None) -> Score:
    try:
        return locate(scorer(text), token_ends)
    except ScorerError as error:
        return Score(None, error=str(error)[:MAX_ERROR_CHARS])


class RowScores(NamedTuple):
    """The fields of a row that come from its scorers. `scores` are those before EOS.

    Where a scorer had no answer, `error` says so, and the row neither fired nor did not.
    """

    activated: bool | None
    activated_after_eos: bool | None
    scores: dict[str, Score]
    error: str | None


def score_row(
    scorers: Sequence[Scorer],
    text: str,
    eos_offset: int | None,
    token_ends: Sequence[int] | None = None,
) -> RowScores:
    """Scores the text before the first EOS, which is at character `eos_offset`, and that after."""
    scores = score_all(scorers, text[:eos_offset], token_ends)
    after = "" if eos_offset is None else text[eos_offset:]
    late = score_all(scorers, after) if after else {}
    errors = [s.error for s in (*scores.values(), *late.values()) if s.error is not None]
    if errors:
        return RowScores(None, None, scores, "; ".join(dict.fromkeys(errors)))
    fired, fired_late = (any(s.fired for s in found.values()) for found in (scores, late))
    return RowScores(fired, fired_late, scores, None)


def describe(scorers: Sequence[Scorer]) -> list[dict[str, Any]]:
    """For the manifest: all that decides the scores, and no secret.

    Raises Refused for two scorers of one name.
    """
    again = [name for name, times in Counter(s.name for s in scorers).items() if times > 1]
    if again:
        raise Refused(f"two scorers are named {again[0]!r}; each needs a name of its own")
    return [_described(scorer) for scorer in scorers]


def _described(scorer: Any) -> dict[str, Any]:
    shown = [f.name for f in fields(scorer) if f.metadata.get("described", True)]
    return {**{name: getattr(scorer, name) for name in shown}, "monotone": scorer.monotone}
