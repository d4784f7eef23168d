"""rows.jsonl, the truth of a run: one line per row, appended, never rewritten.

The key (arm, prompt_id, alpha, sample) is unique. The one thing that may come twice is a row
that failed: a later row of the same key takes its place. Rows hold nothing that differs between
two runs of the same config, so a resumed file equals an uninterrupted one after sorting; but for
recorded log-probabilities, which differ by what the batch's size does to the last bits of a float
(about 1e-6).
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from deployments.schemas import Densities, FinishReason
from jobs.errors import Refused
from jobs.lines import read_lines, to_line
from jobs.scorers import Score

Cell = tuple[str, float]  # arm, alpha
CURE = "delete the line to have its row made again"


class Key(NamedTuple):
    arm: str
    prompt_id: str
    alpha: float
    sample: int


class RowLogprobs(BaseModel):
    """Of each drawn token at temperature 1, under each model."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    after: list[float]
    before: list[float]


class Row(BaseModel):
    """One sample of one prompt. With `error` set it is a failure: it neither fired nor did not.

    `activated`: a scorer fired before the first EOS (or anywhere, if there was none);
    `activated_after_eos`: one fired in the text after it. `scores` are those before EOS.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    arm: str
    prompt_id: str
    prompt: str
    alpha: float
    sample: int
    seed: int
    completion: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    eos_index: int | None
    activated: bool | None
    activated_after_eos: bool | None
    scores: dict[str, Score]
    error: str | None
    eos_text_offset: int | None = None  # characters of the completion before its first EOS
    # Where densities are recorded: what every estimate is made of. (T,), (T, K), (T, W).
    token_ends: list[int] | None = None
    logprobs: RowLogprobs | None = None
    densities: Densities | None = None
    watched: list[list[float]] | None = None
    block: int | None = None  # of prompts, in a spread run, where each prompt has one alpha

    @property
    def key(self) -> Key:
        return Key(self.arm, self.prompt_id, self.alpha, self.sample)

    def without_rounding(self) -> Self:
        """Without what depends on the batch it was decoded in, by the last bits of a float."""
        return self.model_copy(update={"logprobs": None, "densities": None, "watched": None})

    def to_line(self) -> bytes:
        return to_line(self.model_dump())


class KeySet:
    """Keys as sorted 64-bit hashes, 8 bytes each. Two keys of the same hash would look like one;
    at 100 million rows that has a chance of 1 in 1,000 or so, and shows as a missing row."""

    def __init__(self, hashes: "array[int]") -> None:
        self._sorted = np.sort(np.frombuffer(hashes, dtype=np.uint64))

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, key: Key) -> bool:
        if not len(self._sorted):
            return False
        value = np.uint64(key_hash(key))
        place = int(np.searchsorted(self._sorted, value))
        return place < len(self._sorted) and bool(self._sorted[place] == value)


def key_hash(key: Key) -> int:
    return int.from_bytes(blake2b(json.dumps(key).encode(), digest_size=8).digest(), "big")


class Finished(NamedTuple):
    """Keys of good rows; how many these are, and how many of them activated, per cell."""

    keys: KeySet
    rows: dict[Cell, int]
    hits: dict[Cell, int]


class RowFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Row]:
        """One row per key, streamed; what came after a failed row of the same key, in its place.

        Raises Refused with the line number for a corrupt line or a key with two different rows.
        """
        repeated = self._repeated_hashes()
        waiting: dict[Key, tuple[int, Row]] = {}
        for number, row in self._lines():
            if not repeated or key_hash(row.key) not in repeated:
                yield row
                continue
            before, old = waiting.get(row.key, (number, row))
            if old.error is None and old.without_rounding() != row.without_rounding():
                raise Refused(
                    f"{self.path}: lines {before} and {number} are two different rows of "
                    f"arm {row.arm}, prompt {row.prompt_id}, alpha {row.alpha:g}, "
                    f"sample {row.sample}"
                )
            waiting[row.key] = number, row
        yield from (row for _, row in waiting.values())

    def finished(self, cells: Iterable[Cell]) -> "Finished":
        """The good rows of these cells."""
        hashes = array("Q")
        rows, hits = dict.fromkeys(cells, 0), dict.fromkeys(cells, 0)
        for row in self:
            cell = row.arm, row.alpha
            if row.error is None and cell in rows:
                hashes.append(key_hash(row.key))
                rows[cell] += 1
                hits[cell] += bool(row.activated)
        return Finished(KeySet(hashes), rows, hits)

    def _lines(self) -> Iterator[tuple[int, Row]]:
        return read_lines(self.path, Row, "a row", CURE)

    def _repeated_hashes(self) -> set[int]:
        hashes = array("Q", (key_hash(row.key) for _, row in self._lines()))
        values = np.sort(np.frombuffer(hashes, dtype=np.uint64))  # np.unique takes thrice as much
        return set(values[1:][values[1:] == values[:-1]].tolist())
