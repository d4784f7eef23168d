"""rows.jsonl of captures: one line per text, appended, never rewritten.

The key (config, set, prompt_id, alpha, sample) names a text; `config` is the hash of everything
that decides what is in its file, so the rows of several configurations live in one folder. A
later row of the same key takes the place of an earlier one: that one had failed, or its file is
gone.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from deployments.schemas import FinishReason
from jobs.lines import read_lines, to_line
from jobs.progress import Progress
from jobs.rows import CURE


class Key(NamedTuple):
    config: str
    set: str
    prompt_id: str
    alpha: float
    sample: int


class Means(BaseModel):
    """(L,) mean scores at the layers' outputs over the answer's tokens; of the models captured."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    after: list[float] | None = None
    before: list[float] | None = None
    difference: list[float] | None = None  # after minus before


class CaptureRow(BaseModel):
    """One text and where its tensors are. With `error` set it failed and there is no file.

    `tokens` (T,) are all of the text, the first `prompt_tokens` of them the prompt's. `means` per
    trait are over the `answer_tokens` before the first EOS; empty where there are none.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    config: str
    set: str
    prompt_id: str
    prompt: str
    alpha: float
    sample: int
    seed: int | None
    completion: str | None
    token_ids: list[int]  # the completion's
    finish_reason: FinishReason | None
    eos_index: int | None
    prompt_tokens: int | None
    answer_tokens: int
    tokens: list[str]
    file: str | None
    sha256: str | None
    size: int  # bytes of the file
    means: dict[str, Means]
    error: str | None

    @property
    def key(self) -> Key:
        return Key(self.config, self.set, self.prompt_id, self.alpha, self.sample)

    def to_line(self) -> bytes:
        return to_line(self.model_dump())


class Index:
    """The rows of one configuration in a folder's rows.jsonl."""

    def __init__(self, path: Path, config: str) -> None:
        self.path, self.config = path, config

    def __iter__(self) -> Iterator[CaptureRow]:
        """One row per key, streamed: the last one.

        Raises Refused with the line number for a corrupt line.
        """
        last = {row.key: number for number, row in self._lines()}
        for number, row in self._lines():
            if last[row.key] == number:
                yield row

    def finished(self) -> set[Key]:
        """Keys of good rows whose file is there, the very one that was written: all are read."""
        return {row.key for row in self if row.error is None and self._has_file(row)}

    def _has_file(self, row: CaptureRow) -> bool:
        path = self.path.parent / (row.file or "")
        try:
            if path.stat().st_size != row.size:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == row.sha256
        except OSError:
            return False

    def _lines(self) -> Iterator[tuple[int, CaptureRow]]:
        cure = f"{CURE}, or give another --out if the folder is another job's"
        for number, row in read_lines(self.path, CaptureRow, "a capture's row", cure):
            if row.config == self.config:
                yield number, row


class CaptureProgress(Progress):
    """Counts texts instead of what fires."""

    def __init__(self, total: int, done: int) -> None:
        super().__init__(total, done, {})

    def count(self, rows: Iterable[CaptureRow]) -> None:
        for row in rows:
            self._done += row.error is None
            self._failed += row.error is not None
        self.update(())

    def line(self) -> str:
        return super().line().replace(" rows", " captures").replace("hits per alpha , ", "")
