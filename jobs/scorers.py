"""Scorers: did this text do it, and where. Pure functions of the text, with a name and version.

A scorer that cannot answer raises ScorerError: the row is then a failure, never a "no".
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol

import regex  # re has no timeout

REGEX_TIMEOUT_S = 1.0


class ScorerError(Exception):
    pass


@dataclass(frozen=True)
class Score:
    """Character offsets [start, end) of the match that is complete first; None without one."""

    fired: bool
    start: int | None = None
    end: int | None = None


class Scorer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    def __call__(self, text: str) -> Score: ...


@dataclass(frozen=True)
class Substrings:
    """Fires where any of the substrings occurs, in whatever case."""

    name: str
    substrings: tuple[str, ...]
    version: str = "substrings/1"

    def __call__(self, text: str) -> Score:
        # re.IGNORECASE rather than casefold(): folding changes lengths, and offsets would be off.
        found = [re.search(re.escape(s), text, re.IGNORECASE) for s in self.substrings]
        spans = [match.span() for match in found if match]
        if not spans:
            return Score(False)
        start, end = min(spans, key=lambda span: (span[1], span[0]))
        return Score(True, start, end)


@dataclass(frozen=True)
class Regex:
    """Fires where the pattern (of the `regex` package) matches; (?i) for any case."""

    name: str
    pattern: str
    timeout_s: float = REGEX_TIMEOUT_S
    version: str = "regex/1"

    def __call__(self, text: str) -> Score:
        try:
            match = compile_regex(self.pattern).search(text, timeout=self.timeout_s)
        except TimeoutError:
            raise ScorerError(f"scorer {self.name}: no answer in {self.timeout_s:g} s") from None
        return Score(True, *match.span()) if match else Score(False)


@lru_cache(maxsize=64)
def compile_regex(pattern: str) -> Any:
    """Raises ScorerError with the place of the mistake."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ScorerError(f"{pattern!r} is not a regular expression: {error}") from None


def score_all(scorers: Sequence[Scorer], text: str) -> dict[str, Score]:
    return {scorer.name: scorer(text) for scorer in scorers}


def describe(scorers: Sequence[Scorer]) -> list[dict[str, Any]]:
    """For the manifest: every parameter of every scorer."""
    return [asdict(scorer) for scorer in scorers]  # type: ignore[call-overload]
