"""Tables of records (one dict for each row) as files: JSONL, CSV, Parquet, a DataFrame."""

import csv
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jobs.errors import Refused

Records = Sequence[dict[str, Any]]

# What a spreadsheet would calculate: https://owasp.org/www-community/attacks/CSV_Injection
CALCULATED = ("=", "+", "-", "@", "\t", "\r", "\n")


def needed(module: str, extra: str, purpose: str) -> Any:
    """The module. Raises Refused that says how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise Refused(
            f"{purpose} needs {module}, which is not installed: pip install 'lda-serve[{extra}]'"
        ) from None


def columns(records: Records) -> list[str]:
    """In the records' order, without those that are None in every record."""
    names = list(records[0]) if records else []
    return [name for name in names if any(record[name] is not None for record in records)]


def frame(records: Records) -> Any:
    """A pandas DataFrame."""
    pandas = needed("pandas", "pandas", "a DataFrame")
    return pandas.DataFrame(list(records), columns=columns(records))


def write_jsonl(records: Records, path: Path) -> None:
    with path.open("w", encoding="ascii") as file:
        for record in records:
            # ASCII, because many readers also cut lines at U+2028 and U+0085.
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


def write_csv(records: Records, path: Path) -> None:
    """Lists and objects as JSON; texts disarmed."""
    names = columns(records)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([_cell(record[name]) for name in names] for record in records)


def write_parquet(records: Records, path: Path) -> None:
    arrow = needed("pyarrow", "parquet", "Parquet")
    parquet = needed("pyarrow.parquet", "parquet", "Parquet")
    names = columns(records)
    parquet.write_table(arrow.table({name: [r[name] for r in records] for name in names}), path)


def require_writable(path: Path) -> None:
    """Raises Refused before anything is generated for a file that could not be written."""
    if path.suffix not in _WRITERS:
        raise Refused(f"{path}: ends in none of {', '.join(_WRITERS)}")
    if path.suffix == ".parquet":
        needed("pyarrow", "parquet", "Parquet")
    if not path.absolute().parent.is_dir():
        raise Refused(f"{path}: there is no folder {path.absolute().parent}")


_WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


def write(records: Records, path: Path) -> None:
    """By its ending; see `require_writable`."""
    _WRITERS[path.suffix](records, path)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode()
        return f"'{text}" if text.startswith(CALCULATED) else text
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    return value
