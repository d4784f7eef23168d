"""Prompt files: `.txt` with one prompt a line, or `.jsonl` with {"id"?, "prompt"} a line.

Streamed: a file of gigabytes needs 8 bytes a prompt. Everything is checked before the first
request is sent, and each bad line is named with its number (the first is 1).
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jobs.errors import Refused

MAX_LINE_BYTES = 16 * 2**20
SHOWN_BAD_LINES = 20
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prompt:
    """`id` is the JSONL id, or else the line's number: stable while the file is."""

    id: str
    text: str


@dataclass(frozen=True)
class PromptFile:
    """A checked file. Iterating streams its first `count` prompts."""

    path: Path
    sha256: str
    count: int

    def __iter__(self) -> Iterator[Prompt]:
        prompts = (p for _, p in _prompts(self.path) if isinstance(p, Prompt))
        return islice(prompts, self.count)


def read_prompts(path: Path, limit: int | None = None) -> PromptFile:
    """Checks the whole file; `limit` keeps the first so many prompts.

    Raises Refused for a file that cannot be read, has a bad line, an id twice, or no prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise Refused(
            f"{path}: a prompt file ends in .txt or .jsonl; `lda prompts` makes one of others"
        )
    try:
        sha256 = _sha256(path)
        ids, bad, n_bad = array("Q"), [], 0
        for number, prompt in _prompts(path):
            if isinstance(prompt, Prompt):
                ids.append(_hash64(prompt.id))
            else:
                n_bad += 1
                bad += [f"  line {number}: {prompt}"] * (n_bad <= SHOWN_BAD_LINES)
        if not n_bad and path.suffix == ".jsonl":
            bad = [f"  line {number}: id {id!r} again" for number, id in _repeated(path, ids)]
            n_bad, bad = len(bad), bad[:SHOWN_BAD_LINES]
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    if n_bad:
        more = f"\n  and {n_bad - len(bad)} more" if n_bad > len(bad) else ""
        raise Refused(f"{path}: {n_bad} bad line(s)\n" + "\n".join(bad) + more)
    if not ids:
        raise Refused(f"{path}: there is no prompt in it")
    return PromptFile(path, sha256, min(len(ids), limit or len(ids)))


class Line(NamedTuple):
    """One that is not blank, without its ending. `wrong`: why it has no text."""

    number: int
    text: str
    wrong: str = ""


def lines(path: Path) -> Iterator[Line]:
    """Of a file in UTF-8, with or without a byte order mark, a line in memory at a time."""
    with path.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        number = 0
        # Only \n ends a line: a prompt may contain U+2028 and its like, where splitlines() cuts.
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                yield Line(number, "", f"longer than {MAX_LINE_BYTES} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                continue
            try:
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                yield Line(number, "", f"not UTF-8 at byte {error.start}")
                continue
            if text.strip():
                yield Line(number, text)


def _prompts(path: Path) -> Iterator[tuple[int, Prompt | str]]:
    """Line number and its prompt, or what is wrong with it."""
    jsonl = path.suffix == ".jsonl"
    for number, text, wrong in lines(path):
        if wrong:
            yield number, wrong
        else:
            yield number, _from_json(text, number) if jsonl else Prompt(str(number), text)


def _from_json(text: str, number: int) -> Prompt | str:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(entry, dict):
        return 'not an object with "prompt"'
    if unknown := sorted(entry.keys() - {"id", "prompt"}):
        return f"unknown key {unknown[0]!r}; known are id and prompt"
    prompt, id = entry.get("prompt"), entry.get("id", number)
    if not isinstance(prompt, str) or not prompt.strip():
        return "prompt must be text that is not blank"
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        return "id must be text or a whole number"
    if any("\ud800" <= c <= "\udfff" for c in prompt + str(id)):
        return "a lone surrogate"
    return Prompt(str(id), prompt)


def _repeated(path: Path, ids: "array[int]") -> Iterator[tuple[int, str]]:
    """Lines whose id came before. Hashes find the candidates, a second reading decides."""
    values, counts = np.unique(np.array(ids, dtype=np.uint64), return_counts=True)
    candidates = set(values[counts > 1].tolist())
    seen: Counter[str] = Counter()
    for number, prompt in _prompts(path) if candidates else ():
        if isinstance(prompt, Prompt) and _hash64(prompt.id) in candidates:
            seen[prompt.id] += 1
            if seen[prompt.id] > 1:
                yield number, prompt.id


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
