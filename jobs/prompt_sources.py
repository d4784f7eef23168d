"""Prompts from where people have them: .txt and .jsonl (jobs/prompts.py), .csv, .parquet, and
data sets of the Hugging Face hub, `hf:NAME`, `hf:NAME:CONFIG`, `hf:NAME@SPLIT`.

Tables have their prompts in one column, and perhaps an `id` in another; what else they hold is
left. As with prompt files everything is checked first, each bad row is named with its number (the
first is 1), and what is streamed is read again.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.client_files import needed
from jobs.errors import Refused
from jobs.prompts import MAX_LINE_BYTES, SHOWN_BAD_LINES, Prompt, PromptFile, read_prompts

HUB = "hf:"
SPLIT = "train"
COLUMN, ID = "prompt", "id"

Cells = Callable[[], Iterator[tuple[Any, Any]]]
"""A table's prompts and ids (None without that column), read from its beginning."""


@dataclass(frozen=True)
class PromptTable:
    """A checked table. Iterating streams its first `count` prompts."""

    source: str
    count: int
    _cells: Cells

    def __iter__(self) -> Iterator[Prompt]:
        prompts = (p for _, p in _rows(self._cells()) if isinstance(p, Prompt))
        return islice(prompts, self.count)


def prompts_of(
    source: str, column: str | None = None, limit: int | None = None
) -> PromptFile | PromptTable:
    """Checks all of it; `limit` keeps the first so many. `column`: of a table; default: prompt.

    Raises Refused for what cannot be read, has a bad row, an id twice, or no prompt; and where
    the package that reads it is not installed.
    """
    cells = _cells_of(source, column or COLUMN)
    if cells is None:
        if column is not None:
            raise Refused(f"--column: {source} has no columns")
        if Path(source).suffix not in (".txt", ".jsonl"):
            raise Refused(f"{source}: prompts are in .txt, .jsonl, .csv, .parquet or {HUB}NAME")
        return read_prompts(Path(source), limit)
    count, n_bad, bad = 0, 0, []
    ids: set[str] = set()
    try:
        for number, prompt in _rows(cells()):
            if isinstance(prompt, Prompt) and prompt.id in ids:
                prompt = f"id {prompt.id!r} again"
            if isinstance(prompt, Prompt):
                count += 1
                ids.add(prompt.id)
            else:
                n_bad += 1
                bad += [f"  row {number}: {prompt}"] * (n_bad <= SHOWN_BAD_LINES)
    except OSError as error:
        raise Refused(f"{source}: {error.strerror or error}") from error
    if n_bad:
        more = f"\n  and {n_bad - len(bad)} more" if n_bad > len(bad) else ""
        raise Refused(f"{source}: {n_bad} bad row(s)\n" + "\n".join(bad) + more)
    if not count:
        raise Refused(f"{source}: there is no prompt in it")
    return PromptTable(source, min(count, limit or count), cells)


def write_prompts(source: str, column: str | None, limit: int | None, out: Path) -> int:
    """As JSONL, for the jobs; exit status 0. Raises Refused."""
    if out.suffix != ".jsonl":
        raise Refused(f"--out: {out} must end in .jsonl")
    found = prompts_of(source, column, limit)
    with out.open("w", encoding="ascii") as file:
        for prompt in found:
            file.write(json.dumps({"id": prompt.id, "prompt": prompt.text}) + "\n")
    print(f"{found.count:,} prompts: {out}")
    return 0


def _rows(cells: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, Prompt | str]]:
    """Row number and its prompt, or what is wrong with it."""
    for number, (text, id) in enumerate(cells, 1):
        yield number, _prompt(text, number if id is None else id)


def _prompt(text: Any, id: Any) -> Prompt | str:
    if not isinstance(text, str) or not text.strip():
        return "the prompt must be text that is not blank"
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        return "id must be text or a whole number"
    if any("\ud800" <= c <= "\udfff" for c in text + str(id)):
        return "a lone surrogate"
    if len(text.encode()) > MAX_LINE_BYTES:
        return f"longer than {MAX_LINE_BYTES} bytes"
    return Prompt(str(id), text)


def _cells_of(source: str, column: str) -> Cells | None:
    """None for what is not a table."""
    if source.startswith(HUB):
        return _hub(source, column)
    path = Path(source)
    if path.suffix == ".csv":
        return lambda: _csv(path, column)
    if path.suffix == ".parquet":
        needed("pyarrow", "parquet", source)
        return lambda: _parquet(path, column)
    return None


def _csv(path: Path, column: str) -> Iterator[tuple[Any, Any]]:
    previous = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _need(column, reader.fieldnames or [], str(path))
            for row in reader:
                if None in row or None in row.values():
                    raise Refused(f"{path}: line {reader.line_num} has another number of cells")
                yield row[column], row.get(ID)
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not UTF-8 at byte {error.start}") from None
    except csv.Error as error:
        raise Refused(f"{path}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(previous)


def _parquet(path: Path, column: str) -> Iterator[tuple[Any, Any]]:
    arrow = needed("pyarrow", "parquet", str(path))
    parquet = needed("pyarrow.parquet", "parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _need(column, names, str(path))
            wanted = [column] + [ID] * (ID in names and column != ID)
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    yield row[column], row.get(ID)
    except arrow.ArrowInvalid as error:
        raise Refused(f"{path}: not Parquet: {error}") from None


def _hub(source: str, column: str) -> Cells:
    """Downloaded once, into the hub's cache; no code of a data set is run."""
    datasets = needed("datasets", "hf", source)
    rest, _, split = source.removeprefix(HUB).partition("@")
    name, _, config = rest.partition(":")
    if not name:
        raise Refused(f"{source}: a data set is {HUB}NAME, {HUB}NAME:CONFIG or {HUB}NAME@SPLIT")
    try:
        table = datasets.load_dataset(name, config or None, split=split or SPLIT)
    except Exception as error:  # of the hub, the network, the cache, the data set
        raise Refused(f"{source}: {type(error).__name__}: {error}") from None
    _need(column, table.column_names, source)
    return lambda: ((row[column], row.get(ID)) for row in table)


def _need(column: str, names: Iterable[str], source: str) -> None:
    known = list(names)
    if column not in known:
        raise Refused(
            f"{source}: no column {column!r}; there are {', '.join(map(repr, known)) or 'none'}: "
            "say which with --column"
        )
