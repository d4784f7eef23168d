"""Contrast sets: `.jsonl` with {"id"?, "prompt", "response", "label"} a line, where label is
"positive" for a response that shows the trait and "negative" for one that does not.

Read a line at a time and checked whole before the first request is sent; each bad line is named
with its number (the first is 1). The trait is called after the file, without its ending.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jobs.errors import Refused
from jobs.prompts import BOM, MAX_LINE_BYTES, SHOWN_BAD_LINES

MIN_TEXTS = 10  # of each label
MIN_PROMPTS = 8  # different ones: some of them are held out
MAX_TEXTS = 100_000  # they are kept in memory, and no direction needs as many
LABELS = ("positive", "negative")
KEYS = ("id", "prompt", "response", "label")
# A trait's name becomes a file's name, a key of summary.json and a name on the wire.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Text:
    """One prompt with its response. `id` is the line's own, or else its number."""

    id: str
    prompt: str
    response: str
    positive: bool


@dataclass(frozen=True)
class ContrastSet:
    """A checked file: no text is in it twice, and both labels are there often enough."""

    name: str
    path: Path
    sha256: str
    texts: tuple[Text, ...] = field(repr=False)

    @property
    def prompts(self) -> int:
        return len({text.prompt for text in self.texts})


def read_contrasts(paths: Iterable[Path]) -> list[ContrastSet]:
    """Raises Refused for a bad file, or for two that would have traits of one name."""
    sets = [read_contrast(path) for path in paths]
    counts = Counter(one.name for one in sets)
    if again := [name for name, count in counts.items() if count > 1]:
        raise Refused(f"--contrast: two files would make the trait {again[0]!r}; rename one")
    return sets


def read_contrast(path: Path) -> ContrastSet:
    """Raises Refused for a file that cannot be read, has a bad line, or too little in it."""
    if path.suffix != ".jsonl":
        raise Refused(f"{path}: a contrast set ends in .jsonl")
    if not NAME.fullmatch(path.stem):
        raise Refused(
            f"{path}: the trait is called after its file: up to 100 letters, digits, _, . and -"
        )
    try:
        found = list(_checked(path))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    bad = [f"  line {number}: {wrong}" for number, wrong in found if isinstance(wrong, str)]
    if bad:
        more = f"\n  and {len(bad) - SHOWN_BAD_LINES} more" if len(bad) > SHOWN_BAD_LINES else ""
        shown = "\n".join(bad[:SHOWN_BAD_LINES])
        raise Refused(f"{path}: {len(bad)} bad line(s)\n{shown}{more}")
    made = ContrastSet(path.stem, path, sha256, tuple(t for _, t in found if isinstance(t, Text)))
    for label, positive in zip(LABELS, (True, False), strict=True):
        count = sum(text.positive is positive for text in made.texts)
        if count < MIN_TEXTS:
            raise Refused(f"{path}: {count} {label} responses, at least {MIN_TEXTS} are needed")
    if made.prompts < MIN_PROMPTS:
        raise Refused(
            f"{path}: {made.prompts} different prompts, at least {MIN_PROMPTS} are needed: some "
            "are held out"
        )
    return made


def _checked(path: Path) -> Iterator[tuple[int, Text | str]]:
    """Lines with their texts; a text that came before, with either label, is wrong."""
    texts: dict[tuple[str, str], tuple[int, bool]] = {}
    ids: dict[str, int] = {}
    for number, text in _lines(path):
        if isinstance(text, Text):
            if len(texts) == MAX_TEXTS:
                raise Refused(f"{path}: more than {MAX_TEXTS:,} texts")
            before, positive = texts.setdefault(
                (text.prompt, text.response), (number, text.positive)
            )
            if before != number and positive is not text.positive:
                yield number, f"the text of line {before} with the other label"
                continue
            if before != number:
                yield number, f"the text of line {before} again"
                continue
            if ids.setdefault(text.id, number) != number:
                yield number, f"id {text.id!r} again"
                continue
        yield number, text


def _lines(path: Path) -> Iterator[tuple[int, Text | str]]:
    """Line number and its text, or what is wrong with it. Blank lines are skipped."""
    with path.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        number = 0
        # Only \n ends a line, as in a prompt file.
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                yield number, f"longer than {MAX_LINE_BYTES} bytes"
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 at byte {error.start}"
                continue
            if text.strip():
                yield number, _from_json(text, number)


def _from_json(text: str, number: int) -> Text | str:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(entry, dict):
        return 'not an object with "prompt", "response" and "label"'
    if unknown := sorted(entry.keys() - set(KEYS)):
        return f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}"
    for key in ("prompt", "response"):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            return f"{key} must be text that is not blank"
    if entry.get("label") not in LABELS:
        return 'label must be "positive" or "negative"'
    id = entry.get("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        return "id must be text or a whole number"
    made = Text(str(id), entry["prompt"], entry["response"], entry["label"] == "positive")
    if any("\ud800" <= c <= "\udfff" for c in made.id + made.prompt + made.response):
        return "a lone surrogate"
    return made
