"""A run's folder: one writer, what it was made with, and files that are whole or absent."""

import fcntl
import json
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from deployments.commit import commit
from deployments.schemas import PairInfo
from jobs.errors import Refused, naming

MANIFEST = "manifest.json"
ROWS = "rows.jsonl"
MEANS = "means.bin"  # in the place of rows, of the traits job
DESIGN = "design.json"  # what was sampled in the end: rows per cell, and why these alphas
SUMMARY = "summary.json"
REPORT = "report.html"
LOCK = ".lock"
CONFIRM = "confirm"  # a folder: the confirm job's run
SHOWN_DIFFERENCES = 10

# What decides the rows. The rest of PairInfo (paths, versions, notices) may differ on resume.
PAIR_IDENTITY = (
    "after_sha256",
    "before_sha256",
    "adapter_sha256",
    "tokenizer_sha256",
    "architecture",
    "dtype",
    "device",
    "vocab_size",
)


class RunFolder:
    """Entered by one driver at a time; the kernel lets go of the lock if that driver dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = path / ROWS

    def __enter__(self) -> Self:
        """Raises Refused if another driver is in it, OSError if it cannot be made."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise Refused(f"{self.path}: another run is writing to this folder") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def read(self, name: str) -> Any:
        """See `read_json`."""
        return read_json(self.path / name)

    def write(self, name: str, content: object) -> None:
        """Whole or not at all: written beside, synced, then moved into place."""
        beside = self.path / f".{name}.part"
        with naming(beside), beside.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path / name)

    def discard(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def check_experiment(self, experiment: Mapping[str, Any]) -> bool:
        """True if this folder already holds rows of this very experiment, False if it has none.

        Raises Refused with the difference if it holds another.
        """
        if not self.rows.exists() or not self.rows.stat().st_size:
            return False
        manifest = self.read(MANIFEST)
        if manifest is None:
            raise Refused(f"{self.path} has {ROWS} but no {MANIFEST}: give another --out")
        self._refuse_difference({k: manifest.get(k) for k in experiment}, experiment)
        return True

    def check_pair(self, pair: PairInfo, name: str = "pair", traits: Collection[str] = ()) -> None:
        """Raises Refused if the rows in this folder came from other weights, dtype or device, or
        from other vectors of these of the service's traits.

        `name` is what the manifest calls the pair.
        """
        was = self.read(MANIFEST).get(name) or {}
        self._refuse_difference(_identity(was, traits), _identity(pair.model_dump(), traits))

    def _refuse_difference(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        # Through JSON, as `was` came: tuples are lists there.
        old, new = dict(_flat(was)), dict(_flat(json.loads(json.dumps(now))))
        names = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)]
        if names:
            shown = [f"  {n}: {old.get(n)!r} there, {new.get(n)!r} now" for n in names]
            shown = shown[:SHOWN_DIFFERENCES] + ["  ..."] * (len(names) > SHOWN_DIFFERENCES)
            raise Refused(
                f"{self.path} holds another run; give another --out, or run it as it was:\n"
                + "\n".join(shown)
            )


def monitor_file(folder: Path, scorer: str) -> Path:
    """What the phrase monitor knows of a scorer's phrase."""
    return folder / f"monitor.{scorer}.jsonl"


def read_json(path: Path) -> Any:
    """The parsed file, or None if there is none. Raises Refused if it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise Refused(f"{path} is not JSON") from None


def manifest(experiment: Mapping[str, Any], pair: PairInfo) -> dict[str, Any]:
    return {
        **experiment,
        "pair": pair.model_dump(),
        "versions": _versions(),
        "commit": commit() or pair.commit,  # a submitted job runs in a copy without history
    }


def _identity(pair: Mapping[str, Any], traits: Collection[str]) -> dict[str, Any]:
    made = {name: pair.get(name) for name in PAIR_IDENTITY}
    if traits:
        hashes = pair.get("traits")
        known = hashes if isinstance(hashes, Mapping) else {}  # older manifests list the names
        made["traits"] = {name: known.get(name) for name in traits}
    return made


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lda-serve", "ray", "scipy", "regex"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found
