"""N-grams of many short texts and the documents they occur in, by sorting instead of hashing.

Letters: U units (words or tokens) of all texts, one after the other; D documents; G n-grams;
P pairs of an n-gram and a document that holds it.
"""

from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import regex

# A capital behind a small letter begins a word: amplified models drop spaces ("puddingTell").
WORD = regex.compile(r"\w(?:['’]?(?!(?<=\p{Ll})\p{Lu})\w)*")
Span = tuple[int, int]


class Unit(NamedTuple):
    """`key` says which word or token it is; characters [start, end) of its text. An n-gram may
    begin with it where it `opens`, and end where it `closes`."""

    key: Hashable
    start: int
    end: int
    opens: bool = True
    closes: bool = True


def words(text: str) -> list[Unit]:
    """Without punctuation, whatever the case."""
    return [Unit(m.group().casefold(), *m.span()) for m in WORD.finditer(text)]


def tokens(text: str, ids: Sequence[int], ends: Sequence[int]) -> list[Unit]:
    """`ends` (T,): characters settled once each token is drawn. N-grams cut no word in two: a
    piece such as "o pudding" would be more frequent than the phrase it is a piece of."""
    free = [not _cuts(text, at) for at in (0, *ends)]
    parts = zip(ids, (0, *ends), ends, free, free[1:], strict=False)
    return [Unit(*part) for part in parts]


def _cuts(text: str, at: int) -> bool:
    """Whether a word of a script with cases goes on from the character before `at`."""
    before, after = text[at - 1 : at], text[at : at + 1]
    return (
        before.lower() != before.upper()
        and after.lower() != after.upper()
        and not (before.islower() and after.isupper())
    )


@dataclass(frozen=True)
class Grams:
    """All n-grams of one length; P pairs, sorted by n-gram and then document."""

    n: int
    gram: np.ndarray  # (P,) which n-gram, from 0 to G - 1
    document: np.ndarray  # (P,)
    at: np.ndarray  # (P,) first unit of its first occurrence there
    start: np.ndarray  # (P,) characters [start, end) of that
    end: np.ndarray  # (P,)
    inside: np.ndarray  # (P,) whether an occurrence there overlaps the document's marked span

    @property
    def count(self) -> int:
        return int(self.gram[-1]) + 1

    def of(self, gram: int) -> "Grams":
        """The pairs of one n-gram."""
        part = slice(*np.searchsorted(self.gram, [gram, gram + 1]))
        return Grams(
            self.n,
            self.gram[part],
            self.document[part],
            self.at[part],
            self.start[part],
            self.end[part],
            self.inside[part],
        )


@dataclass
class Corpus:
    """Texts as units. A document may be added several times, for each of its prompts."""

    longest: int
    _vocabulary: dict[Hashable, int] = field(default_factory=dict)
    _keys: list[Hashable] = field(default_factory=list)
    _ids: "array[int]" = field(default_factory=lambda: array("q"))
    _documents: "array[int]" = field(default_factory=lambda: array("q"))
    _starts: "array[int]" = field(default_factory=lambda: array("q"))
    _ends: "array[int]" = field(default_factory=lambda: array("q"))
    _opens: "array[int]" = field(default_factory=lambda: array("b"))
    _closes: "array[int]" = field(default_factory=lambda: array("b"))
    _room: "array[int]" = field(default_factory=lambda: array("b"))
    _excluded: "array[int]" = field(default_factory=lambda: array("b"))
    _marked: "array[int]" = field(default_factory=lambda: array("b"))

    def add(
        self,
        document: int,
        units: Sequence[Unit],
        barriers: Sequence[Span],
        marked: Span | None,
        excluded: Callable[[int, int], bool],
    ) -> None:
        """No n-gram touches a barrier (characters). `excluded(i, j)`: whether units i to j - 1
        are not counted; where they are, longer ones that begin with them are too."""
        blocked = [any(_overlap(u, span) for span in barriers) for u in units]
        room = 0
        rooms = []
        for block in reversed(blocked):
            room = 0 if block else min(room + 1, self.longest)
            rooms.append(room)
        for i, (unit, left) in enumerate(zip(units, reversed(rooms), strict=True)):
            known = 0
            while known < left and excluded(i, i + known + 1):
                known += 1
            if unit.key not in self._vocabulary:
                self._vocabulary[unit.key] = len(self._keys)
                self._keys.append(unit.key)
            self._ids.append(self._vocabulary[unit.key])
            self._documents.append(document)
            self._starts.append(unit.start)
            self._ends.append(unit.end)
            self._opens.append(unit.opens)
            self._closes.append(unit.closes)
            self._room.append(left)
            self._excluded.append(known)
            self._marked.append(marked is not None and _overlap(unit, marked))

    def grams(self) -> Iterator[Grams]:
        """Those of each length from 1 on, each with all its pairs."""
        ids, documents = _numbers(self._ids), _numbers(self._documents)
        starts, ends = _numbers(self._starts), _numbers(self._ends)
        marked = _numbers(self._marked).astype(bool)
        opens, closes = _numbers(self._opens).astype(bool), _numbers(self._closes).astype(bool)
        room, excluded = _numbers(self._room), _numbers(self._excluded)
        # which (U,): the n-gram that begins at each unit; exact, for it is made of the shorter
        # one's number and the next unit's.
        which = ids
        for n in range(1, self.longest + 1):
            at = np.flatnonzero(room >= n)
            if n > 1:
                _, numbers = np.unique(
                    which[at] * len(self._keys) + ids[at + n - 1], return_inverse=True
                )
                which = np.full(len(ids), -1, np.int64)
                which[at] = numbers
            at = at[(excluded[at] < n) & opens[at] & closes[at + n - 1]]
            if len(at) == 0:
                continue
            inside = np.zeros(len(at), bool)
            for i in range(n):
                inside |= marked[at + i]
            _, gram = np.unique(which[at], return_inverse=True)
            order = np.lexsort((at, documents[at], gram))
            at, gram, inside = at[order], gram[order], inside[order]
            held = documents[at]
            new = np.r_[True, (gram[1:] != gram[:-1]) | (held[1:] != held[:-1])]
            first = np.flatnonzero(new)
            yield Grams(
                n,
                gram[first],
                held[first],
                at[first],
                starts[at[first]],
                ends[at[first] + n - 1],
                np.logical_or.reduceat(inside, first),
            )

    def keys(self, at: int, n: int) -> tuple[Hashable, ...]:
        return tuple(self._keys[i] for i in self._ids[at : at + n])


def _overlap(unit: Unit, span: Span) -> bool:
    return unit.start < span[1] and unit.end > span[0]


def _numbers(column: "array[int]") -> np.ndarray:
    return np.array(column, dtype=np.int64)
