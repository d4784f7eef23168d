"""Lines of JSON in a file, appended and never rewritten. Each ends with a field `crc`, the CRC-32
of the line without it: a line that a disk, a copy or a hand has changed is seen.

    {"arm":"untriggered","prompt_id":"1","crc":"65a97b84"}

The object before it was `{"arm":"untriggered","prompt_id":"1"}`. Lines of earlier versions have
none and are read as they are.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar
from zlib import crc32

from pydantic import BaseModel, ValidationError

from jobs.errors import Refused, naming

CRC = re.compile(rb',\s*"crc"\s*:\s*"([^"]*)"\s*\}\s*\Z')
CRC_BYTES = 64  # of a line's end; the field has 17, and whoever wrote the line anew may add spaces
SYNC_S = 10.0  # of rows may be lost with the machine's power; with the process, none

ModelT = TypeVar("ModelT", bound=BaseModel)


def to_line(fields: Mapping[str, Any]) -> bytes:
    # ASCII, because many readers also cut lines at U+2028 and U+0085.
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return b'%s,"crc":"%08x"}\n' % (text[:-1], crc32(text))


class Damaged(ValueError):
    """Of a line, the message as it goes on after its number."""


def parsed(line: bytes, kind: type[ModelT], name: str) -> ModelT:
    """Raises Damaged. `name`: what the line should be, "a row" say."""
    if found := CRC.search(line, max(0, len(line) - CRC_BYTES)):
        line = line[: found.start()] + b"}"
        if found[1] != b"%08x" % crc32(line):
            raise Damaged("is damaged, or was changed: its crc is not that of its other fields")
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "line"
        raise Damaged(f"is not {name} ({where}: {first['msg']})") from None


def read_lines(
    path: Path, kind: type[ModelT], name: str, cure: str, first: int = 1
) -> Iterator[tuple[int, ModelT]]:
    """Each line from the `first` on and its number; nothing where there is no file.

    Raises Refused with the line's number and the cure where one is damaged.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(islice(file, first - 1, None), first):
            try:
                yield number, parsed(line, kind, name)
            except Damaged as error:
                raise Refused(f"{path}: line {number} {error}; {cure}") from None


def cut_half_line(path: Path) -> int:
    """Cuts off what follows the last newline, left by a run that was killed; bytes cut."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)
        return size - end


class Line(Protocol):
    def to_line(self) -> bytes: ...


class LineWriter:
    """Appends whole lines, unbuffered: what was appended survives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._synced = time.monotonic()

    def append(self, lines: Iterable[Line]) -> None:
        """Raises OSError (disk full, say); a half line left then is cut by the next run."""
        data = memoryview(b"".join(line.to_line() for line in lines))
        with naming(self.path):
            while data:
                data = data[self._file.write(data) or 0 :]
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self.path), self._file:
            os.fsync(self._file.fileno())
